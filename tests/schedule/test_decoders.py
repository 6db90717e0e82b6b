"""Who decodes, as a part of the schedule: beside stage 0, on places of its own, or in parts beside every stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.config.engine import EngineConfig
from dualparal.config.reuse import REUSE_OFF
from dualparal.config.video import VideoConfig
from dualparal.schedule.actions import DECODE_BOUND, Action, Op
from dualparal.schedule.replay import Costs, ScheduleError, grid, replay
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.simulate import Sizes, simulate
from dualparal.schedule.validate import validate
from schedules import schedules

DECODERS: list[dict[str, Any]] = [{}, {"decode_in_place": True}, {"decode_ranks": 2}]


@settings(max_examples=200)
@given(schedules)
def test_every_place_that_decodes_takes_every_block(schedule: Schedule) -> None:
    """In the order in which stage 0 emits them, and hands them over; who decodes changes nothing else."""
    n, ranks = schedule.num_stages, schedule.decode_ranks
    assert len(schedule.decoders) == (0 if not schedule.decode else n if schedule.decode_in_place else ranks or 1)
    assert schedule.decoders.start == (n if ranks else 0)
    first = list(schedule.actions(0))
    emitted = [action.unit for action in first if action.op is Op.EMIT]
    assert len(emitted) == len(set(emitted)) == schedule.num_videos * (schedule.num_blocks or 0)
    after = [action for emit, action in itertools.pairwise(first) if emit.op is Op.EMIT]
    assert not schedule.decode or after == [Action(Op.DECODE, 0, unit) for unit in emitted]
    for place in schedule.decoders:
        assert list(schedule.decodes(place)) == [Action(Op.DECODE, place, unit) for unit in emitted]
    beside = replace(schedule, decode_ranks=0, decode_in_place=False)
    for stage in range(n):
        assert list(schedule.actions(stage)) == list(beside.actions(stage))
    for place in range(n, n + ranks):
        assert list(schedule.actions(place)) == list(schedule.decodes(place))


class _ByVideo(Schedule):
    """The places that decode take the blocks of one video after those of another."""

    def decodes(self, place: int) -> Iterator[Action]:
        return iter(sorted(super().decodes(place), key=lambda action: (action.unit.video, action.unit.block)))


class _Again(Schedule):
    """The last place decodes one block twice."""

    def decodes(self, place: int) -> Iterator[Action]:
        actions = list(super().decodes(place))
        return iter(actions + actions[:1] if place == self.decoders[-1] else actions)


class _Kept(Schedule):
    """Stage 0 hands nothing over."""

    def actions(self, place: int) -> Iterator[Action]:
        return (action for action in super().actions(place) if place or action.op is not Op.DECODE)


@pytest.mark.parametrize("decoders", DECODERS, ids=str)
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (
            _ByVideo,
            r"place {first} decodes \[\(0, 0\), \(0, 1\)[^\n]* <- blocks leave in the order \[\(0, 0\), \(1, 0\)",
        ),
        (_Again, r"place {last} decodes [^\n]*\(1, 3\), \(0, 0\)\] <- blocks leave in the order"),
        (_Kept, r"stage 0 hands over \[\] <- blocks leave in the order"),
    ],
)
def test_the_validator_finds_blocks_that_are_not_decoded_as_they_leave(
    decoders: dict[str, Any], broken: type[Schedule], words: str
) -> None:
    schedule = broken(3, 4, 4, "cached", 1, num_videos=2, **decoders)
    with pytest.raises(ScheduleError, match=words.format(first=schedule.decoders[0], last=schedule.decoders[-1])):
        validate(schedule)


def test_places_that_decode_are_a_choice_of_the_engine() -> None:
    def of(video: VideoConfig, **options: Any) -> Schedule:
        steps = REUSE_OFF.plan([1.0, 0.5], video.guidance)
        return Schedule.of(EngineConfig.of(**options), video, num_stages=3, steps=steps, num_blocks=4, num_videos=1)

    frames, latents = VideoConfig(), VideoConfig(output_type="latent")
    assert of(frames).decoders == range(1)
    assert of(frames, decode_ranks=2).decoders == range(3, 5)
    assert of(frames, decode_in_place=True).decoders == range(3)
    for options in DECODERS:
        assert of(latents, **options) == of(latents) and not of(latents, **options).decoders


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"decode_ranks": -1}, "decode_ranks=-1"),
        ({"decode_ranks": 1, "decode_in_place": True}, "one of them decodes"),
        ({"decode_ranks": 1, "decode": False}, "leave out decode_ranks"),
        ({"decode_in_place": True, "decode": False}, "leave out decode_ranks"),
    ],
)
def test_impossible_places_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(2, 2, 2, **wrong)


def test_the_grid_shows_places_that_only_decode() -> None:
    """A block is decoded when stage 0 has taken its last velocity; that takes no ticks."""
    schedule = Schedule(2, 2, 3, "cached", 1, guidance=False, decode_ranks=1)
    assert grid(schedule).splitlines() == [
        "tick  stage 0      stage 1      place 2",
        "   0  run b0s0c    .            .",
        "   1  run b1s0c    run b0s0c    .",
        "   2  run b0s1c    run b1s0c    .",
        "   3  run b2s0c    run b0s1c    .",
        "   4  run b1s1c    run b2s0c    .",
        "   5  run b2s1c    run b1s1c    decode b0s1",
        "   6  .            run b2s1c    decode b1s1",
        "   7  .            .            decode b2s1",
    ]
    assert max(event.end for event in replay(schedule).events) == 7


# Time -------------------------------------------------------------------------------------------------------


def test_places_of_their_own_counted_by_hand() -> None:
    """Nothing is shared with stage 0; latents travel; stage 0 waits while two blocks are not decoded."""
    schedule = Schedule(1, 2, 4, "cached", 1, guidance=False, decode_ranks=2)
    costs = Costs(run=lambda stage, unit: 1.0, decode=lambda block: 0.5, decode_shares=True, hand_over=lambda b: 0.25)
    quick = simulate(schedule, costs)
    assert quick.ready == {(0, 0): 3.75, (0, 1): 5.75, (0, 2): 7.75, (0, 3): 8.75}
    assert quick.decoders == ((2.0, 6.75, 0.0),) * 2 and quick.bubble == pytest.approx(0.75 / 8.75)
    slow = simulate(schedule, replace(costs, decode=lambda block: 10.0))
    assert [event.end for event in slow.events[2]] == [13.25, 23.25, 33.25, 43.25] == sorted(slow.ready.values())
    hands = [event.end for event in slow.events[0] if event.action.op is Op.DECODE]
    assert hands == [3.0, 5.0, 13.25, 23.25]  # the first was decoded, the second was
    assert slow.decoders[1] == (40.0, 3.25, 0.0) and slow.seconds == 43.25
    rows = slow.memory(2, Sizes(5, {"head": 0, "tail": 0}, block=3, decode=7))
    assert [row[:5] for row in rows[:2]] == [(0.0, 5, 0, 0, 0), (3.25, 5, 0, 0, 7)]
    assert rows[-1][:5] == (43.25, 5, 0, 0, 0)
    assert max(row.decode for row in slow.memory(0, Sizes(5, {"head": 0, "tail": 0}, decode=7))) == 0


def test_in_place_counted_by_hand() -> None:
    """Two stages: each decodes its part at half speed while it runs a unit, and at full speed while it does not."""
    one = Schedule(2, 1, 1, "cached", 0, guidance=False, decode_in_place=True)
    costs = Costs(run=lambda stage, unit: 1.0, decode=lambda block: 4.0, decode_shares=True, hand_over=lambda b: 0.5)
    found = simulate(one, costs)
    assert [[(e.start, e.end) for e in own] for own in found.decoding] == [[(2.0, 6.0)], [(2.5, 6.5)]]
    assert found.ready == {(0, 0): 6.5} and found.decoders == ()
    two = simulate(replace(one, num_blocks=2), replace(costs, hand_over=lambda block: 0.0))
    # Block 0 leaves at 2. Stage 1 had begun the next unit by then, and decodes from 3 on.
    assert [[(e.start, e.end) for e in own] for own in two.decoding] == [[(2, 6), (6, 10)], [(3, 7), (7, 11)]]
    assert two.ready == {(0, 0): 7, (0, 1): 11} and two.seconds == 11
    # A unit of stage 1 that begins at 8, while it decodes: both at half speed until 10, when half a second is left.
    slow = replace(one, num_steps=2, max_blocks_in_flight=1, num_blocks=2)
    long = simulate(slow, replace(costs, update=0.5))
    assert [(e.start, e.end) for e in long.events[1] if e.action.op is Op.RUN][-1] == (8.0, 10.0)
    assert [(e.start, e.end) for e in long.decoding[1]] == [(5.5, 10.5), (11.0, 15.0)]


def test_stage_0_waits_for_every_part() -> None:
    """In place, a block is decoded when its last part is: stage 1, of which each unit takes three times as long, is
    behind, and stage 0 hands over its third block when stage 1 is through with the first."""
    schedule = Schedule(2, 1, 6, "cached", 0, guidance=False, decode_in_place=True)
    costs = Costs(run=lambda stage, unit: 1.0 + 2 * stage, decode=lambda block: 6.0, decode_shares=True)
    found = simulate(schedule, costs)
    hands = [event.end for event in found.events[0] if event.action.op is Op.DECODE]
    first, other = ([event.end for event in own] for own in found.decoding)
    assert hands[2:] == other[:4] and all(one < two for one, two in zip(first, other, strict=True))


@settings(max_examples=200)
@given(schedules, st.floats(0, 6), st.sampled_from([0.0, 0.3]), st.booleans())
def test_decoding_takes_its_time(schedule: Schedule, part: float, hand_over: float, shares: bool) -> None:
    """By whomever: every place decodes all blocks in order, one at a time, each after it was handed over, no earlier
    than its bound allows. No device does more than it can, and no more time passes than one after the other takes, and
    a unit: a device does what is ready first, which may not be what others wait for."""
    costs = Costs(
        run=lambda stage, unit: 1.0, decode=lambda block: part, decode_shares=shares, hand_over=lambda block: hand_over
    )
    found, blocks = simulate(schedule, costs), schedule.num_videos * (schedule.num_blocks or 0)
    assert len(found.ready) == blocks and len(found.decoding) == len(schedule.decoders)
    handed = [event.end for event in found.events[0] if event.action.op is Op.DECODE]
    for place, own in zip(schedule.decoders, found.decoding, strict=True):
        assert [event.action for event in own] == list(schedule.decodes(place))
        assert all(one.end <= other.start + 1e-9 for one, other in itertools.pairwise(own))
        assert all(event.end - event.start >= part - 1e-9 for event in own)
        for number, (event, after) in enumerate(zip(own, handed, strict=True)):
            assert event.start >= after + (hand_over if place else 0) - 1e-9
            assert number < DECODE_BOUND or after >= own[number - DECODE_BOUND].end - 1e-9
            assert event.end <= found.ready[event.action.unit.video, event.action.unit.block]
        if shares and place < schedule.num_stages:
            runs = [event for event in found.events[place] if event.action.op is Op.RUN]
            end = max(runs[-1].end, own[-1].end)
            assert end - runs[0].start >= len(runs) + part * blocks - 1e-6
    alone = replace(schedule, decode=False, decode_ranks=0, decode_in_place=False)
    least = simulate(alone, Costs(run=lambda stage, unit: 1.0)).seconds
    each = part * (schedule.num_stages if schedule.decode_in_place and shares else 1)
    assert least - 1e-9 <= found.seconds <= least + 1 + blocks * (each + hand_over) + 1e-6


def test_in_place_fills_the_idle_time_of_every_stage() -> None:
    """A quarter of the decoding on each of four devices: near the least that four devices can do; beside stage 0 alone,
    or on a fifth, it is the decoder that takes the time."""
    schedule = Schedule(4, 4, 24, "cached", 4, guidance=False)
    costs = lambda parts: Costs(run=lambda s, u: 1.0, decode=lambda b: 12.0 / parts, decode_shares=True)  # noqa: E731
    beside, fifth = (simulate(replace(schedule, decode_ranks=ranks), costs(1)).seconds for ranks in (0, 1))
    in_place = simulate(replace(schedule, decode_in_place=True), costs(4)).seconds
    assert 24 * (4 + 12 / 4) <= in_place < 1.12 * 24 * (4 + 12 / 4)
    assert min(beside, fifth) > 24 * 12
