"""Clocks of a stage's busy time, on the host and, on CUDA, on the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import NamedTuple

import torch

from dualparal.schedule.actions import Action, Op
from dualparal.trace.timeline import HOST, STAGE, Track

_UNSEEN: AbstractContextManager[None] = nullcontext()


class _Moment(NamedTuple):
    """A point in time on the host and, on CUDA, in the current stream."""

    host: float
    event: torch.cuda.Event | None


class _Span(NamedTuple):
    """A span from one moment to another, of which the device may have reached neither."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    busy: bool
    action: Action | None  # for the timeline
    error: str | None


class DeviceTime:
    """Host seconds of CUDA events that are done. Waits for the device once, when made, and never again.

    The two clocks drift apart by some millionths; over hours that shows as milliseconds.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()
        self._event.synchronize()
        self._seconds = time.perf_counter()

    def seconds(self, event: torch.cuda.Event) -> float:
        """The ``time.perf_counter`` at which the device reached an event that is done and was made with timing."""
        since = self._event.elapsed_time(event) / 1000
        if since < 60:
            return self._seconds + since
        # elapsed_time is milliseconds in float32: of hours it would keep no more than milliseconds.
        self._event, self._seconds = event, self._seconds + since
        return self._seconds


class BusyClock:
    """Adds up the time between enter and exit; on CUDA the time of the device, read without waiting for it.

    Args:
        device: of the stage.
        track: gets the spans of the actions; None: nobody wants a timeline. On CUDA those are the device's, in the
            order of its stream, and the host's besides in a row of their own; a RECV on the device is its wait for the
            message.

    Attributes:
        seconds: busy time so far; on CUDA of the units that are known to be done.
        started: ``time.perf_counter`` of the first entry; None: not entered yet.
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
        """A context around an action, for the timeline. The span of a RUN is that of its unit, which enters this clock.

        Args:
            action: the action.
            waited: () -> seconds that the stage has been blocked by others so far.
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
        """Waits for all that is still running on the device, at the end of a run, and adds it up."""
        while self._spans:
            self._spans[0].end.synchronize()
            self._take(self._spans.popleft())
