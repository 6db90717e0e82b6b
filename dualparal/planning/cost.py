"""Arithmetic, passes over memory and seconds of every unit on a card. No torch. Predictions: stated rates of the cards
times assumed shares of them (``devices``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dualparal.planning.devices import Device, Link
from dualparal.planning.memory import edge_elements
from dualparal.planning.workload import Workload
from dualparal.schedule.actions import DECODE_BOUND, Unit
from dualparal.schedule.replay import Costs
from dualparal.schedule.schedule import Schedule

# Passes over a unit's hidden states in a layer with fused kernels, its small tables left out: bench/count_passes.py.
PASSES = 20
# Passes over C frames of keys and values to lend and to borrow them, per neighbour: bench/count_passes.py.
FEATURE_PASSES = 4
# A sampler step: Python of diffusers' UniPC on the host, ahead of which stage 0 cannot run. Assumption.
UPDATE_SECONDS = 1.5e-3


class Arithmetic(NamedTuple):
    """Work of one layer (or a whole stage) for one unit.

    Attributes:
        attention: FLOPs (multiply-adds times two) of self-attention and attention to the text.
        linear: FLOPs of matrix products in the model's dtype.
        moved: bytes of passes over memory.
        linear_8bit: FLOPs of matrix products in fp8.
    """

    attention: float
    linear: float
    moved: float
    linear_8bit: float = 0.0

    def seconds(self, device: Device) -> float:
        """Seconds of the work on a card, one kind after the other."""
        linear = self.linear / device.linear + self.linear_8bit / device.linear_8bit
        return self.attention / device.attention + linear + self.moved / device.copy


def layer_arithmetic(work: Workload, queries: int, keys: int, borrowed: int = 0, lent: int = 0) -> Arithmetic:
    """Work of one layer; of an average one, where the linears of some have 8 bits.

    Args:
        work: the video and the model.
        queries: own tokens.
        keys: tokens attended to, borrowed ones included.
        borrowed: tokens of neighbours' keys that are copied in.
        lent: own tokens whose keys are copied out.
    """
    h, linear = work.model.inner, float(queries * work.model.linear_flops)
    share = sum(map(work.engine.linear_8bit.covers, range(work.model.num_layers))) / work.model.num_layers
    moved = work.itemsize * h * (PASSES * queries + FEATURE_PASSES * borrowed + FEATURE_PASSES / 2 * lent)
    quantised = share * (work.itemsize + 1) * queries * work.model.linears.inputs  # read as they are, written in 8 bits
    return Arithmetic(
        4.0 * queries * (keys + work.text_tokens) * h, (1 - share) * linear, moved + quantised, share * linear
    )


def unit_arithmetic(work: Workload, schedule: Schedule, unit: Unit) -> Arithmetic:
    """Work of one layer for one unit."""
    queries = len(work.layout.window(unit.block, schedule.refreshes(unit))) * work.tokens
    lent = work.blocks.context_frames * work.tokens
    reads, writes = len(schedule.reads(unit)), len(schedule.writes(unit))
    return layer_arithmetic(work, queries, queries + reads * lent, reads * lent, writes * lent)


class Costing:
    """Seconds of everything in a schedule, for ``simulate``.

    Args:
        work: the video and the model.
        schedule: the order of work.
        split: layers of every stage.
        devices: one per stage.
        links: edge k leads from stage k to the next one, the last back to stage 0.
        decode_on: a card of its own for the VAE; None: stage 0's, beside its units.
    """

    def __init__(
        self,
        work: Workload,
        schedule: Schedule,
        split: Sequence[int],
        devices: Sequence[Device],
        links: Sequence[Link],
        decode_on: Device | None = None,
    ) -> None:
        self.work, self.schedule, self.split, self.devices, self.links = work, schedule, split, devices, links
        self.decode_on = decode_on
        self._kinds: dict[Unit, tuple[int, int, int]] = {}
        self._seconds: dict[tuple[int, tuple[int, int, int]], float] = {}

    @property
    def costs(self) -> Costs:
        """The durations for a replay."""
        return Costs(
            run=self.run,
            transfer=self.transfer,
            latency=lambda edge: self.links[edge].latency,
            update=UPDATE_SECONDS,
            decode=self.decode,
            decode_shares=self.decode_on is None,
        )

    def run(self, stage: int, unit: Unit) -> float:
        """Seconds of a unit on a stage."""
        kind = self._kinds.get(unit)
        if kind is None:  # all that its cost depends on
            frames = len(self.work.layout.window(unit.block, self.schedule.refreshes(unit)))
            kind = frames, len(self.schedule.reads(unit)), len(self.schedule.writes(unit))
            self._kinds[unit] = kind
        seconds = self._seconds.get((stage, kind))
        if seconds is None:
            seconds = self._seconds[stage, kind] = self._run(stage, unit)
        return seconds

    def _run(self, stage: int, unit: Unit) -> float:
        device = self.devices[stage]
        seconds = self.split[stage] * unit_arithmetic(self.work, self.schedule, unit).seconds(device)
        frames = len(self.work.layout.window(unit.block, self.schedule.refreshes(unit)))
        return seconds + self.ends(stage, frames, device)

    def ends(self, stage: int, frames: int, device: Device) -> float:
        """Seconds that the first stage (embedding) and the last one (head) spend besides their layers.

        Args:
            stage: number of the stage.
            frames: latent frames of the unit.
            device: the stage's card.
        """
        model, tokens = self.work.model, frames * self.work.tokens
        first, last = stage == 0, stage == len(self.split) - 1
        flops = 2.0 * tokens * model.inner * model.patch**2 * (first * model.in_channels + last * model.out_channels)
        moved = self.work.itemsize * tokens * model.inner * (2 * first + 3 * last)
        return Arithmetic(0.0, flops, moved).seconds(device)

    def transfer(self, edge: int, unit: Unit) -> float:
        """Seconds of a message on an edge, without latency.

        Buffers travel whole: the largest window's hidden states, or the largest block's velocity.
        """
        elements = edge_elements(self.work)[edge == len(self.split) - 1]
        return elements * self.work.itemsize / self.links[edge].bandwidth

    def decode(self, block: int) -> float:
        """Seconds of decoding a block."""
        device = self.decode_on or self.devices[0]
        rate = device.conv if self.work.decode_itemsize == 4 else device.conv_16bit
        return self.work.layout.kept_frames(block) * self.work.decoder.flops(self.work.pixels) / rate


def balance(costs: Sequence[float], extra: Sequence[float], most: Sequence[int], num_layers: int) -> list[int] | None:
    """Layers per stage so that the slowest stage is as fast as can be; every stage has one at least.

    Giving every layer to the stage that then ends first is best, because all layers cost the same.

    Args:
        costs: seconds of a layer on each stage.
        extra: seconds of each stage besides its layers.
        most: layers that fit on each stage.
        num_layers: layers of the model.

    Returns:
        Layers of every stage; None when they do not fit.
    """
    if num_layers < len(costs) or sum(most) < num_layers or min(most) < 1:
        return None
    split = [1] * len(costs)
    for _ in range(num_layers - len(costs)):
        open_ = [k for k in range(len(costs)) if split[k] < most[k]]
        best = min(open_, key=lambda k: ((split[k] + 1) * costs[k] + extra[k], k))
        split[best] += 1
    return split


def closed_form(
    schedule: Schedule, stages: Sequence[float], hop: float, decode: float = 0.0, decode_shares: bool = True
) -> tuple[float, float]:
    """Returns (seconds, seconds to the first frame) without a replay, for units that all cost the same.

    An iteration takes the slowest stage's time for all of its units, or a whole round of the pipe when there are too
    few of them: a block's next step needs its last one, and with ``paper`` that of the block before, which comes later
    in an iteration. From the T-th on blocks are decoded, in the time that stage 0 has to spare (``decode_shares``) or
    beside it, and when ``DECODE_BOUND`` of them wait, everything waits.

    Args:
        schedule: a finite one.
        stages: seconds of a unit on each stage.
        hop: seconds of all edges together.
        decode: seconds of a block.
        decode_shares: decoding takes its seconds from stage 0's card.
    """
    slowest, around = max(stages), sum(stages) + hop
    least = around + (schedule.branches * schedule.policy.blocks_awaited - 1) * slowest
    now = backlog = first = 0.0
    for iteration, count in enumerate(_in_flight_counts(schedule)):
        units = count * schedule.branches
        duration = max(units * slowest, least)
        backlog = max(0.0, backlog - (duration - units * stages[0] if decode_shares else duration))
        now += duration
        if iteration >= schedule.num_steps - 1 and (iteration - schedule.num_steps + 1) % schedule.gap == 0:
            first = first or now + decode
            backlog += decode
            wait = max(0.0, backlog - DECODE_BOUND * decode)
            now, backlog = now + wait, backlog - wait
    return now + backlog, first


def _in_flight_counts(schedule: Schedule) -> list[int]:
    counts = []
    iteration = 0
    while blocks := schedule.in_flight(iteration):
        counts.append(len(blocks))
        iteration += 1
    return counts
