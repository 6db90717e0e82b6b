"""The schedule as a value: properties over all small cases, closed forms, the authors' own order."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.config.blocks import CONTEXT_POLICIES, VERSIONED_POLICIES, BlockConfig
from dualparal.schedule.actions import Action, Features, Op, Unit
from dualparal.schedule.layout import Layout
from dualparal.schedule.policies import POLICIES, BlockQueue, Policy
from dualparal.schedule.replay import ScheduleError, bubble, grid, makespan, replay
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.validate import validate
from places import GOLDEN
from schedules import TooLate, partial_schedules, schedules


@settings(max_examples=400)
@given(schedules)
def test_every_schedule_runs_and_reads_what_it_names(schedule: Schedule) -> None:
    events = validate(schedule)
    runs = Counter(e.action.unit for e in events if e.action.op is Op.RUN)
    assert schedule.num_blocks is not None
    expected = {
        Unit(b, s, c, v)
        for v in range(schedule.num_videos)
        for b in range(schedule.num_blocks)
        for s in range(schedule.num_steps)
        for c in range(schedule.branches)
    }
    assert set(runs) == expected and set(runs.values()) == {schedule.num_stages}


@settings(max_examples=300)
@given(partial_schedules())
def test_units_that_do_not_exist_are_neither_run_nor_read(schedule: Schedule) -> None:
    """Where a branch is not run the conditional one of the very same block and step is read in its place."""
    events = validate(schedule)
    units = list(schedule.units())
    assert len(units) == schedule.num_units == len(set(units))
    for op in (Op.RUN, Op.SEND) if schedule.num_stages > 1 else (Op.RUN,):
        done = Counter(e.action.unit for e in events if e.action.op is op)
        assert set(done) == set(units) and set(done.values()) == {schedule.num_stages}
    assert {u.step for u in units if u.branch} == set(range(schedule.num_steps)) - set(schedule.conditional_only)
    made = {features for unit in units for features in schedule.writes(unit)}
    assert made == {features for unit in units for features in schedule.reads(unit)}
    whole = replace(schedule, conditional_only=())
    for unit in units:
        wanted = [f._replace(branch=f.branch * (f.step not in schedule.conditional_only)) for f in whole.reads(unit)]
        assert [f._replace(slot=0) for f in schedule.reads(unit)] == [f._replace(slot=0) for f in wanted]


@settings(max_examples=200)
@given(schedules | partial_schedules(), st.data())
def test_a_schedule_goes_on_from_latents_alone(schedule: Schedule, data: st.DataObject) -> None:
    """From a restartable iteration: the same units, in the same order, that read what is made after it."""
    assert schedule.num_blocks is not None
    last = (schedule.num_blocks - 1) * schedule.gap + schedule.num_steps
    start = data.draw(st.sampled_from([i for i in range(last) if schedule.is_restartable(i)]))
    rest = replace(schedule, start=start, num_stages=data.draw(st.integers(1, 8)))
    validate(rest)
    units = [unit for unit in schedule.units() if schedule.iteration(unit) >= start]
    assert list(rest.units()) == units and rest.num_units == len(units)
    for unit in units:
        assert rest.reads(unit) == schedule.reads(unit)
        assert all(f.block * schedule.gap + f.step >= start for f in rest.reads(unit))


def test_a_schedule_starts_where_it_can() -> None:
    schedule = Schedule(2, 6, 9, max_blocks_in_flight=3, refresh_every=5)
    assert [i for i in range(22) if schedule.is_restartable(i)] == [0, 5, 10, 15, 20]
    assert [schedule._refreshes(i) for i in range(4, 13)] == [False, True, True, False, False, False, True, True, False]
    assert replace(schedule, context="paper").is_restartable(7)
    assert not replace(schedule, context="paper", key_means=True).is_restartable(7)
    with pytest.raises(ValueError, match="start=7: needs what an earlier iteration left"):
        replace(schedule, start=7)


@settings(max_examples=300)
@given(schedules)
def test_features_take_as_many_slots_as_are_needed_at_once(schedule: Schedule) -> None:
    """Never overwritten before the last read (the validator), never kept longer, and no slot too many."""
    units = list(schedule.units())
    last_read = {f: at for at, unit in enumerate(units) for f in schedule.reads(unit)}
    made = {f: at for at, unit in enumerate(units) for f in schedule.writes(unit)}
    assert set(made) == set(last_read), "what is made is read"
    for side in ("head", "tail"):
        most = 0
        for at, unit in enumerate(units):
            kept = [f for f in made if f.side == side and made[f] <= at < last_read[f] and f.branch == unit.branch]
            most = max(most, len(kept))
        assert schedule.slots(side) == most or (schedule.refresh_every and schedule.slots(side) > most)


@pytest.mark.parametrize(("steps", "limit", "gap", "most"), [(50, 8, 7, 8), (50, 25, 2, 25), (50, 26, 2, 25),
                                                             (5, 9, 1, 5), (5, 1, 5, 1), (5, None, 1, 5)])  # fmt: skip
def test_blocks_enter_evenly_and_no_more_than_allowed(steps: int, limit: int | None, gap: int, most: int) -> None:
    schedule = Schedule(1, steps, 60, max_blocks_in_flight=limit)
    assert (schedule.gap, schedule.max_in_flight) == (gap, most)
    entered = {}
    iterations = range(59 * gap + steps)
    for iteration in iterations:
        assert 0 < len(schedule.in_flight(iteration)) <= most
        for block in schedule.in_flight(iteration):
            entered.setdefault(block, iteration)
    assert entered == {block: block * gap for block in range(60)}
    assert not schedule.in_flight(len(iterations))


def ticks(schedule: Schedule) -> tuple[int, int]:
    """Until the first block is finished, and until the last."""
    events = replay(schedule).events
    return next(e.end for e in events if e.action.op is Op.EMIT), max(e.end for e in events)


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize(("limit", "earlier", "longer"), [(8, 4.4, 1.05), (12, 3.6, 1.031), (24, 2.4, 1.016)])
def test_fewer_blocks_in_flight_give_the_first_frame_earlier(
    guidance: bool, limit: int, earlier: float, longer: float
) -> None:
    """T = 50, N = 4, M = 32: at least twice as early for at most 5 % more from K = 8 to 24."""
    free = Schedule(4, 50, 32, guidance=guidance)
    first, whole = ticks(free)
    first_limited, whole_limited = ticks(replace(free, max_blocks_in_flight=limit))
    assert first >= earlier * first_limited and whole_limited <= longer * whole


@pytest.mark.parametrize(("context", "version"), [("cached", "matching"), ("cached", "newest"), ("prior", "matching")])
def test_what_a_block_sees_of_its_neighbours(context: str, version: str) -> None:
    schedule = Schedule(1, 12, 9, context, 2, max_blocks_in_flight=3, context_version=version)
    unit = Unit(4, 6, 1)
    ahead = {"matching": 0, "newest": 3}[version] if context == "cached" else 4
    previous, next_ = schedule.previous_features(unit), schedule.next_features(unit)
    assert previous is not None and previous[:4] == ("tail", 3, 6 + ahead, 1)
    assert next_ is None if context == "prior" else next_ is not None and next_[:4] == ("head", 5, 2, 1)
    previous = schedule.previous_features(Unit(4, 11, 1))
    assert previous is not None and previous[:4] == ("tail", 3, 11, 1)
    assert replace(schedule, context="paper").previous_latents(unit) == 10
    assert replace(schedule, context="paper").previous_latents(Unit(4, 11, 1)) == 12


def test_slots_of_cached_with_few_blocks_in_flight() -> None:
    """Matching features take as many as without a limit, the newest ones one per block in flight."""
    limited = Schedule(4, 50, None, max_blocks_in_flight=8)
    assert limited.slots("tail") == replace(limited, max_blocks_in_flight=None).slots("tail") == 50
    assert replace(limited, context_version="newest").slots("tail") == 8


def test_blocks_in_flight_have_a_place_each() -> None:
    for blocks, steps, limit in ((7, 3, None), (2, 5, None), (None, 4, None), (7, 5, 2), (None, 7, 3)):
        schedule = Schedule(num_stages=1, num_steps=steps, num_blocks=blocks, max_blocks_in_flight=limit)
        flights = [list(schedule.in_flight(iteration)) for iteration in range(12)]
        assert max(map(len, flights)) == schedule.max_in_flight
        for flight in flights:
            assert len({schedule.place(Unit(block, 0, 0)) for block in flight}) == len(flight)
    three = Schedule(1, 5, None, max_blocks_in_flight=2, num_videos=3)
    places = {three.place(Unit(block, 0, 0, video)) for block in three.in_flight(21) for video in range(3)}
    assert three.places == 6 and places == set(range(6))


@settings(max_examples=100)
@given(schedules)
def test_the_order_of_units_does_not_depend_on_the_number_of_stages(schedule: Schedule) -> None:
    alone = replace(schedule, num_stages=1)
    assert list(schedule.units()) == list(alone.units())
    for unit in schedule.units():
        assert schedule.reads(unit) == alone.reads(unit)


@settings(max_examples=100)
@given(schedules, st.integers(1, 60))
def test_an_endless_schedule_starts_like_a_long_one(schedule: Schedule, units: int) -> None:
    endless = replace(schedule, num_blocks=None)
    validate(endless, units)
    long = replace(schedule, num_blocks=units + 1)
    assert list(islice(endless.units(), units)) == list(islice(long.units(), units))
    for unit in islice(endless.units(), units):
        strip = [f[:4] for f in endless.reads(unit)]
        assert strip == [f[:4] for f in long.reads(unit)]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("steps", "blocks"), [(8, 8), (8, 20), (50, 32), (12, 8)])
def test_idle_slots_without_guidance(stages: int, steps: int, blocks: int) -> None:
    """(N - 1)^2 idle slots per stage for min(T, M) >= N: the ramp, once up and once down."""
    schedule = Schedule(stages, steps, blocks, "cached", guidance=False)
    assert makespan(schedule) - steps * blocks == (stages - 1) ** 2


@pytest.mark.parametrize(
    ("stages", "steps", "blocks", "percent"),
    [(4, 50, 5, 3.5), (8, 50, 5, 41.2), (8, 50, 32, 3.0), (8, 8, 32, 16.1), (8, 4, 32, 43.1), (4, 4, 32, 6.6)],
)
def test_bubble_of_the_authors_order(stages: int, steps: int, blocks: int, percent: float) -> None:
    """Figures of an independent dependency simulation of the authors' code."""
    schedule = Schedule(stages, steps, blocks, "cached", guidance=False)
    assert 100 * bubble(schedule) == pytest.approx(percent, abs=0.05)


