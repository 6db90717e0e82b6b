"""The demo of this checkout against another's: seconds to the first frames that play, and to the whole video.

    git worktree add ../before COMMIT && make -C ../before .venv/.installed
    python bench/bench_demo.py ../before

Runs ``make demo`` of both in turn, so that a noisy machine hits both alike, each by its own interpreter, every rank on
one thread, and takes medians. Two clocks: from the start of the command, as a user waits (imports and reading of
weights are in it), and from the start of the run, as the closing line has it. Ratios above 1: this checkout is faster.
CPU, minutes.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness.options import parser
from harness.record import record

HERE = Path(__file__).resolve().parents[1]
CLOSING = re.compile(r", (?P<run_s>[\d.]+) s \(.*first frames after (?P<run_first_s>[\d.]+) s")


def demo(checkout: Path) -> dict[str, float]:
    """Runs the demo of a checkout that is installed. Returns the seconds of both clocks.

    Raises:
        RuntimeError: it failed, or said no time.
    """
    began = time.perf_counter()
    # What is installed is taken as it is: a build in the middle would be timed.
    command = ["make", "--silent", "--assume-old=.venv/.installed", "demo"]
    # Of a make that runs this, neither its flags nor its job server are meant for the one that is timed.
    given = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    running = subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=given | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert running.stderr is not None
    first, said, closing = None, [], None
    for line in running.stderr:
        said.append(line)
        closing = CLOSING.search(line) or closing
        if first is None and line.startswith("block "):
            first = time.perf_counter() - began
    code = running.wait()
    if code or first is None or closing is None:
        raise RuntimeError(f"make demo in {checkout} ended with {code}:\n{''.join(said[-20:])}")
    times = {"first_s": first, "seconds": time.perf_counter() - began}
    return times | {name: float(value) for name, value in closing.groupdict().items()}


def commit(checkout: Path) -> str:
    """The commit of a checkout, short."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("other", type=Path, help="the other checkout, installed in its .venv")
    arguments = options.parse_args()
    sides = {"other": arguments.other.resolve(), "this": HERE}
    for checkout in sides.values():
        if not (checkout / ".venv" / "bin" / "dualparal").exists():
            sys.exit(f"{checkout}: not installed; run make .venv/.installed there")
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(arguments.repeats):
        for side, checkout in sides.items():
            runs[side].append(demo(checkout))
            print(f"{side:5s} {runs[side][-1]}", flush=True)
    row: dict[str, object] = {"rival": commit(sides["other"]), "repeats": arguments.repeats}
    for name in runs["this"][0]:
        other, this = (statistics.median(run[name] for run in runs[side]) for side in ("other", "this"))
        row |= {f"rival_{name}": round(other, 2), name: round(this, 2), f"{name}_ratio": round(other / this, 2)}
        print(f"demo {name:11s} {row['rival']} {other:7.2f} s | this {this:7.2f} s | {other / this:.2f}x")
    if not arguments.no_record:
        record("demo", [row], "cpu")


if __name__ == "__main__":
    main()
