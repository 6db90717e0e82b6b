"""A plan: the layers of each card, the cost of the run, and the basis of these numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dualparal.config.units import GIB
from dualparal.planning.closed_form import Estimate
from dualparal.planning.cost import Costing, exchange_seconds, layer_arithmetic, slowest, update_seconds
from dualparal.planning.devices import Band, Device, Link
from dualparal.planning.memory import Memory, place_memory
from dualparal.planning.workload import Workload
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.simulate import Simulation, simulate


class NoPlan(ValueError):
    """Nothing fits. The message names the reason and the nearest plan that does; ``nearest`` is that plan, or None."""

    def __init__(self, message: str, nearest: Plan | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class Cards:
    """The cards in order, edge k leading from card k to the next one, and bytes usable on each.

    Where cards share a stage (``grouped``), one stands for those of each stage, and ``wires`` are between these.
    """

    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    usable: tuple[int, ...]
    wires: tuple[Link, ...] = ()

    def first(self, count: int) -> Cards:
        """The first ``count`` cards; the way back takes the link of the last one."""
        links = (*self.links[: count - 1], self.links[-1])
        return Cards(self.devices[:count], links, self.usable[:count], self.wires[:count])

    def grouped(self, places: int, decoders: int) -> Cards | None:
        """A card for each stage of ``places``, then the last ``decoders`` as they are.

        None when the cards are not enough for whole stages, or those of a stage are not alike.
        """
        count = len(self.devices) - decoders
        if places == 1:
            return self
        if count < places or count % places:
            return None
        groups = [range(first, first + places) for first in range(0, count, places)]
        if any(len({self.devices[card] for card in group}) > 1 for group in groups):
            return None
        # From a place to the same one of the next stage, over all that lies between.
        hops = [slowest(self.links[group.start : group.start + 2 * places - 1]) for group in groups[:-1]]
        return Cards(
            (*(self.devices[group[0]] for group in groups), *self.devices[count:]),
            (*hops, *self.links[count - 1 :]),
            (*(min(self.usable[card] for card in group) for group in groups), *self.usable[count:]),
            tuple(slowest(self.links[group.start : group.stop - 1]) for group in groups),
        )


@dataclass(frozen=True)
class Plan:
    """A way to run a request.

    Attributes:
        work: model, video and blocks, and who decodes.
        cards: one per stage (for its cards, where these are several), then those that only decode.
        split: layers of every stage.
        estimate: times in closed form.
        note: the difference from the request, for people.
        replay: ``seconds`` and others come from a replay instead of the closed form.
        alternatives: plans with other choices, fastest first.
        earlier: the plan with ``EARLY_BLOCKS`` in flight, where its first frames come earlier; None: they do not.
    """

    work: Workload
    cards: Cards
    split: tuple[int, ...]
    estimate: Estimate
    note: str = ""
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
        return pace(self.work, self.estimate)

    @property
    def is_endless(self) -> bool:
        """True when the video has no last frame."""
        return self.work.video.num_frames is None

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule that the engine would walk."""
        return self.work.schedule(len(self.split))

    @property
    def all_devices(self) -> list[Device]:
        """Every card: those of the stages, then those that only decode."""
        count, places = len(self.split), self.work.places
        return [card for card in self.cards.devices[:count] for _ in range(places)] + [*self.cards.devices[count:]]

    @property
    def decode(self) -> str:
        """The places that decode, for people."""
        return describe_decoders(self.work)

    @cached_property
    def stage_cards(self) -> Cards:
        """The cards of the stages."""
        return self.cards.first(len(self.split))

    @cached_property
    def costing(self) -> Costing:
        """Seconds of everything in the schedule."""
        return costing(self.work, self.schedule, self.split, self.cards)

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
    def image_seconds(self) -> float:
        """Seconds before the first unit in which one video's images are encoded, on the first card; 0 without them.

        CLIP multiplies every parameter with each of its tokens once.
        """
        work, device = self.work, self.cards.devices[0]
        vae = work.encoded_latents and work.encoded_latents * work.model.vae.encode_flops(work.pixels)
        rate = device.conv if work.decode_itemsize == 4 else device.conv_16bit
        return (vae + 2.0 * work.model.image_encoder * work.model.image_tokens) / rate

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
        one, extra = costs_per_layer(self.work, self.schedule, self.stage_cards)
        return sum(layers * seconds + more for layers, seconds, more in zip(self.split, one, extra))

    @property
    def _units_per_block(self) -> int:
        return self.schedule.units_per_block

    @property
    def frames_per_second(self) -> float:
        """Frames of the finished video per second of the run; of an endless one, once the pipe is full."""
        video, work = self.work.video, self.work
        if video.num_frames is None:
            return 1 / pace(work, self.estimate)
        return video.num_frames / self.seconds

    @property
    def decode_rule(self) -> float:
        """Cards that PipeDiT's rule would give to decoding, N T_dec / (T_dec + T_den), unrounded; for people.

        T is the time of a block on one of the N cards: the decoder on the first card that decodes, units as the
        stages' cards share them. Source: PipeDiT (2025), the balance of its denoising and decoding groups.
        """
        if not self.work.decode:
            return 0.0
        frames = self.work.layout.kept_frames(1)
        decode = frames * self.costing.decode_alone(self.schedule.decoders[0])
        denoise = self._stage_seconds * self._units_per_block * self.work.places
        return len(self.all_devices) * decode / (decode + denoise)

    @property
    def error(self) -> Band:
        """The error of predictions for these cards, the widest of all of them."""
        bands = [card.band for card in self.cards.devices]
        return Band(min(b.low for b in bands), max(b.high for b in bands), bands[0].timings)

    @cached_property
    def memory(self) -> tuple[Memory, ...]:
        """Bytes on the rank of each stage, then of each place that only decodes."""
        places = range(len(self.split) + self.schedule.decode_ranks)
        return tuple(place_memory(self.work, self.schedule, self.split, place) for place in places)

    @property
    def engine_options(self) -> dict[str, object]:
        """The plan's choices as arguments of ``Engine.from_pretrained``: for as many stages as ``split`` has."""
        blocks = self.work.blocks
        return {
            "layers_per_stage": list(self.split),
            "max_blocks_in_flight": blocks.max_blocks_in_flight,
            "context_version": blocks.context_version,
            "decode_ranks": self.schedule.decode_ranks,
            "decode_in_place": self.schedule.decode_in_place,
            "sequence_parallel": self.work.places,
        }

    def describe(self) -> str:
        """Describes the plan in one line for people."""
        blocks = self.work.blocks
        cap = "" if blocks.max_blocks_in_flight is None else f", K={blocks.max_blocks_in_flight}"
        cards = count_names(self.all_devices) + (f", {self.work.places} a stage" if self.work.places > 1 else "")
        most = max(memory.peak for memory in self.memory) / GIB
        vae = f", VAE on {self.decode}" if self.work.decode else ""
        seconds = f"{self.frames_per_second:.2f} frames/s" if self.is_endless else f"{self.seconds:.0f} s"
        return (
            f"{blocks.context}, B={blocks.frames_per_block}, C={blocks.context_frames}{cap}, layers "
            f"{'+'.join(map(str, self.split))} on {cards}{vae}: {seconds}, first frames after "
            f"{self.first_frame:.0f} s, {most:.1f} GiB on the fullest card (prediction)"
        )