def test_guidance_fills_the_bubble_of_short_queues() -> None:
    with_guidance = Schedule(8, 4, 32, "cached", guidance=True)
    assert bubble(with_guidance) < bubble(Schedule(8, 4, 32, "cached", guidance=False)) / 4


@pytest.mark.parametrize("case", ["base_s6_b4_c2_n16", "one_s6_b4_c2_n4", "trace_s4_b2_c1_n6"])
def test_paper_order_and_versions_are_the_ideal_ones(golden: Path, case: str) -> None:
    config = json.loads((golden / case / "config.json").read_text())
    schedule = Schedule(1, config["sample_steps"], config["num_blocks"], "paper", config["num_cat"], guidance=False)
    rows = []
    for unit in schedule.units():
        previous = schedule.previous_latents(unit)
        rows.append([unit.block + unit.step, unit.block, unit.step, unit.step, -1 if previous is None else previous])
    assert rows == config["schedules"]["ideal"]


@settings(max_examples=100)
@given(schedules)
def test_each_of_several_videos_is_made_as_if_alone(schedule: Schedule) -> None:
    alone = replace(schedule, num_videos=1)
    for video in range(schedule.num_videos):
        own = [unit for unit in schedule.units() if unit.video == video]
        assert [unit._replace(video=0) for unit in own] == list(alone.units())
        for unit in own:
            reads = [f._replace(video=0)[:4] for f in schedule.reads(unit)]
            assert reads == [f[:4] for f in alone.reads(unit._replace(video=0))]
            assert all(f.video == video for f in schedule.reads(unit))


