"""Data parallelism over the cores of a machine: `torchrun --nproc-per-node 3 tools/train_vae.py ...`.

Every rank takes its share of the batch that one process without torchrun would make, so the number of ranks changes
the order of sums and, in the autoencoder, the noise of the posterior.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist


def add_flags(parser: argparse.ArgumentParser, *, stops: bool = False) -> None:
    """--float32, --device and --threads, of every command that may train on cards; ``stops``: and --minutes."""
    parser.add_argument("--float32", action="store_true", help="for processors that have no bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    if stops:
        parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on another time")


def start() -> tuple[int, int]:
    """(rank, number of ranks); joins the group that torchrun asks for."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
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


def any_rank(said: bool) -> bool:
    """Whether a rank says so; all of them get the same answer."""
    if not dist.is_initialized():
        return said
    votes = torch.tensor(float(said))
    dist.all_reduce(votes)
    return bool(votes > 0)


def fewest(number: int) -> int:
    """The smallest of the ranks' numbers."""
    if not dist.is_initialized():
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
    return int(numbers)
