"""The search for a cut of a model and of a video, for the cards of a stage, and for who decodes: in closed form. No
torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from dualparal.config.blocks import DEFAULT_VERSION
from dualparal.config.units import GIB
from dualparal.planning.closed_form import closed_form
from dualparal.planning.cost import balance
from dualparal.planning.memory import edge_elements, most_layers, place_memory
from dualparal.planning.plan import Cards, NoPlan, Plan, costing, costs_per_layer, describe_decoders, pace
from dualparal.planning.workload import Workload
from dualparal.schedule.policies import POLICIES

BLOCK_SIZES = (4, 6, 8, 12, 16)
ALTERNATIVES = 6
EARLY_BLOCKS = 6  # in flight, shown beside the choice; not a default: judged at 20 steps only (docs/quality.md)
EQUAL = 1.01  # times as fast, in closed form
# Times the seconds of the best closed form, so near that a replay decides: where units are enough for all stages, and
# where they are not, which closed forms are less good at.
NEAR, NEAR_WITH_FEW = 1.06, 1.25
WORTH = 0.05  # of the time: neighbours that many steps further apart must be worth it


class Search:
    """The search on some cards.

    Args:
        cards: all of them.
        first_frame_limit: seconds, or None.
        searches_decoders: who decodes is open; otherwise it is as each workload says.
        searches_places: the cards of a stage are open, too.
    """

    def __init__(
        self,
        cards: Cards,
        first_frame_limit: float | None,
        searches_decoders: bool = False,
        searches_places: bool = False,
    ) -> None:
        self.cards = cards
        self.first_frame_limit = first_frame_limit
        self.searches_decoders = searches_decoders
        self.searches_places = searches_places

    def best(self, work: Workload, note: str = "") -> Plan | None:
        """The fastest plan in closed form, or None when nothing fits."""
        return next(iter(self.candidates(work, note)), None)

    def candidates(self, work: Workload, note: str = "") -> list[Plan]:
        """The few best plans with other places that decode and other cards of a stage, fastest first: those whose
        closed forms are too near to say which. No more ways are tried than can be faster."""
        found: list[Plan] = []
        ways = [(self._least(way), number, way) for number, way in enumerate(self._ways(work))]
        for least, _, way in sorted(ways, key=lambda each: each[:2]):
            if found and least > self._near(way) * min(plan.pace for plan in found):
                continue
            if (plan := self._within(way, note)) is not None:
                found.append(plan)
        found.sort(key=lambda plan: plan.pace)
        return [plan for plan in found if plan.pace <= self._near(plan.work) * found[0].pace]

    def _near(self, work: Workload) -> float:
        """A factor within which the closed form of a workload does not tell."""
        schedule = work.schedule(1)
        stages = (len(self.cards.devices) - schedule.decode_ranks) // work.places
        return NEAR if schedule.max_in_flight * schedule.branches >= stages else NEAR_WITH_FEW

    def _ways(self, work: Workload) -> Iterator[Workload]:
        """Yields the workload with each way to decode and each number of cards of a stage that is open."""
        for way in self._ways_to_decode(work):
            yield way
            if self.searches_places and way.places == 1:
                stages = len(self.cards.devices) - way.schedule(1).decode_ranks
                for places in range(2, 1 + min(stages, way.heads)):
                    if self.cards.grouped(places, way.schedule(1).decode_ranks) and can_share(way, places):
                        yield with_places(way, places)

    def _ways_to_decode(self, work: Workload) -> Iterator[Workload]:
        count = len(self.cards.devices)
        if not self.searches_decoders or not work.decode:
            yield work
            return
        fewest = 0 if self.searches_places else count - work.model.num_layers * work.places
        for ranks in range(max(0, fewest), min(count, 1 + work.rows)):
            yield with_decoders(work, ranks)
        if 1 < count // work.places <= min(work.rows, work.model.num_layers):
            yield with_decoders(work, in_place=True)

    def _least(self, work: Workload) -> float:
        """A pace that no plan of the workload exceeds by much: layers cut as if they could be halved, room for all."""
        all_cards = self._grouped(work)
        count = 0 if all_cards is None else len(all_cards.devices) - work.schedule(1).decode_ranks
        if count < 1 or all_cards is None:
            return math.inf
        cards, schedule = all_cards.first(count), work.schedule(count)
        one, extra = costs_per_layer(work, schedule, cards)
        rates = sum(1 / seconds for seconds in one)
        slowest = (work.model.num_layers + sum(more / each for more, each in zip(extra, one, strict=True))) / rates
        part = costing(work, schedule, [1] * count, all_cards).decode(1)
        beside = schedule.decode and not schedule.decode_ranks and not schedule.decode_in_place
        free = replace(schedule, decode_ranks=1) if beside else schedule  # stage 0 may have few layers
        return pace(work, closed_form(free, [slowest] * count, 0.0, part))

    def _grouped(self, work: Workload) -> Cards | None:
        """The cards as a workload uses them, one for each stage; None: they cannot share its stages."""
        if not can_share(work, work.places):
            return None
        return self.cards.grouped(work.places, work.schedule(1).decode_ranks)

    def _within(self, work: Workload, note: str) -> Plan | None:
        """A plan of these choices that fits and is fast, or None.

        Where blocks in flight have to be limited and the user has not said how: as loosely as can be, unless a limit a
        little tighter saves ``WORTH`` of the time.
        """
        fitting: list[Plan] = []
        if work.blocks.max_blocks_in_flight is None and len(work.steps.runs) > 1:
            version = POLICIES[work.blocks.context].versions[-1]
            if self._cut(with_blocks(work, max_blocks_in_flight=1, context_version=version)) is None:
                return None  # the tightest limit takes the least memory
        for each in self._caps(work):
            found = self._cut(each)
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
        steps = len(work.steps.runs)
        for k in dict.fromkeys(-(-steps // gap) for gap in range(2, steps + 1)):
            for version in POLICIES[work.blocks.context].versions:
                yield with_blocks(work, max_blocks_in_flight=k, context_version=version)

    def _cut(self, work: Workload) -> Plan | None:
        """The best split, or None when it does not fit."""
        all_cards = self._grouped(work)
        if all_cards is None:
            return None
        count = len(all_cards.devices) - work.schedule(1).decode_ranks
        if not 1 <= count <= work.model.num_layers:
            return None
        cards, schedule = all_cards.first(count), work.schedule(count)
        if len(schedule.decoders) > work.rows:
            return None
        for place in range(count, len(all_cards.devices)):
            if place_memory(work, schedule, [1] * count, place).peak > all_cards.usable[place]:
                return None
        most = [0]
        for stage in range(count):
            most.append(most_layers(work, schedule, stage, cards.usable[stage], likely=most[-1]))
        del most[0]
        one, extra = costs_per_layer(work, schedule, cards)
        hop = sum(edge_elements(work)[0] * work.itemsize / link.bandwidth + link.latency for link in cards.links[:-1])
        decode = costing(work, schedule, [1] * count, all_cards).decode(1)
        found: list[Plan] = []
        # Decoding falls into the last part of a run: how few layers make up for it only a trial can tell
        for fewer in range(most[0] if schedule.decoders == range(1) else 1):
            split = balance(one, extra, [most[0] - fewer, *most[1:]], work.model.num_layers)
            if split is None:
                break
            if found and tuple(split) == found[-1].split:
                continue
            stages = [layers * seconds + more for layers, seconds, more in zip(split, one, extra)]
            found.append(Plan(work, all_cards, tuple(split), closed_form(schedule, stages, hop, decode)))
        least = min((each.pace for each in found), default=0.0)
        # Of equals the one with the fewest layers on stage 0, whose units go at half speed while it decodes.
        return next((each for each in reversed(found) if each.pace <= EQUAL * least), None)

    # What else there is -------------------------------------------------------------------------------------

    def alternatives(self, best: Plan) -> list[Plan]:
        """Plans with one choice changed at a time, fastest first."""
        found: list[Plan] = []
        fixed = Search(self.cards, self.first_frame_limit)
        for choices in self._variations(best):
            others = [other for other in (fixed.best(work, note) for work, note in choices) if other is not None]
            found += sorted(others, key=lambda each: each.pace)[:1]
        found.sort(key=lambda each: each.pace)
        return found[:ALTERNATIVES]

    def earlier(self, best: Plan) -> list[Plan]:
        """The few best plans with ``EARLY_BLOCKS`` in flight, where it fits and first frames come earlier.

        With "newest" features where the policy has them: docs/quality.md has how these and others do with a limit.
        """
        if best.schedule.max_in_flight <= EARLY_BLOCKS:
            return []
        for version in reversed(POLICIES[best.work.blocks.context].versions):
            work = with_blocks(best.work, max_blocks_in_flight=EARLY_BLOCKS, context_version=version)
            found = Search(self.cards, None, self.searches_decoders, self.searches_places).candidates(work)
            if found:
                return [plan for plan in found if plan.estimate.first_frame < best.estimate.first_frame]
        return []

    def _variations(self, best: Plan) -> Iterator[list[tuple[Workload, str]]]:
        """Yields workloads with one choice changed, each with what is changed; of several the fastest is meant."""
        work, blocks = best.work, best.work.blocks
        for context in POLICIES:
            if context != blocks.context:
                free = with_blocks(work, context=context, max_blocks_in_flight=None, context_version=DEFAULT_VERSION)
                yield [(free, "another context policy")]
        for size in BLOCK_SIZES:
            if size >= max(blocks.context_frames, blocks.anchor_frames) and size != blocks.frames_per_block:
                window = size + 2 * blocks.context_frames + blocks.anchor_frames
                trained = work.model.trained_latents
                note = f"window of {window} latents"
                if trained is not None and window > trained:
                    note += f", {work.model.name} was trained with {trained}"
                yield [(with_blocks(work, frames_per_block=size), note)]
        kinds: dict[tuple[bool, bool], list[tuple[Workload, str]]] = {}
        for way in Search(self.cards, None, searches_decoders=True)._ways(work):
            kind = way.engine.decode_ranks > 0, way.engine.decode_in_place
            kinds.setdefault(kind, []).append((way, f"VAE on {describe_decoders(way)}"))
        kinds.pop((work.engine.decode_ranks > 0, work.engine.decode_in_place), None)
        yield from kinds.values()
        alone = Search(self.cards, None, searches_places=True)._ways(with_places(work, 1))
        if others := [(way, f"{way.places} cards a stage") for way in alone if way.places != work.places]:
            yield others
        if blocks.max_blocks_in_flight is None:  # as few as keep all stages busy
            k = -(-best.schedule.num_stages // best.schedule.branches) + 1
            yield [(with_blocks(work, max_blocks_in_flight=k), "earlier frames")]

    # What cannot be done ------------------------------------------------------------------------------------

    def refusal(self, work: Workload) -> NoPlan:
        """The reason for having no plan, and the nearest plan that there is."""
        count, layers, ranks = len(self.cards.devices), work.model.num_layers, work.schedule(1).decode_ranks
        if ranks >= count:
            cards = f"{count} card{'s' if count > 1 else ''}"
            return NoPlan(f"decode_ranks={ranks} with {cards}: the stages need one, too; use {count - 1} or fewer")
        if self._grouped(work) is None:
            return self._unshared(work)
        count = ranks + (count - ranks) // work.places
        parts = len(work.schedule(count - ranks).decoders)
        if parts > work.rows:
            return NoPlan(f"{parts} cards that decode and {work.rows} rows of latents: each needs one; use fewer")
        if count - ranks > layers:
            keep = layers * work.places + ranks
            nearest = Search(self.cards.first(keep), self.first_frame_limit, self.searches_decoders).best(work)
            return _no_plan(
                f"{len(self.cards.devices)} cards for a model of {layers} layers: every stage owns at least one "
                f"layer; use {keep} or fewer" + (", or let the others decode" if work.decode else ""),
                nearest,
            )
        if Search(self.cards, None, self.searches_decoders, self.searches_places).best(work) is not None:
            assert self.first_frame_limit is not None
            soonest = self._soonest(work)
            return _no_plan(
                f"first_frame_limit={self.first_frame_limit:g} s: the first block takes {soonest.first_frame:.0f} s at "
                "least on these cards; allow so much, or take fewer steps, smaller blocks or more cards",
                soonest,
            )
        need, have, where = self._shortage(work)
        card = self.cards.devices[where * work.places if where < count - ranks else -1]
        return _no_plan(
            f"{work.model.name} at {work.video.width}x{work.video.height} does not fit: "
            f"{'stage' if where < count - ranks else 'decoder'} {where} "
            f"({card.name}) needs {need / GIB:.1f} GiB and may use {have / GIB:.1f}",
            self._nearest(work),
        )

    def _unshared(self, work: Workload) -> NoPlan:
        """The reason for which cards cannot share the stages of a workload."""
        places, ranks = work.places, work.schedule(1).decode_ranks
        what = f"sequence_parallel={places}"
        stages = len(self.cards.devices) - ranks
        if stages % places or stages < places:
            return NoPlan(f"{what} with {stages} cards for stages: every stage takes {places}; use a multiple of that")
        if self.cards.grouped(places, ranks) is None:
            return NoPlan(f"{what}: the cards of a stage must be alike; give them another order, or use 1")
        if places > work.heads:
            return NoPlan(f"{what} with a model of {work.heads} heads: every card of a stage takes one; use fewer")
        return NoPlan(f"{what}: windows of this size have too few tokens for so many; use fewer")

    def _soonest(self, work: Workload) -> Plan:
        free = Search(self.cards, None)
        cut = [free._cut(capped) for way in self._ways(work) for capped in self._caps(way)]
        return min((each for each in cut if each is not None), key=lambda each: each.estimate.first_frame)

    def _shortage(self, work: Workload) -> tuple[int, int, int]:
        """Returns (bytes needed, bytes there, place) of the worst place when layers are spread by memory alone."""
        cards = self._grouped(work)
        assert cards is not None, "refused before"
        count = len(cards.devices) - work.schedule(1).decode_ranks
        schedule, usable = work.schedule(count), cards.usable
        split = balance(
            [1 / room for room in usable[:count]],
            [0.0] * count,
            [work.model.num_layers] * count,
            work.model.num_layers,
        )
        assert split is not None
        needs = [place_memory(work, schedule, split, place).peak for place in range(len(usable))]
        where = max(range(len(usable)), key=lambda place: needs[place] - usable[place])
        return needs[where], usable[where], where

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
        least = max(blocks.context_frames, blocks.anchor_frames)
        sizes = [b for b in reversed(BLOCK_SIZES) if least <= b < blocks.frames_per_block]
        changes += [{"frames_per_block": b} for b in sizes]
        changes += [lean[0] | {"frames_per_block": b} for b in sizes]
        for change in changes:
            if found := self.best(with_blocks(work, **change)):
                return found
        elsewhere = Search(self.cards, self.first_frame_limit, True, self.searches_places)
        if found := elsewhere.best(work, "VAE elsewhere"):
            return found
        most = work.model.num_layers - len(self.cards.devices)
        if most < 1 or self._with_more(most).best(work) is None:
            return None
        for more in range(1, most + 1):
            if found := self._with_more(more).best(work):
                return replace(found, note=f"{more} cards more")
        return None

    def _with_more(self, count: int) -> Search:
        """The search on so many more cards of the last kind."""
        cards = self.cards
        columns = [(*each, *each[-1:] * count) for each in (cards.devices, cards.links, cards.usable)]
        return Search(Cards(*columns), self.first_frame_limit, self.searches_decoders, self.searches_places)


def with_blocks(work: Workload, **change: object) -> Workload:
    """The same video, cut in another way."""
    blocks = replace(work.blocks, **change)  # type: ignore[arg-type]
    return replace(work, engine=replace(work.engine, blocks=blocks))


def with_decoders(work: Workload, ranks: int = 0, in_place: bool = False) -> Workload:
    """The same video, decoded by others."""
    return replace(work, engine=replace(work.engine, decode_ranks=ranks, decode_in_place=in_place))


def with_places(work: Workload, places: int) -> Workload:
    """The same video, with so many cards a stage."""
    return replace(work, engine=replace(work.engine, sequence_parallel=places))


def can_share(work: Workload, places: int) -> bool:
    """True when so many cards can share a stage of a workload: there are heads and tokens for all, and nothing else
    in its options speaks against it."""
    if places == 1:
        return True
    if places > work.heads:
        return False
    try:
        with_places(work, places)
        work.layout.check_places(work.tokens, places)
    except ValueError:
        return False
    return True


def _no_plan(reason: str, nearest: Plan | None) -> NoPlan:
    if nearest is None:
        return NoPlan(f"{reason}; no other context, block size or number of such cards helps: use larger cards")
    return NoPlan(f"{reason}. The nearest that works: {nearest.describe()}", nearest)
