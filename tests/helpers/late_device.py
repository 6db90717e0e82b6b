"""Late device: a stand-in for CUDA streams, events, graphs and the caching allocator, over CPU tensors.

A run is recorded once. Every operation on a tensor "on cuda" is done at once, so that the host sees right values, and
is noted with its stream and with all that must have happened before it: the operations before it in its stream, those
that an event or a host that waited guarantees, and nothing else. ``late_replay`` then does the noted operations again,
in any order that these permit, and compares everything that the host has read; it also looks for accesses that no order
holds apart. Memory is the allocator's: a freed block is overwritten on the stream that it was allocated on, at once or,
where it was recorded on other streams, after what those had been given by then.

Host threads are played by one thread: a task of a pool runs when it is handed in, or as late as somebody waits for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

Clock = dict[int, int]  # by stream: how many of its operations have happened


class HostSync(AssertionError):
    """The host waited for the device where it may not."""


class Ref(NamedTuple):
    """A tensor in a block of the device's memory."""

    block: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def bytes(self) -> tuple[int, int]:
        """The bytes from the first to behind the last element; (0, 0) of no elements."""
        if 0 in self.size:
            return 0, 0
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        return self.offset * self.dtype.itemsize, (last + 1) * self.dtype.itemsize


@dataclass(slots=True)
class Op:
    """An operation on the device. ``function`` None: the block's bytes are gone (freed and given to somebody else)."""

    function: Callable[..., Any] | None
    args: Any
    kwargs: dict[str, Any]
    outs: list[Ref]
    reads: list[Ref]
    writes: list[Ref]
    phase: str
    seen: Any = None  # what the host read: a tensor or a number
    stream: int = -1
    number: int = 0  # in its stream, from 1
    after: Clock = field(default_factory=dict)


class Block:
    """Memory of one storage; dies with the last tensor in it."""

    def __init__(self, device: LateDevice, number: int, stream: Stream, graph: Graph | None) -> None:
        self.device, self.number, self.stream, self.graph = device, number, stream, graph
        self.used_on: set[Stream] = set()

    def __del__(self) -> None:
        self.device.freed(self)


class Stream:
    """A stream of one card."""

    def __init__(self, owner: LateDevice, index: int) -> None:
        self.owner, self.device = owner, torch.device("cuda", index)
        self.number = len(owner.streams)
        self.clock: Clock = {}  # before whatever comes next
        self.graph: Graph | None = None  # being captured
        self.cuda_stream = self.number
        owner.streams.append(self)

    def wait_event(self, event: Event) -> None:
        join(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        join(self.clock, other.clock)

    def synchronize(self) -> None:
        self.owner.host_waits("synchronize of a stream", self.clock)


class Event:
    """An event; the host knows that it has happened only when it has waited for it."""

    def __init__(self, owner: LateDevice, **_: bool) -> None:
        self.owner = owner
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or self.owner.current_stream()).clock)

    def synchronize(self) -> None:
        self.owner.host_waits("synchronize of an event", self.clock)

    def query(self) -> bool:
        known = self.owner.host.known
        return all(known.get(stream, 0) >= number for stream, number in self.clock.items())

    def elapsed_time(self, _: Event) -> float:
        return 1.0


class Graph:
    """A captured graph: its operations, on memory that stays where it is."""

    def __init__(self, owner: LateDevice) -> None:
        self.owner = owner
        self.nodes: list[tuple[Op, Callable[[], None]]] = []

    def replay(self) -> None:
        for op, perform in self.nodes:
            perform()
            self.owner.note(
                Op(op.function, op.args, op.kwargs, op.outs, op.reads, op.writes, self.owner.phase),
                self.owner.current_stream(),
            )


class Host:
    """A host thread: what it knows to have happened, its card, and its streams."""

    def __init__(self) -> None:
        self.known: Clock = {}
        self.card = 0
        self.streams: dict[int, Stream] = {}


