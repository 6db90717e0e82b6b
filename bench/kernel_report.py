"""Renews the tables of docs/kernels.md: what the kernels compile to, for cards that need not be there.

Run from anywhere, with triton installed, and nvcc on the PATH for the kernel for Hopper, whose table is left as it is
without: ``python bench/kernel_report.py``. A few minutes on two cores.
"""

import argparse
import re
import shutil
from pathlib import Path

import triton

from dualparal.kernels.offline import hopper_reports, hopper_row, offline_cases, replace_table, row

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "docs" / "kernels.md"
    parser.add_argument("--out", type=Path, default=default, help="file with the tables (default: %(default)s)")
    arguments = parser.parse_args()
    rows = []
    for op, case in offline_cases():
        for arch in case.archs:
            rows.append(row(op, case, case.compile(arch)))
            print(*rows[-1].values(), sep=" | ", flush=True)
    text = re.sub(r"Triton [\d.]+\d", f"Triton {triton.__version__}", arguments.out.read_text(), count=1)
    text = replace_table(text, rows)
    if nvcc := shutil.which("nvcc"):
        text = replace_table(text, [hopper_row(report) for report in hopper_reports(nvcc, ROOT / "csrc")])
    arguments.out.write_text(text)


if __name__ == "__main__":
    main()
