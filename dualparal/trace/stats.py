"""Statistics of a finished run: time, memory, share of idle time."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from dualparal.config.units import GIB
from dualparal.schedule.replay import bubble
from dualparal.schedule.schedule import Schedule
from dualparal.trace.clock import BusyClock

_REPLAY_LIMIT = 100_000  # stage-units: a second or two
_MATTERS = 0.1  # share of a run that is worth a way out
_UNEVEN = 1.2  # times the mean
_BUSY = 0.7  # share in which ranks compute, on average: what is left is start, end and messages


def schedule_bubble(schedule: Schedule) -> float | None:
    """The bubble of a schedule, 0 to 1, every unit taking equally long on every stage; set beside the measured one.

    None for a schedule that has no end, or whose replay would take long. This is the one place to ask a simulator with
    costs of its own instead.
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


class Waits(NamedTuple):
    """Seconds that the host of a rank was blocked: by other ranks, by the decoder, by the consumer of chunks."""

    stages: float = 0.0
    decoder: float = 0.0
    consumer: float = 0.0


@dataclass(frozen=True)
class RankStats:
    """One rank's share of a run."""

    busy: float  # seconds in units
    elapsed: float  # seconds from its first unit to the end
    peak_host: int  # bytes
    peak_device: int  # bytes, 0 on CPU
    waits: Waits

    @classmethod
    def of(cls, clocks: Sequence[BusyClock], device: torch.device, waits: Waits) -> RankStats:
        """Collects the statistics of a rank at the end of a run; waits for its device.

        Args:
            clocks: of the stages on this rank.
            device: the device of the rank.
            waits: of its host. A card waits for messages on its own: there ``stages`` becomes all that is left of the
                time when others are to be waited for.
        """
        for clock in clocks:
            clock.settle()
        started = min((c.started for c in clocks if c.started is not None), default=time.perf_counter())
        on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        busy, elapsed = sum(c.seconds for c in clocks), time.perf_counter() - started
        if device.type == "cuda" and waits.stages > 0:
            waits = waits._replace(stages=max(waits.stages, elapsed - busy - waits.decoder - waits.consumer))
        return cls(busy, elapsed, peak_rss(), on_device, waits)

    def to_list(self) -> list[float]:
        """All numbers as floats, to send to rank 0."""
        return [self.busy, self.elapsed, float(self.peak_host), float(self.peak_device), *self.waits]

    @classmethod
    def from_list(cls, values: list[float]) -> RankStats:
        """Restores the statistics from ``to_list``."""
        return cls(values[0], values[1], int(values[2]), int(values[3]), Waits(*values[4:]))


@dataclass(frozen=True)
class RunStats:
    """Statistics of a finished run; ``summary`` puts them into words."""

    blocks: int
    frames: int
    seconds: float  # from the first unit to the last frame
    first_frame: float | None  # seconds until the first chunk was ready
    ranks: tuple[RankStats, ...]
    schedule_bubble: float | None = None  # what the schedule itself leaves idle, for comparison with ``bubble``
    decoders: tuple[RankStats, ...] = ()  # of ranks that only decode; the others have stages

    @property
    def bubble(self) -> float:
        """Share of the run in which a rank computed no unit, averaged over ranks."""
        if not self.ranks or self.seconds <= 0:
            return 0.0
        return 1 - sum(rank.busy for rank in self.ranks) / (self.seconds * len(self.ranks))

    def summary(self) -> str:
        """One line for people: what was made, what it cost, and what the time went to."""
        memory = ", ".join(f"{(rank.peak_device or rank.peak_host) / GIB:.2f}" for rank in self.ranks + self.decoders)
        first = "-" if self.first_frame is None else f"{self.first_frame:.1f} s"
        rate = self.frames / self.seconds if self.seconds > 0 else 0.0
        blocks = f"{self.blocks} block{'' if self.blocks == 1 else 's'}"
        expected = "" if self.schedule_bubble is None else f" (schedule {100 * self.schedule_bubble:.1f} %)"
        return (
            f"{self.frames} frames in {blocks}, {self.seconds:.1f} s ({rate:.2f} frames/s), "
            f"first frames after {first}, bubble {100 * self.bubble:.1f} %{expected}, peak memory per rank {memory} GiB"
            f"{self._shares()}"
        )

    def _shares(self) -> str:
        """Shares of the time of each rank, and the verdict on them; empty when there was no time."""
        if not self.ranks or self.seconds <= 0:
            return ""
        rows = "; ".join(
            "/".join(f"{100 * part / self.seconds:.0f}" for part in (rank.busy, *rank.waits)) for rank in self.ranks
        )
        if self.decoders:
            rows += "; decoding " + ", ".join(f"{100 * rank.busy / self.seconds:.0f}" for rank in self.decoders)
        return f". Computing/waiting for stages/decoder/consumer in %, by rank: {rows}. {self.verdict()}"

    def verdict(self) -> str:
        """A sentence that names the limit of the run, and the way out."""
        shares = [rank.busy / self.seconds for rank in self.ranks]
        waits, mean = self.ranks[0].waits, sum(shares) / len(shares)
        busiest = max(range(len(shares)), key=lambda rank: shares[rank])
        if max(waits.decoder, waits.consumer) >= _MATTERS * self.seconds:
            if waits.decoder >= waits.consumer:
                return "Bound by the decoder: decode on more ranks, in place, or in 16 bits, or make a smaller picture."
            return "Bound by the consumer of the chunks: take them faster, on a thread of its own."
        if shares[busiest] >= _UNEVEN * mean:
            return (
                f"Bound by rank {busiest}, which computes {shares[busiest] / mean:.1f} times as long as the mean: give "
                "its stage fewer layers."
            )
        if mean >= _BUSY or len(shares) == 1:
            return "Bound by computing: use more stages, fewer steps or a smaller picture."
        if self.schedule_bubble is not None and self.bubble - self.schedule_bubble < _MATTERS:
            return "Bound by the schedule's own bubble: make a longer video, several at once, or use fewer stages."
        return "Bound by waits between stages: use a faster link, fewer stages, or larger blocks."