class Pool:
    """A ThreadPoolExecutor of one thread, whose tasks run at once or when somebody waits for them."""

    def __init__(self, owner: LateDevice, *_: Any, **__: Any) -> None:
        self.owner, self.host, self.waiting = owner, Host(), list[Task]()

    def submit(self, function: Callable[..., Any], *args: Any) -> Task:
        task = Task(self, function, args, dict(self.owner.host.known))
        self.waiting.append(task)
        if self.owner.chance.random() < self.owner.eagerness:
            self.run_until(task)
        return task

    def run_until(self, last: Task | None) -> None:
        while self.waiting and (last is None or not last.ended):
            self.waiting.pop(0).run()

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        if cancel_futures:
            self.waiting.clear()
        self.run_until(None)


class Task:
    """A future of a ``Pool``."""

    def __init__(self, pool: Pool, function: Callable[..., Any], args: Any, known: Clock) -> None:
        self.pool, self.function, self.args, self.known = pool, function, args, known
        self.ended = False
        self.error: BaseException | None = None
        self.value: Any = None

    def run(self) -> None:
        owner, host = self.pool.owner, self.pool.host
        join(host.known, self.known)
        before, phase = owner.host, owner.phase
        owner.host, owner.phase = host, "task"
        try:
            self.value = self.function(*self.args)
        except BaseException as error:  # as a real future would
            self.error = error
        finally:
            owner.host, owner.phase = before, phase
        self.known, self.ended, self.args = dict(host.known), True, ()

    def done(self) -> bool:
        if not self.ended and self.pool.owner.chance.random() < self.pool.owner.eagerness:
            self.pool.run_until(self)
        if self.ended:
            join(self.pool.owner.host.known, self.known)
        return self.ended

    def result(self) -> Any:
        self.pool.run_until(self)
        join(self.pool.owner.host.known, self.known)
        if self.error is not None:
            raise self.error
        return self.value


