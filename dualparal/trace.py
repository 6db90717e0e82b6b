"""What a run cost: busy time per stage, peak memory per rank, and the numbers of the closing line."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

import torch


class BusyClock:
    """Adds up the time between enter and exit; on CUDA the time of the device, read without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.started: float | None = None  # wall time of the first entry
        self._entered = 0.0
        self._begin: torch.cuda.Event | None = None
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        self._entered = time.perf_counter()
        if self.started is None:
            self.started = self._entered
        if self.cuda:
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.cuda:
            self.seconds += time.perf_counter() - self._entered
            return
        assert self._begin is not None
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._pairs.append((self._begin, end))
        while self._pairs and self._pairs[0][1].query():
            begin, finished = self._pairs.popleft()
            self.seconds += begin.elapsed_time(finished) / 1000

    def settle(self) -> None:
        """Waits for what is still running on the device, at the end of a run."""
        for begin, end in self._pairs:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        self._pairs.clear()


def peak_rss() -> int:
    """Largest resident size of this process so far, bytes."""
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

    @property
    def bubble(self) -> float:
        """Share of the run in which a rank computed no unit, averaged over ranks."""
        if not self.ranks or self.seconds <= 0:
            return 0.0
        return 1 - sum(rank.busy for rank in self.ranks) / (self.seconds * len(self.ranks))

    def summary(self) -> str:
        """One line for people."""
        memory = ", ".join(f"{(rank.peak_device or rank.peak_host) / 2**30:.2f}" for rank in self.ranks)
        first = "-" if self.first_frame is None else f"{self.first_frame:.1f} s"
        rate = self.frames / self.seconds if self.seconds > 0 else 0.0
        blocks = f"{self.blocks} block{'' if self.blocks == 1 else 's'}"
        return (
            f"{self.frames} frames in {blocks}, {self.seconds:.1f} s ({rate:.2f} frames/s), "
            f"first frames after {first}, bubble {100 * self.bubble:.1f} %, peak memory per rank {memory} GiB"
        )
