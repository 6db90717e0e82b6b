"""Arithmetic, passes over memory and seconds of every unit on a card. No torch. Predictions: stated rates of the cards
times assumed shares of them (``devices``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dualparal.planning.devices import Device, Link
from dualparal.planning.workload import Workload
from dualparal.schedule.actions import Unit
from dualparal.schedule.replay import Costs
from dualparal.schedule.schedule import Schedule

# Passes over a unit's hidden states in a layer with fused kernels, its small tables left out: bench/count_passes.py.
PASSES = 20
# Passes over C frames of keys and values to lend and to borrow them, per neighbour: bench/count_passes.py.
FEATURE_PASSES = 4
# Passes over a place's tokens to give queries, keys and values to other places and to take theirs, and to take the
# result: counted in runtime/shares.py, all read and written.
SHARE_PASSES = 14
# Groups of a place's heads in the pipelined form (``runtime.shares.GROUPS``).
SHARE_GROUPS = 4
# The same of features kept in 8 bits, in bytes per number beside one pass in its dtype: a slot's copy reads and writes
# one byte, and the conversion reads or writes another.
PACKED_BYTES = 3
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
        """Seconds of the work on a card, one kind after the other, at the rates of kernels on their own."""
        linear = self.linear / device.linear + self.linear_8bit / device.linear_8bit
        return self.attention / device.attention + linear + self.moved / device.copy

    def in_a_run(self, device: Device) -> float:
        """Seconds of the work on a card within a whole run, where kernels are slower than on their own."""
        return self.seconds(device) / device.efficiency.fused


def layer_arithmetic(work: Workload, queries: int, keys: int, borrowed: int = 0, lent: int = 0) -> Arithmetic:
    """Work of one layer; of an average one, where the linears of some have 8 bits. Where cards share a stage, that of
    the card with the most tokens and heads.

    Args:
        work: the video and the model.
        queries: own tokens, of whole frames where cards share a stage.
        keys: tokens attended to, borrowed ones included.
        borrowed: tokens of neighbours' keys that are copied in.
        lent: own tokens whose keys are copied out.
    """
    window, queries, heads = queries, work.place_tokens(queries), work.head_share
    h, linear = work.model.inner, float(queries * work.model.linear_flops)
    share = sum(map(work.engine.linear_8bit.covers, range(work.model.num_layers))) / work.model.num_layers
    plain = work.itemsize * (FEATURE_PASSES * borrowed + FEATURE_PASSES / 2 * lent)
    packed = (work.itemsize + PACKED_BYTES) * 2 * (borrowed + lent)  # keys and values
    kept = _kept_in_fp8(work)
    passes = PASSES + (SHARE_PASSES if work.places > 1 else 0)
    moved = h * (work.itemsize * passes * queries + heads * ((1 - kept) * plain + kept * packed))
    quantised = share * (work.itemsize + 1) * queries * work.model.linears.inputs  # read as they are, written in 8 bits
    return Arithmetic(
        4.0 * h * (heads * window * keys + queries * work.condition_tokens),
        (1 - share) * linear,
        moved + quantised,
        share * linear,
    )


def exchange_seconds(work: Workload, queries: int, keys: int, wire: Link | None, device: Device) -> float:
    """Seconds in which the cards of a stage wait for each other's numbers in one layer; 0 where it has one card.

    Queries, keys and values go to the card of their heads, and the result comes back. Of uneven shares the largest
    counts. In the pipelined form only what attention does not hide of the way back.

    Args:
        work: the video and the model.
        queries: own tokens, of whole frames.
        keys: tokens attended to.
        wire: between the cards of the stage, each of which sends and receives at its rate.
        device: the card.
    """
    if wire is None:
        return 0.0
    h, rows, heads = work.model.inner, work.place_tokens(queries), work.head_share
    numbers = h * max(rows * (1 - 1 / work.places), (queries - queries / work.places) * heads)
    back = numbers * work.itemsize / wire.bandwidth
    there = 3 * back
    if work.engine.sequence_parallel_form == "pipelined":
        attention = Arithmetic(4.0 * h * heads * queries * keys, 0.0, 0.0).in_a_run(device)
        hidden = min(back, attention) * (SHARE_GROUPS - 1) / SHARE_GROUPS
        return there + back - hidden + (1 + SHARE_GROUPS) * wire.latency
    return there + back + 2 * wire.latency


def _kept_in_fp8(work: Workload) -> float:
    """The share of layers and steps whose features ``features_8bit`` keeps: all but those that attend in 8 bits."""
    if not work.engine.features_8bit:
        return 0.0
    policy, steps, layers = work.engine.attention_8bit, len(work.steps.runs), work.model.num_layers
    on = sum(policy.at(step, steps) for step in range(steps)) * sum(map(policy.covers, range(layers)))
    return 1 - on / (steps * layers)


def unit_arithmetic(work: Workload, schedule: Schedule, unit: Unit) -> Arithmetic:
    """Work of one layer for one unit."""
    queries = len(work.layout.window(unit.block, schedule.refreshes(unit))) * work.tokens
    lent = work.blocks.context_frames * work.tokens
    reads, writes = len(schedule.reads(unit)), len(schedule.writes(unit))
    return layer_arithmetic(work, queries, queries + reads * lent, reads * lent, writes * lent)


def unit_exchange(work: Workload, schedule: Schedule, unit: Unit, wire: Link | None, device: Device) -> float:
    """Seconds of a unit's exchanges between the cards of a stage, in one layer."""
    queries = len(work.layout.window(unit.block, schedule.refreshes(unit))) * work.tokens
    keys = queries + len(schedule.reads(unit)) * work.blocks.context_frames * work.tokens
    return exchange_seconds(work, queries, keys, wire, device)


