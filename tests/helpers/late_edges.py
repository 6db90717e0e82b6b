"""Both ends of an edge between ranks on the late device: what NCCL does on streams, and who of the hosts knows what.

The host threads of the two ranks are played by one: each has its own knowledge of what the devices have done, and a
header or a credit carries the knowledge of who sent it. A transfer runs on its communicator's stream at either end,
behind the stream on which it was posted, as ProcessGroupNCCL orders it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dualparal.distributed import remote
from dualparal.distributed.after_device import AfterDevice
from dualparal.distributed.messages import Header, Kind, Lengths
from dualparal.distributed.remote import EdgeGroups, ReceiveEdge, SendEdge
from dualparal.schedule.actions import Unit
from late_device import Host, LateDevice, join
from late_runs import mutated

SIZE = 6
CARD = torch.device("cuda", 0)  # of both ranks: what counts here is who waits for whom


class Ranks:
    """Two ranks, each with streams of its own, and what lies between them."""

    def __init__(self, late: LateDevice) -> None:
        self.late = late
        self.hosts: defaultdict[object, Host] = defaultdict(Host)
        self.said: defaultdict[tuple[str, int], deque[Any]] = defaultdict(deque)  # by group and receiving rank
        self.streams: dict[tuple[str, int], Any] = {}
        self.rank = 0
        self.mains = [torch.cuda.Stream(CARD) for _ in range(2)]  # the default stream of each rank's card

    @contextmanager
    def at(self, rank: int, thread: object = "main") -> Iterator[None]:
        """Inside, the host is a thread of a rank."""
        before = self.late.host, self.rank
        host = self.hosts[rank, thread]
        host.streams.setdefault(0, self.mains[rank])
        self.late.host, self.rank = host, rank
        try:
            yield
        finally:
            self.late.host, self.rank = before

    def stream(self, group: str) -> Any:
        """The stream of a communicator at the rank."""
        if (group, self.rank) not in self.streams:
            self.streams[group, self.rank] = torch.cuda.Stream(CARD)
        return self.streams[group, self.rank]

    def isend(self, tensor: torch.Tensor, peer: int, group: str) -> Any:
        if group == "control":
            self.said[group, peer].append((tensor.clone(), dict(self.late.host.known)))
            return SimpleNamespace(wait=lambda *_: None)
        stream, event = self.stream(group), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            wire = tensor.clone()
            event.record(stream)
        self.said[group, peer].append((wire, event))
        return self._work(event)

    def irecv(self, tensor: torch.Tensor, peer: int, group: str) -> Any:
        said, rank = self.said[group, self.rank], self.rank
        if group == "control":

            def wait(*_: Any) -> None:
                found, known = said.popleft()
                tensor.copy_(found)
                join(self.late.host.known, known)

            return SimpleNamespace(wait=wait)
        assert said, f"rank {rank} posts a receive ahead of its message"
        (wire, sent), stream, event = said.popleft(), self.stream(group), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            stream.wait_event(sent)
            tensor.copy_(wire)
            event.record(stream)
        wire.record_stream(stream)
        return self._work(event)

    @staticmethod
    def _work(event: Any) -> Any:
        return SimpleNamespace(wait=lambda *_: torch.cuda.current_stream().wait_event(event))

    def call(self, later: AfterDevice, event: Any, function: Callable[[], None]) -> None:
        """``AfterDevice.call`` on a thread of its own."""
        with self.at(self.rank, later):
            if event is not None:
                event.synchronize()
            function()


def exchange(
    late: LateDevice, depth: int, messages: int, changes: Sequence[tuple[str, str, str]] = ()
) -> list[torch.Tensor]:
    """Sends numbers made by one rank to the other, which works with them. What that makes, on the CPU.

    Args:
        changes: of the edges' source, see ``late_runs.mutated``.
    """
    ranks = Ranks(late)
    unstarted = SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=lambda: None, join=lambda: None))
    functions = SimpleNamespace(isend=ranks.isend, irecv=ranks.irecv)
    with ExitStack() as patches:
        for name, value in (("dist", functions), ("threading", unstarted)):
            patches.enter_context(mock.patch.object(remote, name, value))
        patches.enter_context(mock.patch.object(AfterDevice, "call", lambda *given: ranks.call(*given)))
        for change in changes:
            patches.enter_context(mutated(*change))
        ends = []
        for rank, kind in enumerate((SendEdge, ReceiveEdge)):
            with ranks.at(rank):
                used = torch.ones(1 + SIZE, device=CARD) * 7  # in memory that the buffers may get
                kept = used * 2
                del used
                given = EdgeGroups("control", "data"), Lengths.fixed(1 + SIZE), depth, messages, torch.float32, CARD
                ends.append(kind("edge 0 -> 1", 1 - rank, *given))
                del kept
        sender, receiver = ends
        made = []
        with ranks.at(0):
            number = torch.ones(SIZE, device=CARD)
        for turn in range(messages + depth):
            if turn >= depth:
                with ranks.at(1, "listener"):
                    receiver._arrived.put(receiver._post(receiver._hear()))
                with ranks.at(1):
                    tensor = receiver.receive()[1]
                    made.append(tensor[:-1] * 2 + tensor[-1:])
                    receiver.release()
            if turn < messages:
                with ranks.at(0):
                    number = number * 1.5 + turn
                    mark = number[:1] * 0
                    sender.send(Header(Kind.UNIT, Unit(turn, 0, 0), 0), number, mark)
        for rank, end in enumerate(ends):
            with ranks.at(rank):
                end.finish()
        ends.clear()
        del sender, receiver
        with ranks.at(1):
            return [tensor.cpu() for tensor in made]
