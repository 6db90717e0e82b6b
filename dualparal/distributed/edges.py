"""Directed edges between stages: a header and a tensor per message, on buffers allocated once, of bounded depth.

Edge k leads from stage k to the next one, the last one back to stage 0. Two kinds behind one interface: inside a
process (here), and between ranks (``remote``). What the tensors mean is not known here.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch

from dualparal.distributed.messages import Header, Lengths, TransportError


class Outbound(Protocol):
    """The sending end of a directed edge.

    Attributes:
        waited: seconds in which the host was blocked here, so far.
    """

    waited: float

    @property
    def name(self) -> str:
        """The edge, such as "edge 0 -> 1", for error messages."""
        ...

    def can_send(self) -> bool:
        """False when sending would have to wait for something that this process does itself."""
        ...

    def send(self, header: Header, tensor: torch.Tensor | None, mark: torch.Tensor | None = None) -> None:
        """Copies the tensor into a buffer and starts the transfer. Waits while all buffers are in use.

        Args:
            header: the message's.
            tensor: any shape, of the edge's dtype; it may be shorter than the unit's message. None: the header alone
                counts.
            mark: [1], which goes to the very end of the message; without it that is whatever was there.

        Raises:
            TransportError: a tensor of another dtype, or one that does not fit.
            PeerLost: the other end is gone.
        """
        ...

    def stop(self) -> None:
        """Tells the other end, which may be waiting, that no more units come."""
        ...

    def finish(self) -> None:
        """Waits until everything sent has left. Raises PeerLost."""
        ...


class Inbound(Protocol):
    """The receiving end of a directed edge.

    Attributes:
        waited: seconds in which the host was blocked here, so far.
    """

    waited: float

    @property
    def name(self) -> str:
        """The edge, such as "edge 0 -> 1", for error messages."""
        ...

    def can_receive(self) -> bool:
        """False when receiving would have to wait for something that this process does itself."""
        ...

    def receive(self) -> tuple[Header, torch.Tensor]:
        """Waits for the next message.

        Returns:
            Its header, and what came behind it, flat [elements of its unit], which is valid until ``release``.

        Raises:
            TransportError: the header is not the one of such an edge.
            PeerLost: the other end is gone.
        """
        ...

    def release(self) -> None:
        """Gives the buffer of the last message back to the edge."""
        ...

    def stop(self) -> None:
        """Waits for a STOP message, if it has not come yet, and answers it. Raises PeerLost."""
        ...

    def finish(self) -> None:
        """Waits until everything said to the other end has left. Raises PeerLost."""
        ...


def fill(edge: str, buffer: torch.Tensor, tensor: torch.Tensor, mark: torch.Tensor | None) -> None:
    """Copies into a buffer as long as the message.

    Raises:
        TransportError: the tensor has another dtype, or does not fit beside the mark.
    """
    room = buffer.numel() - (mark is not None)
    if tensor.dtype != buffer.dtype or tensor.numel() > room:
        raise TransportError(
            f"{edge}: {tensor.dtype} {list(tensor.shape)} to send where {room} elements of {buffer.dtype} fit"
        )
    buffer[: tensor.numel()].copy_(tensor.flatten(), non_blocking=True)
    if mark is not None:
        buffer[-1:].copy_(mark, non_blocking=True)


class LocalEdge:
    """Both ends in one process: a ring of buffers that the sender fills and the receiver reads.

    The stages of a process share one card and its current stream, so the copies are made there, in the order of the
    calls: on a stream of the edge's own a captured step's output would have to be kept from its next replay.

    Args:
        name: for error messages.
        lengths: of the messages.
        depth: number of buffers.
    """

    def __init__(self, name: str, lengths: Lengths, depth: int, dtype: torch.dtype, device: torch.device) -> None:
        self.name = name
        self.waited = 0.0
        self._length = lengths.of
        self._buffers = [torch.empty(lengths.most, dtype=dtype, device=device) for _ in range(depth)]
        self._free = deque(range(depth))
        self._full: deque[tuple[Header, int]] = deque()
        self._reading: int | None = None

    def can_send(self) -> bool:
        return bool(self._free)

    def can_receive(self) -> bool:
        return bool(self._full)

    def send(self, header: Header, tensor: torch.Tensor | None, mark: torch.Tensor | None = None) -> None:
        slot = self._free.popleft()
        if tensor is not None:
            fill(self.name, self._buffers[slot][: self._length(header.unit)], tensor, mark)
        self._full.append((header, slot))

    def receive(self) -> tuple[Header, torch.Tensor]:
        header, self._reading = self._full.popleft()
        return header, self._buffers[self._reading][: self._length(header.unit)]

    def release(self) -> None:
        assert self._reading is not None, "nothing to release"
        self._free.append(self._reading)
        self._reading = None

    def stop(self) -> None: ...

    def finish(self) -> None: ...
