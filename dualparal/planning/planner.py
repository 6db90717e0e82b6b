"""Search for the cut of a model and of a video that suits some cards: in closed form, the answers replayed. No torch.

A plan is a prediction that rests on the rates in ``devices``. It promises speed and memory, never quality: context
policy, block and context size are the user's or the defaults, and other choices are shown as alternatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from dualparal.config.blocks import DEFAULT_VERSION
from dualparal.config.engine import EngineConfig
from dualparal.config.units import GIB
from dualparal.config.video import VideoConfig
from dualparal.models.registry import model_sizes
from dualparal.planning.cost import Costing, balance, closed_form
from dualparal.planning.devices import Device, links, parse_gpus
from dualparal.planning.memory import edge_elements, stage_memory
from dualparal.planning.plan import DECODE_PLACES, ENGINE_DECODES_ON, Cards, NoPlan, Plan, costs_per_layer
from dualparal.planning.workload import Workload
from dualparal.schedule.policies import POLICIES
from dualparal.schedule.schedule import Schedule

BLOCK_SIZES = (4, 6, 8, 12, 16)
REPLAY_LIMIT = 60_000  # runs of a unit on a stage; a replay of more would take longer than half a second
ALTERNATIVES = 6
EARLY_BLOCKS = 6  # in flight, shown beside the choice; not a default: what it does to the picture is not judged yet
WORTH = 0.05  # of the time: neighbours that many steps further apart must be worth it


def plan(
    model: str = "wan2.1-t2v-1.3b",
    gpus: str | Sequence[Sequence[Device]] = "8xrtx4090",
    *,
    decode: str = "stage 0",
    link: str | None = None,
    between: str | None = None,
    memory_limit: float | None = None,
    first_frame_limit: float | None = None,
    extra_devices: Mapping[str, Device] | None = None,
    **options: Any,
) -> Plan:
    """The fastest way to make a video within the limits, and what else there is.

    Args:
        model: a built-in name ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b"), or a directory in diffusers
            format, of which only config files are read.
        gpus: "8xrtx4090", "8x24GB", "4xa100-80gb,2xrtx4090"; stages follow this order.
        decode: "stage 0" (beside its units) or "own card" (the last one).
        link, between: of cards in a group and between groups of ``gpus``, by name ("pcie4", "nvlink4", "25gbe").
        memory_limit: GiB per card that may be used. first_frame_limit: seconds.
        extra_devices: cards besides the built-in ones, by name.
        options: fields of ``VideoConfig`` (num_frames, by default 1025, None for an endless video, height, width,
            num_inference_steps ...), and of ``EngineConfig`` and ``BlockConfig`` (frames_per_block, context, dtype
            ...). Blocks and context are kept, unless nothing fits; without ``max_blocks_in_flight`` there is no limit,
            or where that does not fit the largest that does (for memory with "newest" features, which take fewer
            slots).

    Raises:
        NoPlan: it cannot be done; says why, and what can.
        ValueError: a value is out of range or unknown; names it, the rule and the way out.
    """
    names = {item.name for item in fields(VideoConfig)} & set(options)
    video = VideoConfig(**{"num_frames": 1025, **{name: options.pop(name) for name in names}})
    work = Workload(model_sizes(model), video, EngineConfig.of(**options))
    groups = parse_gpus(gpus, extra_devices) if isinstance(gpus, str) else [list(group) for group in gpus]
    return plan_for(
        work,
        groups,
        decode=decode,
        link=link,
        between=between,
        memory_limit=memory_limit,
        first_frame_limit=first_frame_limit,
    )


def plan_for(
    work: Workload,
    groups: Sequence[Sequence[Device]],
    *,
    decode: str = "stage 0",
    link: str | None = None,
    between: str | None = None,
    memory_limit: float | None = None,
    first_frame_limit: float | None = None,
) -> Plan:
    """Plans as ``plan`` does, for a workload and groups of cards.

    Args:
        work: the video and the model.
        groups: cards of the stages in order, by machine.
        decode, link, between, memory_limit, first_frame_limit: as in ``plan``.

    Raises:
        NoPlan: it cannot be done; the message says why, and names the nearest plan.
        ValueError: a value is out of range or unknown.
    """
    if decode not in DECODE_PLACES:
        raise ValueError(f"decode={decode!r}: use one of {', '.join(map(repr, DECODE_PLACES))}")
    for name, limit in (("memory_limit", memory_limit), ("first_frame_limit", first_frame_limit)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name}={limit}: use a number above 0")
    devices = tuple(card for group in groups for card in group)
    _check_fp8(work.engine, devices)
    most = None if memory_limit is None else int(memory_limit * GIB)
    cards = Cards(
        devices,
        tuple(links(groups, link, between)),
        tuple(card.usable if most is None else min(card.usable, most) for card in devices),
    )
    search = _Search(cards, first_frame_limit)
    best = search.best(work, decode)
    if best is None:
        raise search.refusal(work, decode)
    best = replace(best, replay=best.runs <= REPLAY_LIMIT)
    return replace(best, alternatives=tuple(search.alternatives(best)), earlier=search.earlier(best))


class _Search:
    def __init__(self, cards: Cards, first_frame_limit: float | None) -> None:
        self.cards = cards
        self.first_frame_limit = first_frame_limit

    def best(self, work: Workload, decode: str = "stage 0", note: str = "") -> Plan | None:
        """A plan of these choices that fits and is fast, or None.

        Where blocks in flight have to be limited and the user has not said how: as loosely as can be, unless a limit a
        little tighter saves ``WORTH`` of the time.
        """
        fitting: list[Plan] = []
        for each in self._caps(work):
            found = self._cut(each, decode)
            if found is None or (
                self.first_frame_limit is not None and found.estimate.first_frame > self.first_frame_limit
            ):
                continue
            gap = found.schedule.gap
            why = f"neighbours {gap} steps apart, {each.blocks.context_version}" if gap > 1 else ""
            fitting.append(replace(found, note=", ".join(filter(None, (note, why)))))
            if gap == 1 or len(fitting) == 4:
                break
        best = min(fitting, key=lambda plan: plan.pace, default=None)
        return next((p for p in fitting if best and p.pace * (1 - WORTH) <= best.pace), None)

    @staticmethod
    def _caps(work: Workload) -> Iterator[Workload]:
        """Yields the workload with limits on the blocks in flight, from none to the tightest.

        Several limits mean the same gap. Another version of features is taken where the default does not fit.
        """
        yield work
        if work.blocks.max_blocks_in_flight is not None:
            return
        steps = work.video.num_inference_steps
        for k in dict.fromkeys(-(-steps // gap) for gap in range(2, steps + 1)):
            for version in POLICIES[work.blocks.context].versions:
                yield with_blocks(work, max_blocks_in_flight=k, context_version=version)

    def _cut(self, work: Workload, decode: str) -> Plan | None:
        """The best split, or None when it does not fit."""
        count, decode_on = len(self.cards.devices), None
        if decode == "own card" and work.decode:
            if count < 2:
                return None
            count, decode_on = count - 1, self.cards.devices[-1]
        if count > work.model.num_layers:
            return None
        cards = self.cards.first(count)
        schedule = work.schedule(count)
        decodes = decode == "stage 0"
        most = [_most_layers(work, schedule, cards, stage, decodes) for stage in range(count)]
        one, extra = costs_per_layer(work, schedule, cards)
        hop = sum(edge_elements(work)[0] * work.itemsize / link.bandwidth + link.latency for link in cards.links[:-1])
        pieces = Costing(work, schedule, [1] * count, cards.devices, cards.links, decode_on)
        found: list[Plan] = []
        # Decoding falls into the last part of a run: how few layers make up for it only a trial can tell
        for fewer in range(most[0] if decodes and work.decode else 1):
            split = balance(one, extra, [most[0] - fewer, *most[1:]], work.model.num_layers)
            if split is None:
                break
            if found and tuple(split) == found[-1].split:
                continue
            stages = [layers * seconds + more for layers, seconds, more in zip(split, one, extra)]
            decoding = pieces.decode(1) if work.decode else 0.0
            estimate = closed_form(schedule, stages, hop, decoding, decode_on is None)
            found.append(Plan(work, cards, tuple(split), decode, estimate, decode_on=decode_on))
        return min(found, key=lambda each: each.pace, default=None)

    # What else there is -------------------------------------------------------------------------------------

    def alternatives(self, best: Plan) -> list[Plan]:
        """Plans with one choice changed at a time, fastest first."""
        found: list[Plan] = []
        for work, decode, note in self._variations(best):
            other = self.best(work, decode, note)
            if other is not None:
                found.append(other)
        found.sort(key=lambda each: each.pace)
        return found[:ALTERNATIVES]

    def earlier(self, best: Plan) -> Plan | None:
        """The plan with ``EARLY_BLOCKS`` in flight, where it fits and its first frames come earlier; else None.

        With the features that the choice has or, where these do not fit, with "newest" ones.
        """
        if best.schedule.max_in_flight <= EARLY_BLOCKS:
            return None
        for version in dict.fromkeys([best.work.blocks.context_version, *POLICIES[best.work.blocks.context].versions]):
            work = with_blocks(best.work, max_blocks_in_flight=EARLY_BLOCKS, context_version=version)
            found = _Search(self.cards, None).best(work, best.decode)
            if found is not None:
                return found if found.estimate.first_frame < best.estimate.first_frame else None
        return None

    def _variations(self, best: Plan) -> Iterator[tuple[Workload, str, str]]:
        work, blocks, count = best.work, best.work.blocks, len(self.cards.devices)
        for context in POLICIES:
            if context != blocks.context:
                free = with_blocks(work, context=context, max_blocks_in_flight=None, context_version=DEFAULT_VERSION)
                yield free, best.decode, "another context policy"
        for size in BLOCK_SIZES:
            if size >= blocks.context_frames and size != blocks.frames_per_block:
                window = size + 2 * blocks.context_frames
                trained = work.model.trained_latents
                note = f"window of {window} latents"
                if trained is not None and window > trained:
                    note += f", {work.model.name} was trained with {trained}"
                yield with_blocks(work, frames_per_block=size), best.decode, note
        for place in DECODE_PLACES:
            if place != best.decode and count > 1:
                note = "the last card decodes" if place == "own card" else "stage 0's card decodes"
                yield work, place, note + ("" if place in ENGINE_DECODES_ON else ", not in the engine yet")
        if blocks.max_blocks_in_flight is None:  # as few as keep all stages busy
            k = -(-count // best.schedule.branches) + 1
            yield with_blocks(work, max_blocks_in_flight=k), best.decode, "earlier frames"

    # What cannot be done ------------------------------------------------------------------------------------

    def refusal(self, work: Workload, decode: str) -> NoPlan:
        """The reason for having no plan, and the nearest plan that there is."""
        count, layers = len(self.cards.devices), work.model.num_layers
        if decode == "own card" and count < 2:
            return NoPlan(f"decode='own card' with {count} card: the stages need one, too; use 'stage 0'")
        if count - (decode == "own card") > layers:
            keep = layers + (decode == "own card")
            nearest = _Search(self.cards.first(keep), self.first_frame_limit).best(work)
            return _no_plan(
                f"{count} cards for a model of {layers} layers: every stage owns at least one layer; use {keep} or "
                "fewer",
                nearest,
            )
        if _Search(self.cards, None).best(work, decode) is not None:
            assert self.first_frame_limit is not None
            soonest = self._soonest(work, decode)
            return _no_plan(
                f"first_frame_limit={self.first_frame_limit:g} s: the first block takes {soonest.first_frame:.0f} s at "
                "least on these cards; allow so much, or take fewer steps, smaller blocks or more cards",
                soonest,
            )
        need, have, where = self._shortage(work, decode)
        return _no_plan(
            f"{work.model.name} at {work.video.width}x{work.video.height} does not fit: stage {where} "
            f"({self.cards.devices[where].name}) needs {need / GIB:.1f} GiB and may use {have / GIB:.1f}",
            self._nearest(work),
        )

    def _soonest(self, work: Workload, decode: str) -> Plan:
        free = _Search(self.cards, None)
        found = [each for each in (free._cut(capped, decode) for capped in self._caps(work)) if each is not None]
        return min(found, key=lambda each: each.estimate.first_frame)

    def _shortage(self, work: Workload, decode: str) -> tuple[int, int, int]:
        """Returns (bytes needed, bytes there, stage) of the worst stage when layers are spread by memory alone."""
        count = len(self.cards.devices) - (decode == "own card")
        schedule, cards = work.schedule(count), self.cards.first(count)
        room = [float(cards.usable[stage]) for stage in range(count)]
        split = balance([1 / r for r in room], [0.0] * count, [work.model.num_layers] * count, work.model.num_layers)
        assert split is not None
        needs = [stage_memory(work, schedule, split, stage, decode == "stage 0").peak for stage in range(count)]
        where = max(range(count), key=lambda stage: needs[stage] - cards.usable[stage])
        return needs[where], cards.usable[where], where

    def _nearest(self, work: Workload) -> Plan | None:
        """The plan with the fewest changes: policy, context, blocks, decoder; then more cards of the last kind."""
        blocks = work.blocks
        lean: list[dict[str, object]] = [
            {"context": name, "context_version": DEFAULT_VERSION} for name, policy in POLICIES.items() if policy.is_lean
        ]
        changes = list(lean)
        if blocks.max_blocks_in_flight is not None:
            others = [version for version in POLICIES[blocks.context].versions if version != DEFAULT_VERSION]
            changes[:0] = [{"context_version": version} for version in others]
        changes += [{"context_frames": c} for c in range(blocks.context_frames - 1, 0, -1)]
        sizes = [b for b in reversed(BLOCK_SIZES) if blocks.context_frames <= b < blocks.frames_per_block]
        changes += [{"frames_per_block": b} for b in sizes]
        changes += [lean[0] | {"frames_per_block": b} for b in sizes]
        for change in changes:
            if found := self.best(with_blocks(work, **change)):
                return found
        if found := self.best(work, "own card", "the last card decodes, not in the engine yet"):
            return found
        last = len(self.cards.devices) - 1
        for count in range(last + 2, work.model.num_layers + 1):
            more = count - last - 1
            cards = Cards(
                (*self.cards.devices, *[self.cards.devices[-1]] * more),
                (*self.cards.links, *[self.cards.links[-1]] * more),
                (*self.cards.usable, *[self.cards.usable[-1]] * more),
            )
            if found := _Search(cards, self.first_frame_limit).best(work):
                return replace(found, note=f"{more} cards more")
        return None


def _check_fp8(engine: EngineConfig, devices: Sequence[Device]) -> None:
    """Checks that the cards have fp8 where options need it, as the engine does. Raises NoPlan."""
    wanted = {
        "linear_8bit='fp8'": engine.linear_8bit.on,
        "attention_8bit='fp8'": engine.attention_8bit.mode == "fp8",
        "features_8bit=True": engine.features_8bit,
    }
    without = dict.fromkeys(card.name for card in devices if not card.fp8)
    if engine.device == "cpu" or not without:
        return
    for name, on in wanted.items():
        if on:
            raise NoPlan(f"{name} on {', '.join(without)}: it needs fp8, from compute capability 8.9 on; leave it out")


def with_blocks(work: Workload, **change: object) -> Workload:
    """The same video, cut in another way."""
    blocks = replace(work.blocks, **change)  # type: ignore[arg-type]
    return replace(work, engine=replace(work.engine, blocks=blocks))


def _no_plan(reason: str, nearest: Plan | None) -> NoPlan:
    if nearest is None:
        return NoPlan(f"{reason}; no other context, block size or number of such cards helps: use larger cards")
    return NoPlan(f"{reason}. The nearest that works: {nearest.describe()}", nearest)


def _most_layers(work: Workload, schedule: Schedule, cards: Cards, stage: int, decodes: bool) -> int:
    """Layers that fit on a stage's card; memory grows by the same with each."""
    count = len(cards.devices)

    def peak(layers: int) -> int:
        split = [layers] * count
        return stage_memory(work, schedule, split, stage, decodes).peak

    low, high = 0, work.model.num_layers
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle) <= cards.usable[stage] else (low, middle - 1)
    return low
