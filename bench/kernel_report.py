"""Writes docs/kernels.md: what the Triton kernels compile to, for cards that need not be there.

Run from anywhere, with triton installed: ``python bench/kernel_report.py``. A few minutes on two cores.
"""

import argparse
from pathlib import Path

import triton

from dualparal.kernels.offline import ARCHS, offline_cases, row, write_table

HEADER = """\
# Triton kernels as machine code

Compiled without a GPU by `python bench/kernel_report.py`, Triton {version}. These are facts about the code, not
timings: nothing here was run. Registers are per thread, stack is bytes per thread (more than none means spills),
shared is bytes per thread block, `24x16` is 24 instructions that move 16 bytes each for one thread.
`tests/test_kernels_report.py` compiles the kernels anew and compares.

A row longer than the tile that one instruction per thread covers needs several; the narrow moves of
combine_guidance are its last thread block, the only one with a mask, those of qk_norm_rope the numbers of slots.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
    parser.add_argument("--out", type=Path, default=default, help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    rows = []
    for op, case in offline_cases():
        for arch in ARCHS:
            rows.append(row(op, case, case.compile(arch)))
            print(*rows[-1].values(), sep=" | ", flush=True)
    arguments.out.write_text(HEADER.format(version=triton.__version__) + write_table(rows))


if __name__ == "__main__":
    main()
