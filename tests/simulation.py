"""A supervisor and its ranks in virtual time, many seeds of it: the command.

python tests/simulation.py --seed 17         # one, with its log
python tests/simulation.py --seeds 10000     # all of them, in some minutes on one core
python tests/simulation.py --guards          # which seed notices that a guard is gone
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="one seed, with its log")
    parser.add_argument("--seeds", type=int, default=10000, help="this many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--guards", action="store_true", help="take out guards one by one, each for --seeds")
    chosen = parser.parse_args()
    from virtual_judge import Broken, check

    if chosen.seed is not None:
        scenario = None
        try:
            scenario = check(chosen.seed)
        except Broken as error:
            print(error)
            return 1
        for at, text in scenario.world.log:
            print(f"{at:9.3f}  {text}")
        print(scenario.run.schedule)
        return 0
    begin, broken = time.monotonic(), []
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        try:
            check(seed)
        except Broken as error:
            broken.append(seed)
            print(str(error).splitlines()[0])
    print(f"{chosen.seeds} seeds in {time.monotonic() - begin:.1f} s, {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
