"""Edges between ranks, over torch.distributed: headers from CPU to CPU, tensors too or, between cards, over NCCL.

A transfer that NCCL was told of holds the device until the other end is told of it too, and whatever waits for the
whole device (a capture, a module that is loaded, memory that is given back) waits for that. Hence one rule, which
``schedule.drains`` proves to be enough: **a transfer is posted only when both of its ends will be, whatever the host
threads of the two ranks do.** A sender posts when it has a credit, that is when the receiver has a free buffer; a
receiver posts when the header says that the sender has, on a thread of its own.

A transfer that waits for its data or its buffer would hold multiprocessors as well, and the host is a unit or more
ahead of the device. So posts and credits are themselves made when the device is there: by threads that wait for events.

gloo needs care (measured, not guessed): a dropped send handle loses the message, a dtype mismatch and a too large
receive buffer are silent, a too small one aborts the process. Hence retained handles, lengths of messages that both
ends know from the schedule, and a header with a checksum before every tensor.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dualparal.distributed.after_device import AfterDevice, event_on
from dualparal.distributed.edges import fill
from dualparal.distributed.messages import (
    FIELDS,
    Header,
    Kind,
    Lengths,
    TransportError,
    guard,
    pack_header,
    unpack_header,
)
from dualparal.distributed.private import host_backend
from dualparal.schedule.actions import Unit

# A consumer may pause for as long as it likes, and all ranks with it. Who is gone is seen at once; who lives and does
# nothing is the supervisor's to notice.
_PATIENCE = timedelta(days=365)
# Thread blocks of NCCL's transfers on each edge. More would only take multiprocessors from the layers: a message is
# some tens of MB against a unit of tens of milliseconds.
_MAX_CTAS = 4
_DATA_BACKENDS = {"cuda": "nccl"}  # by type of device; elsewhere tensors go with the headers
_CREDIT, _LAST_CREDIT = 1, 2


class EdgeGroups(NamedTuple):
    """The communicators of a directed edge: between two ranks, a send and a receive that share one serialise.

    Attributes:
        control: gloo, for headers and credits.
        data: for tensors; on the CPU the same one.
    """

    control: Any
    data: Any


class _Transfer(NamedTuple):
    """A message under way: its header and its tensor, with the handles of their transfers."""

    header: torch.Tensor  # int64 [10], CPU
    buffer: torch.Tensor  # flat, on the device
    works: list[Any]


class _End:
    """The common part of both ends.

    Args:
        name: for error messages.
        peer: the rank at the other end.
        groups: the edge's own communicators, see ``make_groups``.
        lengths: of the messages, the same at both ends.
        depth: number of buffers at either end.
        messages: number of messages at most; None: no end.
        dtype, device: of the tensors.
    """

    def __init__(
        self,
        name: str,
        peer: int,
        groups: EdgeGroups,
        lengths: Lengths,
        depth: int,
        messages: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name, self.waited = name, 0.0
        self._peer, self._groups, self._messages = peer, groups, messages
        self._lengths, self._dtype, self._device = lengths, dtype, device
        self._later = AfterDevice(name, device)
        # Transfers are posted there: they wait for the current stream, and the layers' has the next unit on it.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers = [torch.empty(lengths.most, dtype=dtype, device=device) for _ in range(depth)]
        self._credits_left = None if messages is None else max(0, messages - depth)  # still to be said; None: no end

    def _beside(self) -> AbstractContextManager[Any]:
        """The context of the stream on which transfers are posted."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class SendEdge(_End):
    """The sending end. It sends when the receiver has a free buffer, which bounds the depth."""

    def __init__(self, *common: Any) -> None:
        super().__init__(*common)
        self.remaining = self._messages
        self._slots = deque(_Transfer(torch.empty(FIELDS, dtype=torch.int64), buffer, []) for buffer in self._buffers)
        self._stopping: list[Any] = []  # header and handle of the last message
        self._credits = len(self._slots)
        self._credit = torch.zeros(1, dtype=torch.int64)
        self._asked: Any = None  # handle of the credit that comes next
        self._ask()

    def can_send(self) -> bool:
        return True  # waiting happens in send

    def send(self, header: Header, tensor: torch.Tensor | None, mark: torch.Tensor | None = None) -> None:
        begin = time.perf_counter()
        while not self._credits:
            self._take_credit()
        slot = self._slots[0]
        self._wait(slot.works)
        self.waited += time.perf_counter() - begin
        self._credits -= 1
        message = slot.buffer[: self._lengths.of(header.unit)]
        slot.header.copy_(pack_header(header, len(message), self._dtype))
        if tensor is not None:
            fill(self.name, message, tensor, mark)
        self._later.call(event_on(self._device), partial(self._post, slot, message))
        self._slots.rotate(-1)
        if self.remaining is not None:
            self.remaining -= 1

    def stop(self) -> None:
        if self.remaining == 0:
            return  # the other end listens no more
        unit = Unit(0, 0, 0)
        header = pack_header(Header(Kind.STOP, unit, 0), self._lengths.of(unit), self._dtype)
        self._credits_left = None
        self._ask()
        self._stopping = [header]
        self._later.call(None, partial(self._isend, header, self._groups.control, self._stopping))

    def finish(self) -> None:
        self._later.finish()
        if self._stopping:
            while self._take_credit() != _LAST_CREDIT:
                pass
            self._wait(self._stopping[1:])
        for slot in self._slots:
            self._wait(slot.works)

    def _post(self, slot: _Transfer, message: torch.Tensor) -> None:
        """Posts a message. The tensor first, so that it is under way when the header says so; over one group that of
        the header must be the first."""
        parts = [(message, self._groups.data), (slot.header, self._groups.control)]
        with self._beside():
            for tensor, group in parts if self._groups.data is not self._groups.control else reversed(parts):
                self._isend(tensor, group, slot.works)

    def _isend(self, tensor: torch.Tensor, group: Any, works: list[Any]) -> None:
        works.append(guard(self.name, dist.isend, tensor, self._peer, group=group))

    def _ask(self) -> None:
        """Posts the receive of the next credit, if there will be one."""
        if self._asked is None and self._credits_left != 0:
            self._asked = guard(self.name, dist.irecv, self._credit, self._peer, group=self._groups.control)

    def _take_credit(self) -> int:
        guard(self.name, self._asked.wait, _PATIENCE)
        found, self._asked = int(self._credit.item()), None
        self._credits += 1
        if self._credits_left is not None:
            self._credits_left -= 1
        if found != _LAST_CREDIT:
            self._ask()
        return found

    def _wait(self, works: list[Any]) -> None:
        for work in works:
            guard(self.name, work.wait)
        works.clear()


