"""Faults of ranks, many times over: seconds until they are named, until the last process is gone, and who was named.

    python bench/bench_faults.py [--repeats 20] [--only kill]

Ranks are processes without torch that hand blocks round (tests/workers/toy_pipeline.py) under the real supervisor, half
of the runs with a transport that never notices a dead peer, as NCCL may not. Every rank is hit in turn. Seconds count
from the fault itself: from the signal, or from the faulty rank's last word that it begins its block.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness.options import parser
from harness.record import record

from dualparal.launch.blame import Limits
from dualparal.launch.supervisor import Supervisor

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "workers" / "toy_pipeline.py"
RANKS = 3
FAULT_BLOCK = 5
LIMITS = Limits(heartbeat=2.0, progress=3.0, startup=60.0, grace=1.0)


@dataclass(frozen=True)
class Fault:
    """How a rank is hit: by a signal from outside, or by what the worker does itself, and what is to be said."""

    name: str
    words: str
    signal: int | None = None


FAULTS = [
    Fault("kill", "killed by SIGKILL", signal.SIGKILL),
    Fault("segv", "killed by SIGSEGV"),
    Fault("abort", "killed by SIGABRT"),
    Fault("raise", "out of memory"),
    Fault("exit0", "exited with code 0"),
    Fault("stop", "no heartbeat", signal.SIGSTOP),
    Fault("gil", "no heartbeat"),
    Fault("hang", "no progress"),
]


class Timed(Supervisor):
    """A supervisor that remembers when it knew."""

    known_at = 0.0

    def _fail(self, failure: Any) -> Any:
        self.known_at = time.monotonic()
        return super()._fail(failure)


def strike(fault: Fault, rank: int, deaf: bool) -> tuple[float, float, bool]:
    """One run: (seconds until the fault was named, until all processes were gone, whether rank and cause are right)."""
    pids: dict[int, int] = {}
    at: list[float] = []

    def hear(who: int, message: dict[str, Any]) -> None:
        if "pid" in message:
            pids[who] = message["pid"]
        if at or who != rank or message.get("phase") != "run" or message["block"] < FAULT_BLOCK:
            return
        if fault.signal is None:
            at.append(message["at"])
        else:
            at.append(time.monotonic())
            os.kill(pids[rank], fault.signal)

    env = {"PYTHONPATH": str(ROOT), "TOY_DEAF": "1" if deaf else ""}
    if fault.signal is None:
        env["TOY_FAULT"] = f"{fault.name}:{rank}"
    run = Timed([sys.executable, str(WORKER)], RANKS, env=env, limits=LIMITS, on_message=hear)
    result = run.run()
    gone = time.monotonic()
    left = [pid for pid in pids.values() if psutil.pid_exists(pid)]
    failure = result.failure
    right = failure is not None and failure.rank == rank and fault.words in failure.cause and not left
    if not right:
        print(f"  {fault.name} on rank {rank}{', deaf' if deaf else ''}: {failure}, left: {left}", file=sys.stderr)
    return run.known_at - at[0], gone - at[0], right


def measure(fault: Fault, deaf: bool, repeats: int) -> dict[str, Any]:
    found = [strike(fault, number % RANKS, deaf) for number in range(repeats)]
    named, gone, right = zip(*found)
    return {
        "fault": fault.name,
        "transport": "deaf" if deaf else "hearing",
        "repeats": repeats,
        "named_max_s": round(max(named), 3),
        "gone_max_s": round(max(gone), 3),
        "right_rank": f"{sum(right)}/{repeats}",
    }


def main() -> None:
    options = parser(__doc__, repeats=20).parse_args()
    faults = [fault for fault in FAULTS if options.only in fault.name]
    if not faults:
        raise SystemExit(f"--only {options.only}: use a part of {', '.join(fault.name for fault in FAULTS)}")
    rows = []
    for fault in faults:
        for deaf in (False, True):
            row = measure(fault, deaf, options.repeats)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    if not options.no_record:
        record("faults", rows, "cpu")


if __name__ == "__main__":
    main()
