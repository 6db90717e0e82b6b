"""A machine in virtual time, for ``launch.supervisor``: a clock, processes that are objects, and pipes of bytes.

Nothing here waits or starts anything. The parent's calls let time pass, and in it the events of the ranks happen; so
one thread plays all of them, in an order that a seed decides.
"""

from __future__ import annotations

import contextlib
import heapq
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from virtual_effects import START


class World:
    """The clock and what will happen. Every random choice comes from ``rng``."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.now = rng, START
        self.log: list[tuple[float, str]] = []
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()

    def note(self, text: str) -> None:
        self.log.append((self.now - START, text))

    def at(self, when: float, do: Callable[[], object]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), do))

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        self.at(self.now + seconds, do)

    def advance(self, until: float, ready: Callable[[], bool] = lambda: False) -> bool:
        """Lets time pass until ``ready()``, which is asked after every event; true if it was."""
        while not ready():
            if not self._events or self._events[0][0] > until:
                self.now = max(self.now, until)
                return False
            when, _, do = heapq.heappop(self._events)
            self.now = max(self.now, when)
            do()
        return True

    def step_clock(self, seconds: float) -> None:
        """Steps the clock for all: the machine was suspended, and nobody saw that time."""
        self.note(f"the machine sleeps for {seconds:.2f} s")
        self.now += seconds
        self._events = [(when + seconds, number, do) for when, number, do in self._events]


class StatusPipe:
    """Bytes from a rank to the parent.

    Attributes:
        capacity: bytes; more than that, and a line is refused.
        held_until: until then the parent sees nothing of it: a partition.
        told: lines that went in.
    """

    def __init__(self, world: World, capacity: int) -> None:
        self.world, self.capacity = world, capacity
        self.held_until = 0.0
        self.told = 0
        self.closed = self.forgotten = False
        self._data = bytearray()

    def room(self) -> bool:
        return self.capacity - len(self._data) >= 4096

    def write(self, line: bytes) -> None:
        if len(self._data) + len(line) > self.capacity:
            raise BlockingIOError
        self._data += line
        self.told += 1

    @property
    def readable(self) -> bool:
        return bool(self._data or self.closed) and not self.forgotten and self.world.now >= self.held_until

    def read(self, most: int) -> bytes:
        if not self.readable:
            raise BlockingIOError
        data = bytes(self._data[:most])
        del self._data[:most]
        return data

    def hold(self, seconds: float) -> None:
        self.held_until = max(self.held_until, self.world.now + seconds)
        self.world.at(self.held_until, lambda: None)  # so that who waits for it looks again


class Hang(BaseException):
    """Virtual time goes on, and the parent does not end."""


class ParentKilled(BaseException):
    """The parent is gone: no line of it runs any more."""


class Process:
    """A rank as its parent has it (``launch.machine.Child``); what it does is in ``virtual_ranks``.

    Attributes:
        code, ended: its exit code, as in subprocess, and the time of its end; the parent may see it a little later.
        helper: a process that it has started is alive.
        killed_by_parent: its end is the supervisor's doing.
        on_stop, on_orphaned, on_end: called when the parent writes, when the parent is gone, and at its end.
    """

    def __init__(self, world: World, number: int, capacity: int) -> None:
        self.world, self.pid = world, number
        self.pipe = StatusPipe(world, capacity)
        self.code: int | None = None
        self.ended = self._seen_at = float("inf")
        self.helper = False
        self.killed_by_parent = self._kill_sent = False
        self.on_stop: Callable[[bytes], object] = lambda data: None
        self.on_orphaned: Callable[[], object] = lambda: None
        self.on_end: Callable[[], object] = lambda: None
        self.machine: VirtualMachine | None = None

    @property
    def alive(self) -> bool:
        return self.code is None

    def end(self, code: int) -> None:
        """Ends it: its pipes close, and a moment later its parent can see how."""
        if self.code is not None:
            return
        self.code, self.ended = code, self.world.now
        self._seen_at = self.world.now + self.world.rng.choice((0.0, 0.002, 0.02))
        self.pipe.closed, self.pipe.held_until = True, 0.0  # what is in it is there to read
        self.world.note(f"rank {self.pid} ends with {code}")
        self.on_end()

    def step_clock(self, seconds: float) -> None:
        """Moves what is to come, with the clock."""
        self._seen_at += seconds
        self.pipe.held_until += seconds

    def _ask(self) -> None:
        assert self.machine is not None
        self.machine.spend()

    def poll(self) -> int | None:
        self._ask()
        return self.code if self.world.now >= self._seen_at else None

    def read(self, most: int) -> bytes:
        self._ask()
        return self.pipe.read(most)

    def write(self, data: bytes) -> None:
        self._ask()
        if not self.alive:
            raise BrokenPipeError
        self.world.after(0.001, lambda: self.on_stop(data))

    def signal_group(self, number: int) -> None:
        self._ask()
        if not self.alive and not self.helper:
            raise ProcessLookupError
        assert number == signal.SIGKILL and self.machine is not None
        self.helper = False
        if self.alive and not self._kill_sent:
            self._kill_sent = True
            self.machine.decided()
            self.world.after(self.world.rng.choice((0.0, 0.01, 0.3)), self._kill)

    def _kill(self) -> None:
        self.killed_by_parent = self.alive
        self.end(-signal.SIGKILL)

    def close(self) -> None:
        assert self.machine is not None
        if not self.machine.killed:
            self.on_orphaned()


class VirtualMachine:
    """What a supervisor asks of its machine (``launch.machine.Machine``).

    Args:
        make: makes the process of a rank.
        cost: seconds that a call of the parent's may take.

    Attributes:
        decided_at: when the supervisor first sent SIGKILL to a living rank; infinite: not yet.
        away: seconds in which the parent was stopped.
        killed: it was killed.
        ends_by: a time after which it can only be a hang.
    """

    def __init__(self, world: World, make: Callable[[int], Process], cost: float) -> None:
        self.world, self._make, self._cost = world, make, cost
        self.children: list[Process] = []
        self.decided_at = float("inf")
        self.away, self._away_until = 0.0, 0.0
        self.killed, self.ends_by = False, float("inf")
        self._take: Callable[[int], object] | None = None

    def decided(self) -> None:
        self.decided_at = min(self.decided_at, self.world.now)

    def pause(self, seconds: float) -> None:
        """Stops the parent for a time; the ranks go on."""
        self.world.note(f"the parent is stopped for {seconds:.2f} s")
        self.away += seconds
        self._away_until = max(self._away_until, self.world.now) + seconds

    def kill(self) -> None:
        self.world.note("the parent is killed")
        self.killed = True
        for child in self.children:
            child.on_orphaned()

    def signal(self, number: int) -> bool:
        """Sends the parent a signal that ends a run; true if it was there to take it."""
        if self._take is not None and not self.killed:
            self.world.note(f"the parent gets {signal.Signals(number).name}")
            self._take(number)
        return self._take is not None and not self.killed

    def _let_pass(self, seconds: float, ready: Callable[[], bool] = lambda: False) -> bool:
        """Lets time pass for the parent, which may be stopped or killed in it. Raises Hang."""
        if self.world.now > self.ends_by:
            raise Hang("the supervisor does not end")
        found = self.world.advance(self.world.now + seconds, lambda: self.killed or ready())
        while self.world.now < self._away_until and not self.killed:
            self.world.advance(self._away_until, lambda: self.killed)
        if self.killed:
            raise ParentKilled
        return found

    def spend(self) -> None:
        """Takes the time of a call."""
        self._let_pass(self.world.rng.random() * self._cost)

    def now(self) -> float:
        if self.killed:
            raise ParentKilled
        return self.world.now

    def sleep(self, seconds: float) -> None:
        self._let_pass(seconds)

    def wait(self, seconds: float) -> bool:
        return self._let_pass(seconds, lambda: any(child.pipe.readable for child in self.children))

    def start(self, argv: Sequence[str], env: Mapping[str, str]) -> Process:
        self.spend()
        child = self._make(int(env["RANK"]))
        child.machine = self
        self.children.append(child)
        return child

    def forget(self, child: Any) -> None:
        child.pipe.forgotten = True

    @contextlib.contextmanager
    def signals(self, take: Callable[[int], object]) -> Iterator[None]:
        self._take = take
        try:
            yield
        finally:
            self._take = None

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        yield Path("nowhere")