def pace(work: Workload, estimate: Estimate) -> float:
    """Seconds of a video, or, where it is endless, of each of its frames."""
    if work.video.num_frames is not None:
        return estimate.seconds
    return estimate.block / (work.blocks.frames_per_block * work.model.vae.temporal_factor)


def describe_decoders(work: Workload) -> str:
    """The places that decode, for people: "stage 0", "2 cards of their own" ..."""
    ranks = work.engine.decode_ranks
    if not work.decode:
        return "no card"
    if ranks:
        return "a card of its own" if ranks == 1 else f"{ranks} cards of their own"
    return "every stage's card" if work.engine.decode_in_place else "stage 0"


def costing(work: Workload, schedule: Schedule, split: Sequence[int], cards: Cards) -> Costing:
    """Seconds of everything in a schedule on the cards of its stages and of the places that only decode."""
    count = len(split)
    links = (*cards.first(count).links, *(cards.links[count - 1 : -1] if schedule.decode_ranks else ()))
    return Costing(work, schedule, split, cards.devices, links, cards.wires)


def costs_per_layer(work: Workload, schedule: Schedule, cards: Cards) -> tuple[list[float], list[float]]:
    """Seconds per unit in the middle of the video: of one layer, and of the rest of a stage, by stage."""
    blocks, count = work.blocks, len(cards.devices)
    block = min(1, (work.layout.num_blocks or 2) - 1)
    queries, lent = len(work.layout.window(block)) * work.tokens, blocks.context_frames * work.tokens
    sides = 0 if work.layout.num_blocks == 1 else schedule.policy.neighbours_read
    keys = queries + sides * lent
    layer = layer_arithmetic(work, queries, keys, sides * lent, sides * lent)
    costing = Costing(work, schedule, [1] * count, cards.devices, cards.links, cards.wires)
    extra = [costing.ends(stage, len(work.layout.window(block)), card) for stage, card in enumerate(cards.devices)]
    extra[0] += update_seconds(work, schedule)
    wires = cards.wires or [None] * count
    one = [
        layer.in_a_run(card) + exchange_seconds(work, queries, keys, wire, card)
        for card, wire in zip(cards.devices, wires, strict=True)
    ]
    return one, extra


def count_names(devices: Sequence[Device]) -> str:
    """Names of cards with their numbers, such as "4 x rtx4090, 2 x l40s (for 48gb)"."""
    names = [device.name + (f" (for {device.stands_for})" if device.stands_for else "") for device in devices]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