def update_seconds(work: Workload, schedule: Schedule) -> float:
    """Seconds of the sampler's steps per unit: all of them are taken, those that are not run too."""
    return UPDATE_SECONDS * (work.steps.num_steps / schedule.units_per_block)


class Costing:
    """Seconds of everything in a schedule, for ``simulate``.

    Args:
        work: the video and the model.
        schedule: the order of work.
        split: layers of every stage.
        devices: one per stage, of its cards, then one per place that only decodes.
        links: edge k leads from stage k to the next one, the last back to stage 0; then, where places only decode,
            from the last stage to the first of them, and from each of them to the next.
        wires: between the cards of each stage; empty: it has one.
    """

    def __init__(
        self,
        work: Workload,
        schedule: Schedule,
        split: Sequence[int],
        devices: Sequence[Device],
        links: Sequence[Link],
        wires: Sequence[Link] = (),
    ) -> None:
        self.work, self.schedule, self.split, self.devices, self.links = work, schedule, split, devices, links
        self.wires: Sequence[Link | None] = wires or [None] * len(split)
        self._kinds: dict[Unit, tuple[int, int, int]] = {}
        self._seconds: dict[tuple[int, tuple[int, int, int]], float] = {}

    @property
    def costs(self) -> Costs:
        """The durations for a replay."""
        return Costs(
            run=self.run,
            transfer=self.transfer,
            latency=lambda edge: self.links[edge].latency,
            update=UPDATE_SECONDS * (self.work.steps.num_steps / self.schedule.num_steps),
            decode=self.decode,
            decode_shares=True,
            hand_over=self.hand_over,
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
        layer = unit_arithmetic(self.work, self.schedule, unit).in_a_run(device)
        layer += unit_exchange(self.work, self.schedule, unit, self.wires[stage], device)
        seconds = self.split[stage] * layer
        frames = len(self.work.layout.window(unit.block, self.schedule.refreshes(unit)))
        return seconds + self.ends(stage, frames, device)

    def ends(self, stage: int, frames: int, device: Device) -> float:
        """Seconds that the first stage (embedding) and the last one (head) spend besides their layers.

        Args:
            stage: number of the stage.
            frames: latent frames of the unit.
            device: the stage's card.
        """
        model, tokens = self.work.model, self.work.place_tokens(frames * self.work.tokens)
        first, last = stage == 0, stage == len(self.split) - 1
        given = model.in_channels + model.condition_channels
        flops = 2.0 * tokens * model.inner * model.patch**2 * (first * given + last * model.out_channels)
        moved = self.work.itemsize * tokens * model.inner * (2 * first + 3 * last)
        wire, between = self.wires[stage], 0.0
        if first and wire is not None:  # its first card has the latents
            channels = given + model.in_channels  # there, and back
            numbers = (self.work.places - 1) / self.work.places * frames * self.work.pixels * channels
            between = numbers * self.work.itemsize / wire.bandwidth + 2 * wire.latency
        return Arithmetic(0.0, flops, moved).in_a_run(device) + between

    def transfer(self, edge: int, unit: Unit) -> float:
        """Seconds of a message on an edge, without latency: the hidden states of a window, or a velocity. Where cards
        share a stage, each sends its part at once."""
        refresh, work = self.schedule.refreshes(unit), self.work
        frames = len(work.layout.window(unit.block, refresh))
        if edge == len(self.split) - 1:
            own = frames - work.layout.fed_context(unit.block, refresh)
            elements = work.model.in_channels * work.pixels * own / work.places
        else:
            elements = work.model.inner * work.place_tokens(frames * work.tokens)
        return elements * work.itemsize / self.links[edge].bandwidth

    def hand_over(self, block: int) -> float:
        """Seconds until a block's latents are at other places that decode, all of which get all rows."""
        places = len(self.schedule.decoders) - (0 in self.schedule.decoders)
        if not places:
            return 0.0
        size = 4 * self.work.layout.frames(block) * self.work.model.in_channels * self.work.pixels
        count = len(self.split)
        wire = slowest((*self.links[: count - 1], *self.links[count:]))
        return places * size / wire.bandwidth + wire.latency

    def decode_alone(self, place: int) -> float:
        """Seconds in which the card of a place decodes a latent frame, all rows of it."""
        device = self.devices[place]
        rate = device.conv if self.work.decode_itemsize == 4 else device.conv_16bit
        return self.work.decoder.flops(self.work.pixels) / rate

    def decode(self, block: int) -> float:
        """Seconds in which the slowest of those that decode does its part of a block, exchanges included."""
        decoders, work = self.schedule.decoders, self.work
        if not decoders:
            return 0.0
        share = work.part_rows(len(decoders)) / work.rows
        slowest = max(self.decode_alone(place) for place in decoders)
        return work.layout.kept_frames(block) * (slowest * share + self._exchange(len(decoders)))

    def _exchange(self, parts: int) -> float:
        """Seconds per latent frame in which parts of the rows wait for each other's. Nothing is overlapped: a row of
        every convolution's input goes to each neighbour, keys and values of the attention go to all."""
        if parts == 1:
            return 0.0
        work, count = self.work, len(self.split)
        wire = slowest(self.links[count + 1 :] if self.schedule.decode_ranks else self.links[: count - 1])
        borders = work.decoder.borders(work.pixels // work.rows)
        neighbours = min(2, parts - 1)
        numbers = neighbours * borders.numbers + borders.gathered * work.pixels * (parts - 1) / parts
        messages = borders.messages + (1 if borders.gathered else 0)
        return numbers * work.decode_itemsize / wire.bandwidth + messages * wire.latency


def slowest(links: Sequence[Link]) -> Link:
    """The link with the lowest rate."""
    return min(links, key=lambda link: link.bandwidth)


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