def utilisation(schedule: Schedule) -> float:
    """Share of stage-ticks with a unit, in the middle half of the schedule."""
    starts = [event.start for event in replay(schedule).events if event.action.op is Op.RUN]
    first, last = makespan(schedule) // 4, 3 * makespan(schedule) // 4
    return sum(first <= start < last for start in starts) / ((last - first) * schedule.num_stages)


@pytest.mark.parametrize(
    ("context", "alone", "two"), [("cached", 0.64, 1.0), ("paper", 0.5, 1.0), ("prior", 0.445, 0.885)]
)
def test_a_second_video_fills_the_bubble(context: str, alone: float, two: float) -> None:
    """T = 4, N = 8: a block comes back after 8 ticks, and one video has 4 units for them. With ``prior`` a block
    cannot follow its predecessor in fewer than 9 ticks: 8 of 9 is all that two videos can fill."""
    schedule = Schedule(8, 4, 32, context, guidance=False)
    assert utilisation(schedule) <= alone
    assert utilisation(replace(schedule, num_videos=2)) >= two
    assert utilisation(replace(schedule, num_videos=3)) == 1


def test_a_second_video_fills_the_bubble_of_few_blocks() -> None:
    """Four stages, one block under way at a time."""
    schedule = Schedule(4, 6, 3, guidance=False, max_blocks_in_flight=1)
    assert bubble(schedule) > 0.7
    assert bubble(replace(schedule, num_videos=4)) < 0.05


