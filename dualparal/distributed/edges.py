"""Directed edges between stages: a header and a tensor per message, on buffers allocated once, of bounded depth.

Edge k leads from stage k to the next one, the last one back to stage 0. Three kinds behind one interface: inside a
process, over gloo, and over NCCL (headers then still travel over gloo, so that the host reads them without waiting
for the GPU). What the tensors mean is not known here.

gloo needs care (measured, not guessed): a dropped send handle loses the message, a dtype mismatch and a too large
receive buffer are silent, a too small one aborts the process. Hence retained handles, fixed message sizes, and a
header with a checksum on every message.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from dualparal.distributed.messages import FIELDS, Header, Kind, TransportError, guard, pack_header, unpack_header
from dualparal.schedule.actions import Unit


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
            tensor: any shape, of the edge's dtype; it may be smaller than the buffer. None: the header alone counts.
            mark: [1], which goes to the very end of the buffer; without it that is whatever was there.

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
            Its header, and the whole buffer, flat [elements], which is valid until ``release``.

        Raises:
            TransportError: the header is not the one of such an edge.
            PeerLost: the other end is gone.
        """
        ...

    def release(self) -> None:
        """Gives the buffer of the last message back to the edge."""
        ...

    def stop(self) -> None:
        """Takes what is still under way, once a STOP message has come."""
        ...


def _fill(edge: str, buffer: torch.Tensor, tensor: torch.Tensor, mark: torch.Tensor | None) -> None:
    """Copies into a message buffer.

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
        elements: size of a buffer.
        depth: number of buffers.
    """

    def __init__(self, name: str, elements: int, depth: int, dtype: torch.dtype, device: torch.device) -> None:
        self.name = name
        self.waited = 0.0
        self._buffers = [torch.empty(elements, dtype=dtype, device=device) for _ in range(depth)]
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
            _fill(self.name, self._buffers[slot], tensor, mark)
        self._full.append((header, slot))

    def receive(self) -> tuple[Header, torch.Tensor]:
        header, self._reading = self._full.popleft()
        return header, self._buffers[self._reading]

    def release(self) -> None:
        assert self._reading is not None, "nothing to release"
        self._free.append(self._reading)
        self._reading = None

    def stop(self) -> None: ...

    def finish(self) -> None: ...


class _Slot(NamedTuple):
    header: torch.Tensor  # int64 [10], CPU
    tensor: torch.Tensor  # flat, on the device
    works: list[Any]  # handles of the transfer under way