class _Message(NamedTuple):
    header: Header
    slot: int
    work: Any


class ReceiveEdge(_End):
    """The receiving end. A thread hears the headers and posts each tensor's receive, so that it overlaps compute."""

    def __init__(self, *common: Any) -> None:
        super().__init__(*common)
        self._taken = 0
        # A receive waits for the last reader of its buffer alone, not for all that the layers have been given to do.
        # The first reader is whoever had this memory before.
        self._read = [event_on(self._device) for _ in self._buffers]
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(len(self._buffers)):
            self._free.put(slot)
        self._arrived: queue.SimpleQueue[_Message | BaseException] = queue.SimpleQueue()
        self._reading: int | None = None
        self._credits: deque[tuple[torch.Tensor, Any]] = deque()  # said, with their handles
        self._stopped = False
        # Nobody can wake a thread out of gloo: after an error it ends with the process.
        self._listener = threading.Thread(target=self._listen, name=f"dualparal {self.name}", daemon=True)
        self._listener.start()

    def can_receive(self) -> bool:
        return True  # waiting happens in receive

    def receive(self) -> tuple[Header, torch.Tensor]:
        if self._taken == self._messages:
            raise TransportError(f"{self.name}: a message is wanted after the last one")
        begin = time.perf_counter()
        message = self._arrived.get()
        if isinstance(message, BaseException):
            raise message
        self._taken += 1
        if message.header.kind is Kind.STOP:
            self._stopped = True
            return message.header, self._buffers[0]
        guard(self.name, message.work.wait)
        self.waited += time.perf_counter() - begin
        self._reading = message.slot
        return message.header, self._part(message.slot, message.header)

    def release(self) -> None:
        assert self._reading is not None, "nothing to release"
        event = self._read[self._reading] = event_on(self._device)
        self._free.put(self._reading)
        self._reading = None
        if self._credits_left is not None:
            if not self._credits_left:
                return
            self._credits_left -= 1
        self._later.call(event, partial(self._say, _CREDIT))

    def fail(self, error: BaseException) -> None:
        """Makes ``receive`` raise an error of this process; from any thread."""
        self._arrived.put(error)

    def stop(self) -> None:
        while not self._stopped and self._taken != self._messages:
            if self.receive()[0].kind is not Kind.STOP:
                self.release()
        if self._stopped:
            self._later.call(None, partial(self._say, _LAST_CREDIT))

    def finish(self) -> None:
        self._later.finish()
        for _, work in self._credits:
            guard(self.name, work.wait, _PATIENCE)
        self._credits.clear()
        self._listener.join()

    def _say(self, credit: int) -> None:
        if len(self._credits) == len(self._buffers):
            # The message that it paid for has come, so it has left: this waits for nothing.
            guard(self.name, self._credits.popleft()[1].wait)
        said = torch.tensor([credit])
        self._credits.append((said, guard(self.name, dist.isend, said, self._peer, group=self._groups.control)))

    def _listen(self) -> None:
        """Hears every header, and posts the receive of its tensor."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            heard = 0
            while heard != self._messages:
                heard += 1
                header = self._hear()
                if header.kind is Kind.STOP:
                    self._arrived.put(_Message(header, 0, None))
                    return
                self._arrived.put(self._post(header))
        except BaseException as error:
            self._arrived.put(error)

    def _hear(self) -> Header:
        """Waits for the next header. Raises TransportError, PeerLost."""
        fields = torch.empty(FIELDS, dtype=torch.int64)
        work = guard(self.name, dist.irecv, fields, self._peer, group=self._groups.control)
        guard(self.name, work.wait, _PATIENCE)
        return unpack_header(fields, self._lengths, self.name, self._dtype)

    def _part(self, slot: int, header: Header) -> torch.Tensor:
        """The part of a buffer that a message fills."""
        return self._buffers[slot][: self._lengths.of(header.unit)]

    def _post(self, header: Header) -> _Message:
        """Posts the receive of a message whose header has come. Raises TransportError, PeerLost."""
        try:
            slot = self._free.get_nowait()
        except queue.Empty:
            raise TransportError(f"{self.name}: {header} arrives where no buffer is free") from None
        with self._beside():
            if self._stream is not None:
                self._stream.wait_event(self._read[slot])
            tensor = self._part(slot, header)
            work = guard(self.name, dist.irecv, tensor, self._peer, group=self._groups.data)
        return _Message(header, slot, work)


def make_groups(num_stages: int, device: torch.device, places: int = 1) -> list[EdgeGroups]:
    """The communicators of all edges: from each rank to the one of the next stage's same place. A single stage has
    none.

    Collective: all ranks call it, those without a stage too, and then ``warm_up``.

    Args:
        num_stages: stages of the run, N.
        device: this rank's, whose type is that of all.
        places: ranks of each stage, P.
    """
    found = []
    backend = _DATA_BACKENDS.get(device.type)
    for rank in range(num_stages * places if num_stages > 1 else 0):
        ranks = [rank, (rank + places) % (num_stages * places)]
        control = dist.new_group(ranks, backend=host_backend())
        options = _nccl_options() if backend == "nccl" else None
        data = control if backend is None else dist.new_group(ranks, backend=backend, pg_options=options)
        found.append(EdgeGroups(control, data))
    return found


def _nccl_options() -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = _MAX_CTAS
    options.is_high_priority_stream = True  # else a transfer waits for the thread blocks of the layer's kernel
    return options


def warm_up(groups: Sequence[EdgeGroups], rank: int, device: torch.device, places: int = 1) -> None:
    """Makes a first exchange over every edge, so that connecting costs no unit later. Collective. Raises PeerLost.

    Edge by edge in one order on all ranks: making an NCCL communicator waits for both of its ranks, so two ranks that
    each began with their own sending edge would wait for each other.
    """
    for edge, (control, data) in enumerate(groups):
        after = (edge + places) % len(groups)
        if rank not in (edge, after):
            continue
        for group, place in ((control, torch.device("cpu")), (data, device))[: 1 + (data is not control)]:
            tensor = torch.ones(1, device=place)
            function, peer = (dist.isend, after) if rank == edge else (dist.irecv, edge)
            name = f"warm-up of edge {edge} -> {after}"
            guard(name, guard(name, function, tensor, peer, group=group).wait)