def test_grid_is_as_printed_in_the_documentation() -> None:
    schedule = Schedule(3, 2, 3, "cached", 1, guidance=False)
    assert grid(schedule) == (GOLDEN / "grid_3x2x3.txt").read_text().rstrip("\n")


def test_the_validator_finds_a_deadlock_and_shows_the_grid() -> None:
    with pytest.raises(ScheduleError, match=r"deadlock: stage 0 at 'send[\s\S]*tick  stage 0"):
        validate(TooLate(3, 2, 20, "cached", 1, depth=1))


class _StaleRead(Schedule):
    """cached, but reads the previous block's features of the step before."""

    def previous_features(self, unit: Unit) -> Features | None:
        found = super().previous_features(unit)
        return found and found._replace(step=max(0, found.step - 1))


class _OneSlot(Schedule):
    """cached with too few slots: a block overwrites what its successor still needs."""

    def _tail(self, unit: Unit) -> Features:
        return super()._tail(unit)._replace(slot=unit.block % 2)


class _EarlyRun(Schedule):
    """Does not wait for the block's own update."""

    def needs(self, unit: Unit) -> set[Unit]:
        return set()


class _LaterLatents(Schedule):
    """Wants its predecessor's latents a step further than they are."""

    def previous_latents(self, unit: Unit) -> int | None:
        found = super().previous_latents(unit)
        return None if found is None else found + 1


