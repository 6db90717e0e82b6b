"""Parcels between two ranks, from CPU to CPU: a sign of what is wanted or told, and a tensor of any shape on the CPU.

For what is small beside the work that it asks for, such as a finished block's latents and their frames. It never waits
for a card, and no card waits for it.
"""

from __future__ import annotations

import zlib
from collections import deque
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dualparal.distributed.messages import TransportError, guard

PATIENCE = timedelta(days=365)  # a consumer may pause for as long as it likes, and all ranks with it
_MAGIC = 0x706172636C000001  # "parcl", version 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_AXES = 5
_FIELDS = 6 + _AXES  # magic, sign, video, block, dtype, axes, checksum


class Sign(IntEnum):
    """The meaning of a parcel."""

    DECODE = 0  # latents of the next block: their frames are wanted
    PUSH = 1  # latents that later ones see
    WARM_UP = 2  # latents of a video of their own
    STOP = 3  # no more comes
    DONE = 4  # what was wanted: frames, or an empty tensor
    NONFINITE = 5  # the text of an error as bytes
    FAILED = 6  # the same, of any other error: the sender ends


class Parcel(NamedTuple):
    """A parcel: its meaning, the video and the block that it is about, and a contiguous tensor."""

    sign: Sign
    video: int
    block: int
    tensor: torch.Tensor


class ParcelLink:
    """One end of the way between two ranks. One thread may send while another receives.

    Args:
        name: for error messages.
        peer: the rank at the other end.
        group: between CPUs, of these two ranks alone.
    """

    def __init__(self, name: str, peer: int, group: Any) -> None:
        self.name, self.peer = name, peer
        self._group = group
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()  # a dropped handle would lose the message

    def send(self, sign: Sign, video: int = 0, block: int = 0, tensor: torch.Tensor | None = None) -> None:
        """Begins to send a parcel; a tensor of at most five axes, which is copied to the CPU. Raises PeerLost."""
        payload = torch.empty(0, dtype=torch.uint8) if tensor is None else tensor.cpu().contiguous()
        axes = [*payload.shape] + [-1] * (_AXES - payload.dim())
        code = _DTYPES.index(payload.dtype)
        header = torch.tensor([_MAGIC, sign, video, block, code, *axes, 0], dtype=torch.int64)
        header[-1] = _checksum(header)
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        for part in (header, payload):
            if part.numel():
                work = guard(self.name, dist.isend, part, self.peer, group=self._group)
                self._sent.append((work, part))

    def receive(self) -> Parcel:
        """Waits for the next parcel. Raises PeerLost, and TransportError for what is none."""
        header = torch.empty(_FIELDS, dtype=torch.int64)
        self._receive(header)
        magic, sign, video, block, code, *axes, checksum = header.tolist()
        known = sign in tuple(Sign) and 0 <= code < len(_DTYPES)
        if magic != _MAGIC or checksum != _checksum(header) or not known:
            raise TransportError(f"{self.name}: message without a valid header: {header.tolist()}")
        tensor = torch.empty([n for n in axes if n >= 0], dtype=_DTYPES[code])
        if tensor.numel():
            self._receive(tensor)
        return Parcel(Sign(sign), video, block, tensor)

    def finish(self) -> None:
        """Waits until everything sent has left. Raises PeerLost."""
        while self._sent:
            guard(self.name, self._sent.popleft()[0].wait, PATIENCE)

    def _receive(self, tensor: torch.Tensor) -> None:
        work = guard(self.name, dist.irecv, tensor, self.peer, group=self._group)
        guard(self.name, work.wait, PATIENCE)


def _checksum(header: torch.Tensor) -> int:
    return zlib.crc32(header[:-1].numpy().tobytes())


def to_bytes(text: str) -> torch.Tensor:
    """A text as uint8 [bytes], to send."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def to_text(data: torch.Tensor) -> str:
    """The inverse of ``to_bytes``."""
    return data.numpy().tobytes().decode(errors="replace")
