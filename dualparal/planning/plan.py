"""A plan: the layers of each card, the cost of the run, and the basis of these numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dualparal.config.units import GIB
from dualparal.planning.cost import UPDATE_SECONDS, Costing, Estimate, layer_arithmetic
from dualparal.planning.devices import Band, Device, Link
from dualparal.planning.memory import Memory, stage_memory
from dualparal.planning.workload import Workload
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.simulate import Simulation, simulate

DECODE_PLACES = ("stage 0", "own card")
ENGINE_DECODES_ON = ("stage 0",)  # what the engine can do today


class NoPlan(ValueError):
    """Nothing fits. The message names the reason and the nearest plan that does; ``nearest`` is that plan, or None."""

    def __init__(self, message: str, nearest: Plan | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class Cards:
    """The cards of the stages in order, edge k leading from card k to the next one, and bytes usable on each."""

    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    usable: tuple[int, ...]

    def first(self, count: int) -> Cards:
        """The first ``count`` cards; the way back takes the link of the last one."""
        return Cards(self.devices[:count], (*self.links[: count - 1], self.links[-1]), self.usable[:count])


@dataclass(frozen=True)
class Plan:
    """A way to run a request.

    Attributes:
        work: model, video and blocks.
        cards: one per stage.
        split: layers of every stage.
        decode: "stage 0" or "own card" (behind the stages').
        estimate: times in closed form.
        note: the difference from the request, for people.
        decode_on: the card of its own that decodes; None: stage 0's.
        replay: ``seconds`` and others come from a replay instead of the closed form.
        alternatives: plans with other choices, fastest first.
        earlier: the plan with ``EARLY_BLOCKS`` in flight, where its first frames come earlier; None: they do not.
    """

    work: Workload
    cards: Cards
    split: tuple[int, ...]
    decode: str
    estimate: Estimate
    note: str = ""
    decode_on: Device | None = None
    replay: bool = False
    alternatives: tuple[Plan, ...] = ()
    earlier: Plan | None = None

    @property
    def runs(self) -> float:
        """Runs of a unit on a stage in the whole video; the cost of a replay grows with them."""
        units = self.schedule.num_units
        return math.inf if units is None else units * len(self.split)

    @property
    def pace(self) -> float:
        """Seconds in closed form: of the video, or, where it is endless, of each of its frames."""
        return 1 / self.frames_per_second if self.is_endless else self.estimate.seconds

    @property
    def is_endless(self) -> bool:
        """True when the video has no last frame."""
        return self.work.video.num_frames is None

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule that the engine would walk."""
        return self.work.schedule(len(self.split))

    @cached_property
    def costing(self) -> Costing:
        """Seconds of everything in the schedule."""
        cards = self.cards
        return Costing(self.work, self.schedule, self.split, cards.devices, cards.links, self.decode_on)

    @cached_property
    def simulation(self) -> Simulation | None:
        """The replay; None (``replay`` is False) where it would take long: numbers are then the closed form's."""
        return simulate(self.schedule, self.costing.costs) if self.replay else None

    @property
    def seconds(self) -> float:
        """Seconds from the first unit to the last frame; infinite for an endless video."""
        return self.simulation.seconds if self.simulation else self.estimate.seconds

    @property
    def first_frame(self) -> float:
        """Seconds until the first block can be watched."""
        return self.simulation.first_frame if self.simulation else self.estimate.first_frame

    @property
    def bubble(self) -> float:
        """Share of the time in which a card computes no unit, averaged over stages."""
        if self.simulation:
            return self.simulation.bubble
        units = self.schedule.num_units
        if units is None:
            return 1 - self._stage_seconds * self._units_per_block / (self.estimate.block * len(self.split))
        return 1 - self._stage_seconds * units / (self.seconds * len(self.split))

    @cached_property
    def _stage_seconds(self) -> float:
        """Seconds of a unit in the middle of the video, summed over stages."""
        one, extra = costs_per_layer(self.work, self.schedule, self.cards)
        return sum(layers * seconds + more for layers, seconds, more in zip(self.split, one, extra))

    @property
    def _units_per_block(self) -> int:
        return self.schedule.num_steps * self.schedule.branches

    @property
    def frames_per_second(self) -> float:
        """Frames of the finished video per second of the run; of an endless one, once the pipe is full."""
        video, work = self.work.video, self.work
        if video.num_frames is None:
            return work.blocks.frames_per_block * work.model.vae.temporal_factor / self.estimate.block
        return video.num_frames / self.seconds

    @property
    def decode_rule(self) -> float:
        """Cards that PipeDiT's rule would give to decoding, N T_dec / (T_dec + T_den), unrounded; for people.

        T is the time of a block on one of the N cards: the decoder on the card that decodes, units as the stages'
        cards share them. Source: PipeDiT (2025), the balance of its denoising and decoding groups.
        """
        if not self.work.decode:
            return 0.0
        decode, denoise = self.costing.decode(1), self._stage_seconds * self._units_per_block
        return len(self.cards.devices) * decode / (decode + denoise)

    @property
    def error(self) -> Band:
        """The error of predictions for these cards, the widest of all of them."""
        bands = [card.band for card in self.cards.devices]
        return Band(min(b.low for b in bands), max(b.high for b in bands), bands[0].timings)

    @cached_property
    def memory(self) -> tuple[Memory, ...]:
        """Bytes on the rank of each stage."""
        decodes = self.decode == "stage 0"
        stages = range(len(self.split))
        return tuple(stage_memory(self.work, self.schedule, self.split, stage, decodes) for stage in stages)

    @property
    def engine_options(self) -> dict[str, object]:
        """The plan's choices as arguments of ``Engine.from_pretrained``.

        Raises:
            ValueError: the engine cannot decode on the card that the plan wants.
        """
        if self.decode not in ENGINE_DECODES_ON and self.work.decode:
            raise ValueError(f"decode={self.decode!r}: the engine decodes on {' or '.join(ENGINE_DECODES_ON)} only")
        blocks = self.work.blocks
        return {
            "layers_per_stage": list(self.split),
            "max_blocks_in_flight": blocks.max_blocks_in_flight,
            "context_version": blocks.context_version,
        }

    def describe(self) -> str:
        """Describes the plan in one line for people."""
        blocks = self.work.blocks
        cap = "" if blocks.max_blocks_in_flight is None else f", K={blocks.max_blocks_in_flight}"
        cards = count_names(self.cards.devices)
        most = max(memory.peak for memory in self.memory) / GIB
        seconds = f"{self.frames_per_second:.2f} frames/s" if self.is_endless else f"{self.seconds:.0f} s"
        return (
            f"{blocks.context}, B={blocks.frames_per_block}, C={blocks.context_frames}{cap}, layers "
            f"{'+'.join(map(str, self.split))} on {cards}: {seconds}, first frames after "
            f"{self.first_frame:.0f} s, {most:.1f} GiB on the fullest card (prediction)"
        )


def costs_per_layer(work: Workload, schedule: Schedule, cards: Cards) -> tuple[list[float], list[float]]:
    """Seconds per unit in the middle of the video: of one layer, and of the rest of a stage, by stage."""
    blocks, count = work.blocks, len(cards.devices)
    block = min(1, (work.layout.num_blocks or 2) - 1)
    queries, lent = len(work.layout.window(block)) * work.tokens, blocks.context_frames * work.tokens
    sides = 0 if work.layout.num_blocks == 1 else schedule.policy.neighbours_read
    layer = layer_arithmetic(work, queries, queries + sides * lent, sides * lent, sides * lent)
    costing = Costing(work, schedule, [1] * count, cards.devices, cards.links)
    extra = [costing.ends(stage, len(work.layout.window(block)), card) for stage, card in enumerate(cards.devices)]
    extra[0] += UPDATE_SECONDS / schedule.branches
    return [layer.in_a_run(card) for card in cards.devices], extra


def count_names(devices: Sequence[Device]) -> str:
    """Names of cards with their numbers, such as "4 x rtx4090, 2 x l40s (for 48gb)"."""
    names = [device.name + (f" (for {device.stands_for})" if device.stands_for else "") for device in devices]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