@pytest.mark.parametrize(
    ("broken", "context", "words"),
    [
        (_LaterLatents, "paper", "reads latents of block"),
        (_StaleRead, "cached", "would find"),
        (_OneSlot, "cached", "would find"),
        (_EarlyRun, "paper", "latents of block"),
    ],
)
def test_the_validator_finds_wrong_reads(broken: type[Schedule], context: str, words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        validate(broken(4, 5, 6, context, 2))


def test_policies_are_those_that_a_user_can_name() -> None:
    assert tuple(POLICIES) == CONTEXT_POLICIES
    assert all(policy.name == name for name, policy in POLICIES.items())
    assert set(VERSIONED_POLICIES) <= set(CONTEXT_POLICIES)


class _Trailing(Policy):
    """Features of the block before, one step cleaner: made in the iteration before. Each block keeps its last tail."""

    name = "trailing"
    reads_previous = True

    def steps_ahead(self, queue: BlockQueue) -> int:
        return queue.gap - 1

    def tail_slots(self, queue: BlockQueue) -> int:
        """One per block in flight, and one for the block that has just left."""
        return queue.num_videos * (1 - (-queue.num_steps // queue.gap))

    def tail_slot(self, queue: BlockQueue, unit: Unit) -> int:
        slots = self.tail_slots(queue) // queue.num_videos
        return unit.video * slots + unit.block % slots


class _Clashing(_Trailing):
    """The same with a slot less: the block that enters takes that of the one whose tail is still read."""

    def tail_slots(self, queue: BlockQueue) -> int:
        return queue.num_videos * -(-queue.num_steps // queue.gap)


def test_a_new_policy_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its row it goes through the schedule, the layout and the proof."""
    monkeypatch.setitem(POLICIES, "trailing", _Trailing())  # type: ignore[arg-type]
    for stages, limit, videos, refresh in itertools.product((1, 3), (None, 1, 2), (1, 2), (None, 6)):
        schedule = Schedule(
            stages, 5, 8, "trailing", 2, max_blocks_in_flight=limit, num_videos=videos, refresh_every=refresh
        )
        validate(schedule)
        assert schedule.slots("head") == 0 and not any(schedule.next_features(unit) for unit in schedule.units())
        assert any(schedule.previous_features(unit) for unit in schedule.units())
        assert not schedule.is_restartable(1) and schedule.is_restartable(6) == (refresh == 6)
    monkeypatch.setattr("dualparal.config.blocks.CONTEXT_POLICIES", tuple(POLICIES))
    layout = Layout(BlockConfig(4, 2, "trailing"), 12)  # type: ignore[arg-type]
    assert layout.num_blocks == 3 and layout.fed_context(1) == 0
    monkeypatch.setitem(POLICIES, "trailing", _Clashing())  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="would find"):
        validate(Schedule(3, 5, 8, "trailing", 2))


def test_actions_print_readably() -> None:
    assert str(Action(Op.RUN, 1, Unit(3, 2, 1))) == "run b3s2u"
    assert str(Action(Op.UPDATE, 0, Unit(3, 2, 0))) == "update b3s2"
    assert str(Action(Op.UPDATE, 0, Unit(3, 2, 0, 1))) == "update v1b3s2"


@pytest.mark.parametrize(
    "field", ["num_stages", "num_steps", "depth", "num_blocks", "max_blocks_in_flight", "num_videos"]
)
def test_impossible_numbers_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=0"):
        replace(Schedule(2, 2, 2), **{field: 0})


def test_units_that_stand_in_take_as_few_slots_as_will_do() -> None:
    """One or two more than without, whatever the steps and blocks; fewer could be overwritten before they are read."""
    only = (1, 3)
    for context, version, limit, more in (
        ("cached", "matching", None, {"head": 1, "tail": 0}),
        ("cached", "newest", 2, {"head": 1, "tail": 1}),
        ("prior", "matching", None, {"head": 0, "tail": 1}),
        ("paper", "matching", None, {"head": 1, "tail": 0}),
    ):
        whole = Schedule(2, 6, 9, context, max_blocks_in_flight=limit, context_version=version)
        some = replace(whole, conditional_only=only)
        assert {side: some.slots(side) - whole.slots(side) for side in ("head", "tail")} == more
    for wrong in ((3, 1), (1, 1), (6,), (-1,)):
        with pytest.raises(ValueError, match="conditional_only="):
            Schedule(2, 6, 9, conditional_only=wrong)
    with pytest.raises(ValueError, match="with guidance"):
        Schedule(2, 6, 9, guidance=False, conditional_only=only)
