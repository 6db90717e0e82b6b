"""The communicators between stage 0's rank and ranks that decode, and among these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dualparal.distributed.parcels import PATIENCE
from dualparal.distributed.private import host_backend


class DecoderGroups(NamedTuple):
    """The communicators of ranks that decode a part of the rows each.

    Attributes:
        links: between CPUs, by rank: between the leading rank and that one. None for the leading rank itself.
        rows: of all that decode, on the device; None: there is one.
    """

    links: dict[int, Any]
    rows: Any


def make_decoder_groups(ranks: Sequence[int], device: torch.device) -> DecoderGroups:
    """Makes the communicators. Collective: all ranks of the run call it.

    Args:
        ranks: those that decode, the topmost rows first.
        device: this rank's, whose type is that of all.
    """
    links = {rank: dist.new_group([0, rank], backend=host_backend()) for rank in ranks if rank != 0}
    backend = "nccl" if device.type == "cuda" else host_backend()
    # An exchange is posted when one part is there. How long others may take is not NCCL's watchdog's to say.
    rows = dist.new_group(list(ranks), backend=backend, timeout=PATIENCE) if len(ranks) > 1 else None
    return DecoderGroups(links, rows)
