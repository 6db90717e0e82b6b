"""Everything that needs a GPU, in one command of at most nine minutes; no network.

    pip install --no-build-isolation --no-deps -e .       # builds the CUDA ops for this card
    python bench/gpu_suite.py [--out FOLDER]

First the checks (every op against fp32 truth, the engine with several stages on one card, eager and captured), then
the benches at the real shapes. A part that fails or runs out of time does not stop the next; the exit code says
whether all went well. Rows go to bench/results/, and with --out a copy and the full log go there. At the end each
figure that was predicted stands beside the one that was found. With two cards the engine runs over NCCL besides.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from harness.predictions import verdicts
from harness.record import commit

ROOT = Path(__file__).parents[1]
MINUTES = 9.0

# Only these: the rest of the tests needs packages that a bare GPU machine may lack, and no GPU.
TESTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_kernels_*.py"))
# By itself: this kernel has never run, and a crash would take the tests after it along.
HOPPER = "tests/kernels/test_kernels_attention_hopper.py"
TESTS.remove(HOPPER)
TIMELINE = ROOT / "bench" / "results" / "captured.json.gz"
PYTEST = ["-m", "pytest", "-q", "--timeout", "120", "-p", "no:cacheprovider", "-m"]
ENGINE = "tests/engine/test_gpu.py"

# name, share of the time, command. In order of worth: what is cut off at the end is missed least.
PARTS = [
    ("doctor", 0.04, ["-m", "dualparal.cli.doctor"]),
    ("engine", 0.22, [*PYTEST, "gpu and not multi_gpu and not sanitizer", ENGINE]),
    ("two cards", 0.08, [*PYTEST, "multi_gpu", ENGINE]),
    ("ops", 0.14, [*PYTEST, "gpu", *TESTS]),
    ("layer and block-step", 0.18, ["bench/bench_layer.py", "--no-compile", "--seconds", "2"]),
    ("passes beside attention", 0.05, ["bench/bench_ops.py"]),
    ("attention for Hopper", 0.09, [*PYTEST, "gpu", HOPPER]),
    ("attention", 0.10, ["bench/bench_attention.py"]),
    ("graphs", 0.10, ["bench/bench_graphs.py", "--repeats", "2", "--timeline", str(TIMELINE)]),
    ("sanitizer", 0.0, [*PYTEST, "sanitizer", ENGINE]),  # in the time that is left
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for a copy of the results and the log")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    log: list[str] = []
    failed = []
    for name, share, command in PARTS:
        if command[0].endswith(".py") and not (ROOT / command[0]).exists():
            raise FileNotFoundError(command[0])
        # Time that earlier parts left over goes to the later ones.
        left = deadline - time.monotonic()
        limit = max(10.0, min(left, 60 * arguments.minutes * share + max(0.0, left - 60 * arguments.minutes * 0.6)))
        started = time.monotonic()
        print(f"== {name} (at most {limit:.0f} s)", flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, timeout=limit, text=True, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            text, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as expired:
            text, code = (expired.stdout or b"").decode(errors="replace"), -1  # type: ignore[union-attr]
        took = time.monotonic() - started
        if code:
            failed.append(name)
        verdict = "ok" if code == 0 else "out of time" if code == -1 else f"exit code {code}"
        print(f"{text.rstrip()}\n== {name}: {verdict}, {took:.0f} s", flush=True)
        log.append(f"== {name}: {verdict}, {took:.0f} s\n{text}")
    against = "\n".join(verdicts(ROOT / "bench" / "results", commit()))
    print(f"== against docs/gpu.md\n{against}")
    log.append(f"== against docs/gpu.md\n{against}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "suite.log").write_text("\n".join(log))
        results = ROOT / "bench" / "results"
        for path in [*results.glob("*.csv"), *results.glob(TIMELINE.name)]:
            shutil.copy(path, arguments.out)
    print(f"== {len(PARTS) - len(failed)} parts ok" + (f", not: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