class LateDevice:
    """The record of one run, and the cards that it believes to run on.

    Args:
        cards: number of them.
        eagerness: how likely a task runs before somebody waits for it, 0 to 1.
        seed: of that.

    Attributes:
        ops: the operations, in the order in which the host issued them.
        given_back: the ends of blocks that were recorded on other streams than their own.
        phase: what the host is about; a wait in one of ``strict`` raises HostSync.
    """

    def __init__(self, cards: int = 1, eagerness: float = 1.0, seed: int = 0) -> None:
        self.cards, self.eagerness, self.chance = cards, eagerness, random.Random(seed)
        self.streams: list[Stream] = []
        self.defaults = [Stream(self, index) for index in range(cards)]
        self.host = Host()
        self.ops: list[Op] = []
        self.given_back: list[Op] = []
        self.sizes: list[int] = []  # of the blocks, bytes
        self.phase = ""
        self.strict: frozenset[str] = frozenset()
        self.recording = False

    # Time ------------------------------------------------------------------------------------------------------

    def note(self, op: Op, stream: Stream) -> None:
        """Puts an operation into a stream, after all that is known to precede it."""
        join(stream.clock, self.host.known)  # the host had waited for it before it issued this
        op.after = dict(stream.clock)
        op.stream, op.number = stream.number, op.after.get(stream.number, 0) + 1
        stream.clock[stream.number] = op.number
        self.ops.append(op)

    def host_waits(self, what: str, clock: Clock) -> None:
        """The host waits. Raises HostSync where it may not."""
        if self.phase in self.strict:
            raise HostSync(f"{what} in {self.phase!r}")
        join(self.host.known, clock)

    # Memory ----------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, stream: Stream) -> Block:
        self.sizes.append(nbytes)
        return Block(self, len(self.sizes) - 1, stream, stream.graph)

    def freed(self, block: Block) -> None:
        """Lets the next owner have the bytes: the same stream at once, others' work is waited for if recorded."""
        if not self.recording:
            return
        whole = Ref(block.number, torch.uint8, (self.sizes[block.number],), (1,), 0)
        op = Op(None, (), {}, [whole], [], [whole], self.phase)
        if block.graph is not None:
            if block.stream.graph is block.graph:  # inside the capture, whose memory is used again and again
                block.graph.nodes.append((op, lambda: None))
            return
        if not block.used_on:
            self.note(op, block.stream)
            return
        op.after = dict(block.stream.clock)
        for stream in block.used_on:
            join(op.after, stream.clock)
        self.given_back.append(op)  # to whichever stream asks next, once this has happened

    # Cards -----------------------------------------------------------------------------------------------------

    def index(self, device: Any = None) -> int:
        """The number of a card."""
        if isinstance(device, int):
            return device
        found = None if device is None else torch.device(device).index
        return self.host.card if found is None else int(found)

    def current_stream(self, device: Any = None) -> Stream:
        index = self.index(device)
        return self.host.streams.get(index, self.defaults[index])

    @contextmanager
    def on_card(self, device: Any) -> Iterator[None]:
        host, before = self.host, self.host.card
        host.card = self.index(device)
        try:
            yield
        finally:
            host.card = before

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        host, index = self.host, stream.device.index
        before = host.streams.get(index)
        host.streams[index] = stream
        try:
            with self.on_card(stream.device):
                yield
        finally:
            if before is None:
                del host.streams[index]
            else:
                host.streams[index] = before

    def synchronize(self, device: Any = None) -> None:
        for stream in self.streams:
            if stream.device.index == self.index(device):
                self.host_waits("synchronize of the device", stream.clock)

    @contextmanager
    def capture(self, graph: Graph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
        """torch.cuda.graph: without a stream, all captures share the first one's, on whichever card that was."""
        for each in self.streams:
            self.host_waits("a capture", each.clock)
        if stream is None:
            stream = self._capture_stream = getattr(self, "_capture_stream", None) or Stream(self, self.host.card)
        stream.graph = graph
        try:
            with self.on_stream(stream):
                yield
        finally:
            stream.graph = None

    def torch_cuda(self) -> dict[str, Any]:
        """Replacements in ``torch.cuda``."""
        card = SimpleNamespace(total_memory=1 << 36, name="late", major=9, minor=0, multi_processor_count=1)
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: self.cards,
            "current_device": lambda: self.host.card,
            "set_device": lambda device: setattr(self.host, "card", self.index(device)),
            "device": self.on_card,
            "Stream": lambda device=None, **_: Stream(self, self.index(device)),
            "Event": lambda **options: Event(self, **options),
            "current_stream": self.current_stream,
            "default_stream": lambda device=None: self.defaults[self.index(device)],
            "stream": self.on_stream,
            "synchronize": self.synchronize,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.capture,
            "graph_pool_handle": lambda: (0, 0),
            "get_device_properties": lambda _=None: card,
            "get_device_capability": lambda _=None: (9, 0),
            "get_device_name": lambda _=None: card.name,
            "mem_get_info": lambda _=None: (card.total_memory, card.total_memory),
            "max_memory_allocated": lambda _=None: 0,
            "empty_cache": lambda: None,
        }


def join(clock: Clock, other: Clock) -> None:
    """Adds to a clock all that another one knows."""
    for stream, number in other.items():
        if clock.get(stream, 0) < number:
            clock[stream] = number


@contextmanager
def recording(device: LateDevice, pools: Sequence[Any]) -> Iterator[LateDevice]:
    """Inside, ``torch.cuda`` is the device, and the modules' ``ThreadPoolExecutor`` its host threads."""
    from late_tensor import Dispatch, Moves

    patches = [mock.patch.object(torch.cuda, name, value) for name, value in device.torch_cuda().items()]
    patches += [mock.patch.object(module, "ThreadPoolExecutor", lambda *a, **k: Pool(device)) for module in pools]
    before = torch._C._only_lift_cpu_tensors(), torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter would take the shape alone
    device.recording = True
    try:
        for patch in patches:
            patch.start()
        with Dispatch(device) as dispatch, Moves(dispatch):
            yield device
    finally:
        device.recording = False
        torch._C._set_only_lift_cpu_tensors(before[0])
        torch.__future__.set_overwrite_module_params_on_conversion(before[1])
        for patch in reversed(patches):
            patch.stop()
