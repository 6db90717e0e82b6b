"""What a run cost: busy time per stage, peak memory per rank, and the numbers of the closing line."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from dualparal.config.units import GIB
from dualparal.schedule.actions import Action, Op
from dualparal.schedule.replay import bubble
from dualparal.schedule.schedule import Schedule
from dualparal.timeline import HOST, STAGE, Track

_UNSEEN: AbstractContextManager[None] = nullcontext()
_REPLAY_LIMIT = 100_000  # stage-units: a second or two


class _Moment(NamedTuple):
    """Now, on the host and, on CUDA, in the current stream."""

    host: float
    event: torch.cuda.Event | None


class _Span(NamedTuple):
    """From one moment to another, of which the device may have reached neither."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    busy: bool
    action: Action | None  # for the timeline
    error: str | None


class DeviceTime:
    """Host seconds of CUDA events that are done. Waits for the device once, here, and never again.

    The two clocks drift apart by some millionths; over hours that shows as milliseconds.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()
        self._event.synchronize()
        self._seconds = time.perf_counter()

    def seconds(self, event: torch.cuda.Event) -> float:
        since = self._event.elapsed_time(event) / 1000
        if since < 60:
            return self._seconds + since
        # elapsed_time is milliseconds in float32: of hours it would keep no more than milliseconds.
        self._event, self._seconds = event, self._seconds + since
        return self._seconds


class BusyClock:
    """Adds up the time between enter and exit; on CUDA the time of the device, read without waiting for it.

    track: where the actions leave their spans, when somebody wants a timeline. On CUDA those are the device's, in the
    order of its stream, and the host's besides in a row of their own; a RECV on the device is its wait for the message.
    """

    def __init__(self, device: torch.device, track: Track | None = None) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.started: float | None = None  # wall time of the first entry
        self.track = track
        self._action: Action | None = None
        self._entered = _Moment(0.0, None)
        self._spans: deque[_Span] = deque()
        self._device_time = DeviceTime() if self.cuda and track is not None else None

    def on(self, action: Action, waited: Callable[[], float]) -> AbstractContextManager[None]:
        """Around an action, for the timeline. The span of a RUN is that of its unit, which enters this clock.

        waited: seconds that the stage has been blocked by others so far.
        """
        if self.track is None:
            return _UNSEEN
        self._action = action
        return _UNSEEN if action.op is Op.RUN else self._watch(action, waited)

    def __enter__(self) -> None:
        self._entered = self._now()
        if self.started is None:
            self.started = self._entered.host

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._add(self._entered, True, self._action, 0.0, None if kind is None else kind.__name__)

    @contextmanager
    def _watch(self, action: Action, waited: Callable[[], float]) -> Iterator[None]:
        before, begin, error = waited(), self._now(), None
        try:
            yield
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            self._add(begin, False, action, waited() - before, error)

    def _now(self) -> _Moment:
        event = None
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return _Moment(time.perf_counter(), event)

    def _add(self, begin: _Moment, busy: bool, action: Action | None, waited: float, error: str | None) -> None:
        end = self._now()
        if not self.cuda and busy:
            self.seconds += end.host - begin.host
        if self.track is not None and action is not None:
            self.track.action(HOST if self.cuda else STAGE, action, begin.host, end.host, waited, error)
        if begin.event is not None and end.event is not None:
            self._spans.append(_Span(begin.event, end.event, busy, action, error))
            while self._spans and self._spans[0].end.query():
                self._take(self._spans.popleft())

    def _take(self, span: _Span) -> None:
        if span.busy:
            self.seconds += span.begin.elapsed_time(span.end) / 1000
        if self.track is not None and self._device_time is not None and span.action is not None:
            begin, end = self._device_time.seconds(span.begin), self._device_time.seconds(span.end)
            self.track.action(STAGE, span.action, begin, end, error=span.error)

    def settle(self) -> None:
        """Waits for what is still running on the device, at the end of a run."""
        while self._spans:
            self._spans[0].end.synchronize()
            self._take(self._spans.popleft())


def schedule_bubble(schedule: Schedule) -> float | None:
    """What the closing line sets beside the measured bubble: that of the schedule, every unit taking equally long
    on every stage. None for a schedule that has no end, or whose replay would take long.

    The one place to ask a simulator with costs of its own instead.
    """
    if schedule.num_units is None or schedule.num_units * schedule.num_stages > _REPLAY_LIMIT:
        return None
    return bubble(schedule)


def peak_rss() -> int:
    """Largest resident size of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says outlives fork and exec: it may be the size of who started this process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class RankStats:
    """One rank's share of a run."""

    busy: float  # seconds in units
    elapsed: float  # seconds from its first unit to the end
    peak_host: int  # bytes
    peak_device: int  # bytes, 0 on CPU

    @classmethod
    def of(cls, clocks: list[BusyClock], device: torch.device) -> RankStats:
        for clock in clocks:
            clock.settle()
        started = min((c.started for c in clocks if c.started is not None), default=time.perf_counter())
        on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return cls(sum(c.seconds for c in clocks), time.perf_counter() - started, peak_rss(), on_device)

    def to_list(self) -> list[float]:
        return [self.busy, self.elapsed, float(self.peak_host), float(self.peak_device)]

    @classmethod
    def from_list(cls, values: list[float]) -> RankStats:
        return cls(values[0], values[1], int(values[2]), int(values[3]))


@dataclass(frozen=True)
class RunStats:
    """What a finished run tells: see ``summary``."""

    blocks: int
    frames: int
    seconds: float  # from the first unit to the last frame
    first_frame: float | None  # seconds until the first chunk was ready
    ranks: tuple[RankStats, ...]
    schedule_bubble: float | None = None  # what the schedule itself leaves idle, for comparison with ``bubble``

    @property
    def bubble(self) -> float:
        """Share of the run in which a rank computed no unit, averaged over ranks."""
        if not self.ranks or self.seconds <= 0:
            return 0.0
        return 1 - sum(rank.busy for rank in self.ranks) / (self.seconds * len(self.ranks))

    def summary(self) -> str:
        """One line for people."""
        memory = ", ".join(f"{(rank.peak_device or rank.peak_host) / GIB:.2f}" for rank in self.ranks)
        first = "-" if self.first_frame is None else f"{self.first_frame:.1f} s"
        rate = self.frames / self.seconds if self.seconds > 0 else 0.0
        blocks = f"{self.blocks} block{'' if self.blocks == 1 else 's'}"
        expected = "" if self.schedule_bubble is None else f" (schedule {100 * self.schedule_bubble:.1f} %)"
        return (
            f"{self.frames} frames in {blocks}, {self.seconds:.1f} s ({rate:.2f} frames/s), "
            f"first frames after {first}, bubble {100 * self.bubble:.1f} %{expected}, peak memory per rank {memory} GiB"
        )
