"""Data parallelism of the trainings: `torchrun --nproc-per-node 3 tools/train_vae.py ...`; one process without it.

Every rank takes its share of the batch that a single process would make, so the number of ranks changes the order of
sums and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist


def start() -> tuple[int, int]:
    """(rank, number of ranks); joins the group that torchrun asks for."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Gradients of all ranks, each over its share of one batch, to their mean. Shares are of one size."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
