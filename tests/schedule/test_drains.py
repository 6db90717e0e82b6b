"""A device may drain before any action of any stage, and no stage hangs: the order of work and the rule of posting."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.config.blocks import CONTEXT_POLICIES
from dualparal.schedule import drains
from dualparal.schedule.actions import Op
from dualparal.schedule.drains import check_drains
from dualparal.schedule.replay import ScheduleError
from dualparal.schedule.schedule import Schedule
from schedules import TooLate, schedules


@settings(max_examples=60)
@given(schedules)
def test_no_drain_hangs(schedule: Schedule) -> None:
    check_drains(schedule)


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("context", CONTEXT_POLICIES)
def test_at_real_lengths_and_without_an_end(stages: int, context: str) -> None:
    for steps, depth, videos in ((4, 1, 1), (4, 3, 2), (50, 2, 1)):
        endless = Schedule(stages, steps, None, context, 4, depth=depth, num_videos=videos)
        check_drains(endless, units=150)


@settings(max_examples=40)
@given(st.integers(2, 8), st.integers(2, 7), st.sampled_from(CONTEXT_POLICIES), st.integers(1, 4))
def test_receives_posted_ahead_hang(stages: int, steps: int, context: str, depth: int) -> None:
    """With transfers as they were: a capture in the middle of a run never came back."""
    with pytest.raises(ScheduleError, match=r"a drain of the device would hang: .*drain of stage \d at .*message"):
        check_drains(Schedule(stages, steps, 9, context, 1, depth=depth), ahead=True)


def test_an_order_that_hangs_by_itself_is_found() -> None:
    with pytest.raises(ScheduleError, match="would hang"):
        check_drains(TooLate(3, 2, 20, "cached", 1, depth=1))


def test_the_cycle_is_told_in_words_and_can_be_followed() -> None:
    schedule = Schedule(2, 4, 4, "cached", 1)
    with pytest.raises(ScheduleError) as told:
        check_drains(schedule, ahead=True)
    cycle = str(told.value).removeprefix("a drain of the device would hang: ").split(" <- ")
    assert cycle[0] == cycle[-1] and len(cycle) > 3
    actions = [list(schedule.actions(stage)) for stage in range(2)]
    graph = drains.wait_for(schedule, actions, ahead=True)
    names = {drains._name(actions, node): node for node in graph}
    for one, other in itertools.pairwise(cycle):
        assert names[one] in graph[names[other]] or names[other] in graph[names[one]]


def test_every_wait_counts() -> None:
    """A send waits for a buffer of the receiver, a receive for its header: as many as there are messages."""
    schedule = Schedule(3, 2, 5, "cached", 1, guidance=True, depth=2)
    actions = [list(schedule.actions(stage)) for stage in range(3)]
    graph = drains.wait_for(schedule, actions, ahead=False)
    across = [(a, b) for a, on in graph.items() for b in on if a[0] == b[0] == "host" and a[1] != b[1]]
    messages = sum(action.op is Op.SEND for own in actions for action in own)
    assert len(across) == messages + messages - 3 * 2
