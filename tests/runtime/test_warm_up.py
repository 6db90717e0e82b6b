"""The warm-up meets every shape that the run will have, refreshes included."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings

from dualparal.config.blocks import BlockConfig
from dualparal.runtime import warm_up
from dualparal.schedule.actions import Unit
from dualparal.schedule.layout import Layout
from dualparal.schedule.schedule import Schedule
from schedules import schedules


def shapes(schedule: Schedule, units: list[Unit]) -> set[object]:
    """All of a unit that a stage makes a shape of, but the step's own expert and format."""
    context = schedule.context_frames
    layout = Layout(BlockConfig(max(4, context), context, schedule.context), None)  # type: ignore[arg-type]
    found: set[object] = set()
    for unit in units:
        refresh = schedule.refreshes(unit)
        reads = tuple((features.side, features.step, features.refresh) for features in schedule.reads(unit))
        writes = tuple(features.side for features in schedule.writes(unit))
        fed = layout.fed_context(unit.block, refresh)
        found.add((unit.step, unit.branch, len(layout.window(unit.block, refresh)), fed, reads, writes, refresh))
    return found


@settings(max_examples=150)
@given(schedules)
@example(Schedule(2, 6, 35, "cached", 4, guidance=True, refresh_every=25))
@example(Schedule(2, 50, 35, "cached", 4, max_blocks_in_flight=3, context_version="newest", refresh_every=25))
def test_every_shape_is_met(schedule: Schedule) -> None:
    assume(schedule.num_blocks is not None)
    everything = [unit for unit in schedule.units() if unit.video == 0]
    assert shapes(schedule, list(warm_up._units(schedule))) == shapes(schedule, everything)


def test_without_an_end() -> None:
    endless = Schedule(2, 6, None, "prior", 2, refresh_every=7)
    long = replace(endless, num_blocks=60)
    units = [unit for unit in long.units() if unit.block < 40]
    assert shapes(endless, units) <= shapes(endless, list(warm_up._units(endless)))


def test_it_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a period of refreshes some are missed."""
    schedule = Schedule(2, 6, 35, "cached", 4, guidance=True, refresh_every=25)
    plain = replace(schedule, refresh_every=None)
    few = list(warm_up._units(plain))
    assert shapes(schedule, few) < shapes(schedule, [unit for unit in schedule.units() if unit.video == 0])