class _DistributedEdge:
    """The common part of both ends over torch.distributed: a ring of buffers, and the waiting for transfers."""

    def __init__(
        self,
        name: str,
        peer: int,
        group: Any,
        elements: int,
        depth: int,
        messages: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates the buffers.

        Args:
            name: for error messages.
            peer: the rank at the other end.
            group: the edge's own communicator, see ``make_groups``.
            elements: size of a buffer and of every message, the same at both ends.
            depth: number of buffers.
            messages: number of messages at most; None: no end.
        """
        self.name = name
        self.waited = 0.0
        self.peer = peer
        self.group = group
        self.elements = elements
        self.dtype = dtype
        self.remaining = messages
        self._slots = deque(
            _Slot(torch.empty(FIELDS, dtype=torch.int64), torch.empty(elements, dtype=dtype, device=device), [])
            for _ in range(depth)
        )

    def _transfer(self, function: Callable[..., Any], slot: _Slot) -> None:
        slot.works[:] = [
            guard(self.name, function, tensor, self.peer, group=self.group) for tensor in (slot.header, slot.tensor)
        ]

    def _wait(self, slot: _Slot) -> None:
        begin = time.perf_counter()
        for work in slot.works:
            guard(self.name, work.wait)
        slot.works.clear()
        self.waited += time.perf_counter() - begin


class SendEdge(_DistributedEdge):
    """The sending end: a buffer is used again once its last transfer is done, which bounds the depth."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hello = pack_header(Header(Kind.HELLO, Unit(0, 0, 0), 0), self.elements, self.dtype)
        self._hello = _Slot(hello, hello, [guard(self.name, dist.isend, hello, self.peer, group=self.group)])

    def can_send(self) -> bool:
        return True  # waiting happens in send

    def send(self, header: Header, tensor: torch.Tensor | None, mark: torch.Tensor | None = None) -> None:
        slot = self._slots[0]
        self._wait(slot)
        slot.header.copy_(pack_header(header, self.elements, self.dtype))
        if tensor is not None:
            _fill(self.name, slot.tensor, tensor, mark)
        self._transfer(dist.isend, slot)
        self._slots.rotate(-1)
        if self.remaining is not None:
            self.remaining -= 1

    def stop(self) -> None:
        """Fills every receive that the other end has posted."""
        count = len(self._slots) if self.remaining is None else min(len(self._slots), self.remaining)
        for _ in range(count):
            self.send(Header(Kind.STOP, Unit(0, 0, 0), 0), None)

    def finish(self) -> None:
        for slot in (self._hello, *self._slots):
            self._wait(slot)


class ReceiveEdge(_DistributedEdge):
    """The receiving end: ``depth`` receives are always posted, so that transfers overlap compute.

    They are posted once the sender has said how large its messages are: gloo aborts a process that is sent more than it
    has room for, and fills a larger buffer in part without a word.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fields = torch.zeros(FIELDS, dtype=torch.int64)
        self._hello: _Slot | None = _Slot(
            fields, fields, [guard(self.name, dist.irecv, fields, self.peer, group=self.group)]
        )

    def _begin(self) -> None:
        if self._hello is None:
            return
        self._wait(self._hello)
        unpack_header(self._hello.header, self.elements, self.name, self.dtype)
        self._hello = None
        for slot in self._slots:
            self._post(slot)

    def _post(self, slot: _Slot) -> None:
        if self.remaining == 0:
            return
        if self.remaining is not None:
            self.remaining -= 1
        self._transfer(dist.irecv, slot)

    def can_receive(self) -> bool:
        return True  # waiting happens in receive; polling a gloo handle never turns true (reliability notes)

    def receive(self) -> tuple[Header, torch.Tensor]:
        self._begin()
        slot = self._slots[0]
        if not slot.works:
            raise TransportError(f"{self.name}: a message is wanted after the last one")
        self._wait(slot)
        return unpack_header(slot.header, self.elements, self.name, self.dtype), slot.tensor

    def release(self) -> None:
        self._post(self._slots[0])
        self._slots.rotate(-1)

    def stop(self) -> None:
        self._begin()
        for slot in self._slots:
            self._wait(slot)


def make_groups(world_size: int) -> list[Any]:
    """One communicator per directed edge: between two ranks, a send and a receive that share one serialise.

    Collective: all ranks call it, and then ``warm_up``. Edge k leads from rank k to the next one.
    """
    return [dist.new_group([k, (k + 1) % world_size]) for k in range(world_size)]


def warm_up(groups: Sequence[Any], rank: int, device: torch.device) -> None:
    """Makes a first exchange over every edge, so that connecting costs no unit later. Collective. Raises PeerLost.

    It is made on the CPU and, with a CUDA ``device``, there too. Edge by edge in one order on all ranks: making an
    NCCL communicator waits for both of its ranks, so two ranks that each began with their own sending edge would wait
    for each other.
    """
    world_size = len(groups)
    places = [torch.device("cpu")] + ([device] if device.type != "cpu" else [])
    for edge, group in enumerate(groups):
        after = (edge + 1) % world_size
        if rank not in (edge, after):
            continue
        for place in places:
            tensor = torch.ones(1, device=place)
            function, peer = (dist.isend, after) if rank == edge else (dist.irecv, edge)
            name = f"warm-up of edge {edge} -> {after}"
            guard(name, guard(name, function, tensor, peer, group=group).wait)
