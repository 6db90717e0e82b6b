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
    if chosen.guards:
        return guards(chosen.seeds)
    return one(chosen.seed) if chosen.seed is not None else many(chosen.first, chosen.seeds)


def one(seed: int) -> int:
    """Plays a seed, and prints its log."""
    from virtual_effects import START, Broken
    from virtual_folders import check_folders
    from virtual_judge import check

    try:
        check_folders(seed)
        scenario = check(seed)
    except Broken as error:
        print(error)
        return 1
    for at, text in scenario.world.log:
        print(f"{at:9.3f}  {text}")
    print(scenario.run.schedule)
    print(f"kept: block {scenario.heard}; ended at {scenario.world.now - START:.3f}")
    return 0


def many(first: int, seeds: int) -> int:
    """Plays many seeds; of runs on one folder, which touch a disk, a tenth."""
    from virtual_effects import Broken
    from virtual_folders import check_folders
    from virtual_judge import check

    begin, broken = time.process_time(), 0
    for seed in range(first, first + seeds):
        try:
            check(seed)
            if seed % 10 == 0:
                check_folders(seed)
        except Broken as error:
            broken += 1
            print(str(error).splitlines()[0], flush=True)
    print(f"{seeds} seeds in {time.process_time() - begin:.1f} s of one core, {broken} broken")
    return 1 if broken else 0


def guards(seeds: int) -> int:
    """Prints the table of guards with the first seed that fails without each."""
    from mutants import GUARDS

    from virtual_guards import FILES, MORE, noticed

    print("| guard | in | first seed that fails without it |\n|---|---|---|")
    for guard in [*(guard for guard in GUARDS if guard.file in FILES), *MORE]:
        seed = noticed(guard, seeds)
        told = f"none of {seeds}" if seed is None else str(seed)
        print(f"| {guard.name} | `{guard.file.removeprefix('dualparal/')}` | {told} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
