"""Plans with steps that are not run: units, time and memory follow."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from dualparal.cli.main import app
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.models.wan.sizes import MODELS
from dualparal.planning.closed_form import closed_form
from dualparal.planning.cost import Costing
from dualparal.planning.devices import DEVICES, LINKS
from dualparal.planning.memory import stage_memory
from dualparal.planning.planner import plan
from dualparal.planning.workload import Workload
from dualparal.schedule.actions import Unit
from dualparal.schedule.simulate import simulate

WAYS = [{"reuse": "mild"}, {"reuse": "strong"}, {"reuse": "steps=2,uncond=3,order=2", "context": "paper"},
        {"reuse": "uncond=2,from=0.5", "max_blocks_in_flight": 8}]  # fmt: skip


def work(**options: Any) -> Workload:
    return Workload(MODELS["wan2.1-t2v-1.3b"], VideoConfig(num_frames=2049), EngineConfig.of(**options))


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_closed_form_and_the_replay_count_the_same_units(options: dict[str, Any]) -> None:
    asked = work(**options)
    schedule = asked.schedule(4)
    costing = Costing(asked, schedule, [8, 8, 7, 7], [DEVICES["h100"]] * 4, [LINKS["nvlink4"]] * 4)
    replayed = simulate(schedule, costing.costs)
    unit = [costing.run(stage, Unit(2, schedule.gap, 0)) for stage in range(4)]
    found = closed_form(schedule, unit, 4 * costing.transfer(0, Unit(0, 0, 0)), costing.decode(1))
    assert found.seconds == pytest.approx(replayed.seconds, rel=0.11)
    assert found.first_frame == pytest.approx(replayed.first_frame, rel=0.15)
    units = 2 * len(asked.steps.runs) - len(asked.steps.conditional_only)
    assert schedule.num_units == units * (asked.layout.num_blocks or 0)
    busy = sum(stage.busy for stage in replayed.stages) / sum(unit)
    assert busy == pytest.approx(schedule.num_units, rel=0.05)


def test_velocities_that_are_kept_are_counted_and_slots_of_steps_that_are_not_run_are_not() -> None:
    whole, held, bent = (work(reuse=text) for text in ("off", "steps=2,order=0", "steps=2,order=2"))
    first, middle = [], []
    for asked in (whole, held, bent):
        schedule = asked.schedule(3)
        first.append(stage_memory(asked, schedule, [10, 10, 10], 0))
        middle.append(stage_memory(asked, schedule, [10, 10, 10], 1))
        assert schedule.slots("tail") == len(asked.steps.runs)
    assert [asked.steps.kept for asked in (whole, held, bent)] == [0, 2, 6]
    one = 4 * 16 * 60 * 104 * 8  # float32 latents of a block
    assert first[2].latents - first[1].latents == 4 * one * held.schedule(3).places
    assert middle[0].features == pytest.approx(middle[1].features * 51 / 27)
    assert middle[1].latents == 0


def test_the_command_says_what_is_run() -> None:
    asked = ["plan", "--num-frames", "257", "--gpus", "2xh100", "--reuse"]
    done = CliRunner().invoke(app, [*asked, "strong"])
    assert done.exit_code == 0 and "36 of 100 forwards of a block are run" in " ".join(done.output.split())
    ways = [plan("wan2.1-t2v-1.3b", "2xh100", num_frames=257, reuse=name).seconds for name in ("off", "mild", "strong")]
    assert ways == sorted(ways, reverse=True) and f"{ways[-1]:.0f} s" in done.output
    refused = CliRunner().invoke(app, [*asked, "wild"])
    assert "use one of off, mild, strong" in str(refused.exception)
