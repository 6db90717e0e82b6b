"""Simulated against executed: the real executor over gloo, N processes, stages that sleep for a known time. CPU.

    python bench/bench_simulate.py [--only 'N=2 T=4'] [--unit 0.02]

Two comparisons per case:

* nominal: every unit takes the length of its sleep, messages take none. On an idle machine this is the claim
  (makespan within 5 %, bubble within 2 points). ``jitter`` says how much too long this machine's sleeps were, as a
  share of the unit: where it is above a few percent, the nominal figures judge the machine and not the simulator.
* timed: units take what they took in this very run, with what the host did between them, and so do messages whose
  receiver was waiting for them. What is left to the simulator is who waits for whom, and that must hold on a busy
  machine, too.

The order of actions is compared exactly, on every rank.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import options
from harness.record import record

from dualparal.launch.blame import Limits
from dualparal.launch.supervisor import supervise
from dualparal.schedule.actions import Unit
from dualparal.schedule.replay import Costs
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.simulate import Simulation, simulate

WORKER = Path(__file__).parent / "harness" / "sleeping_rank.py"
LIMITS = Limits(heartbeat=120.0, progress=600.0, startup=300.0)


@dataclass(frozen=True)
class Outcome:
    """One case: what was measured, and both simulations of it."""

    schedule: Schedule
    seconds: Sequence[float]  # of a unit, per stage
    same_order: bool
    makespan: float
    bubble: float
    jitter: float
    nominal: Simulation
    timed: Simulation

    @property
    def timed_bubble(self) -> float:
        """With the time in units as measured: what the host did between them is no unit."""
        return 1 - (1 - self.bubble) * self.makespan / self.timed.seconds

    @property
    def row(self) -> dict[str, object]:
        s = self.schedule
        return {
            "stages": s.num_stages,
            "steps": s.num_steps,
            "blocks": s.num_blocks,
            "context": s.context,
            "guidance": s.guidance,
            "unit_ms": round(1e3 * sum(self.seconds) / len(self.seconds), 1),
            "same_order": self.same_order,
            "makespan_s": round(self.makespan, 3),
            "timed": round(self.timed.seconds / self.makespan, 4),
            "bubble": round(self.bubble, 4),
            "timed_bubble": round(self.timed_bubble, 4),
            "nominal": round(self.nominal.seconds / self.makespan, 4),
            "nominal_bubble": round(self.nominal.bubble, 4),
            "jitter": round(self.jitter, 4),
        }


def case(schedule: Schedule, seconds: Sequence[float]) -> dict[str, Any]:
    """For ``run_cases``: blocks of two latents."""
    assert schedule.num_blocks is not None and len(seconds) == schedule.num_stages
    more = schedule.context_frames if schedule.context == "paper" else 0  # the first block is longer
    fields = {name: getattr(schedule, name) for name in schedule.__dataclass_fields__}
    return {"schedule": fields, "latents": 2 * schedule.num_blocks + more, "seconds": list(seconds)}


def run_cases(cases: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Runs cases of one number of stages, one after the other, in one set of processes."""
    stages = len(cases[0]["seconds"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "cases.json").write_text(json.dumps(cases))
        result = supervise([sys.executable, str(WORKER), folder], stages, limits=LIMITS, env={"OMP_NUM_THREADS": "1"})
        assert result.failure is None and result.exit_code == 0, result
        ranks = [json.loads((path / f"rank{rank}.json").read_text()) for rank in range(stages)]
    return [_compare(each, [rank[number] for rank in ranks]) for number, each in enumerate(cases)]


def _compare(case: dict[str, Any], ranks: list[dict[str, Any]]) -> Outcome:
    schedule, seconds, n = Schedule(**case["schedule"]), case["seconds"], len(ranks)
    nominal = simulate(schedule, Costs(run=lambda stage, unit: seconds[stage]))
    done = [
        [(op, Unit(*unit), start) for op, *unit, start in rank["log"]] for rank in ranks
    ]  # an action ends where the next one starts
    ends = [[*(start for _, _, start in rank[1:]), ranks[k]["end"]] for k, rank in enumerate(done)]
    expected = [[(event.action.op.value, event.action.unit) for event in nominal.events[k]] for k in range(n)]
    first = min(start for rank in done for op, _, start in rank if op == "run")
    makespan = max(start for op, _, start in done[0] if op == "emit") - first
    busy = sum(rank["busy"] for rank in ranks)
    slept = sum(seconds) * (schedule.num_units or 0)
    return Outcome(
        schedule,
        seconds,
        [[(op, unit) for op, unit, _ in rank] for rank in done] == expected,
        makespan,
        1 - busy / (n * makespan),
        busy / slept - 1,
        nominal,
        simulate(schedule, _timed(schedule, done, ends)),
    )


def _timed(schedule: Schedule, done: list[list[tuple[str, Unit, float]]], ends: list[list[float]]) -> Costs:
    """Lengths of the run itself. What the host does between two units counts to the second of them, waiting does not;
    a message takes from its sending to its arrival where somebody waited for it, and no time where nobody did.
    """
    n = schedule.num_stages
    times = [
        {(op, unit): (start, end) for (op, unit, start), end in zip(actions, finish, strict=True)}
        for actions, finish in zip(done, ends, strict=True)
    ]
    units = list(schedule.units())
    earlier = dict(zip(units[schedule.depth :], units, strict=False))  # whose buffer a message takes
    runs: dict[tuple[int, Unit], float] = {}
    transfers: dict[tuple[int, Unit], float] = {}
    for stage, actions in enumerate(done):
        host = 0.0
        for op, unit, _ in actions:
            start, end = times[stage][op, unit]
            if op == "run":
                runs[stage, unit], host = host + end - start, 0.0
            elif op == "recv":
                sent = times[stage - 1]["send", unit][1]
                transfers[(stage - 1) % n, unit] = end - sent if start < sent else 0.0
                host += 0.0 if start < sent else end - start
            elif op == "send" and unit in earlier:
                free = times[(stage + 1) % n]["recv", earlier[unit]][1]
                host += max(0.0, end - max(start, free))
            else:
                host += end - start
    return Costs(
        run=lambda stage, unit: runs[stage, unit],
        transfer=lambda edge, unit: transfers[edge, unit],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--unit", type=float, default=0.02, help="seconds of a unit (default: %(default)s)")
    asked = parser.parse_args(arguments)
    found = []
    for stages in (2, 4, 8):
        cases = [
            case(Schedule(stages, steps, blocks, context, 1, guidance=False, decode=False), [asked.unit] * stages)
            for steps, blocks, context in itertools.product((4, 8, 50), (5, 32), ("cached", "prior", "paper"))
            if asked.only in f"N={stages} T={steps} M={blocks} {context}"
        ]
        rows = [outcome.row for outcome in run_cases(cases)] if cases else []
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        found += rows
    if not found:
        raise SystemExit(f"--only {asked.only!r}: no such case; they are called 'N=2 T=4 M=5 cached' and so on")
    if not asked.no_record:
        record("simulate", found)


if __name__ == "__main__":
    main()
