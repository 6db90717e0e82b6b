"""The figures of all ranks at the end of a run, for the leading one: wanted, but no run fails for the lack of them."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dualparal.distributed.handshake import Store, gather
from dualparal.distributed.mesh import TIMEOUT, Mesh
from dualparal.distributed.private import NAME

logger = logging.getLogger("dualparal")

SECONDS = 5.0  # less than the supervisor's patience with a silent rank: what is made is joined before that
_STORE_SECONDS = 60.0


def collect(mesh: Mesh, store: Store, value: Any) -> list[Any]:
    """The JSON value of every rank, on the leading rank. Collective, once per store.

    Ranks of one machine send theirs over their sockets and wait for nobody. Under torchrun they go through the store,
    and the others stay until the leading rank, which may host it, has come.

    Returns:
        The values by rank; this rank's alone on those that do not lead, or when others are missing (a warning).
    """
    try:
        if dist.get_backend() == NAME:
            return _over_sockets(mesh, value)
        found = gather(store, mesh.rank, mesh.world_size, value, _STORE_SECONDS, TIMEOUT.total_seconds())
        return found or [value]
    except (TimeoutError, RuntimeError, OSError) as error:
        logger.warning("the figures of other ranks are missing: %s", str(error).splitlines()[0])
        return [value]


def _over_sockets(mesh: Mesh, value: Any) -> list[Any]:
    """Sends or receives them as ``collect`` says. Raises RuntimeError: a rank is gone, or late."""
    if not mesh.is_leader:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        for part in (torch.tensor([text.numel()]), text):
            dist.send(part, 0)
        return [value]
    found = [value]
    for rank in range(1, mesh.world_size):
        size = torch.empty(1, dtype=torch.int64)
        _receive(size, rank)
        text = torch.empty(int(size.item()), dtype=torch.uint8)
        _receive(text, rank)
        found.append(json.loads(text.numpy().tobytes()))
    return found


def _receive(tensor: torch.Tensor, rank: int) -> None:
    work = dist.irecv(tensor, rank)
    assert work is not None, "this rank is in the group of all"
    work.wait(timedelta(seconds=SECONDS))
