"""docs/kernels.md still holds: no kernel spills, moves narrower pieces or needs many more registers than it says."""

import pytest

pytest.importorskip("triton")

from dualparal.kernels.offline import offline_cases, read_table, read_widths, row, write_table
from places import DOCS

TABLE = read_table((DOCS / "kernels.md").read_text())
PASSES = ("residual_norm", "qk_norm_rope", "combine_guidance")
WANTED = [(op, case, arch) for op, case in offline_cases() for arch in case.archs]
CASES = [pytest.param(op, case, arch, id=f"{op}-{case.name}-{arch}") for op, case, arch in WANTED]
SLACK = 16  # registers; releases of Triton differ by a few


def test_the_table_lists_every_kernel():
    assert [(line["op"], line["case"], line["sm"]) for line in TABLE] == [
        (op, case.name, str(arch)) for op, case, arch in WANTED
    ], "run bench/kernel_report.py"
    assert read_table("text\n\n" + write_table(TABLE)) == TABLE


@pytest.mark.parametrize("line", [line for line in TABLE if line["op"] in PASSES], ids=lambda line: line["case"])
def test_the_passes_move_16_bytes(line):
    loads, stores = read_widths(line["loads / stores"])
    assert line["stack"] == "0"
    assert loads[16] and stores[16]
    if line["op"] != "combine_guidance":  # there, the last thread block has a mask
        slots = {8: 2} if line["case"].endswith("lent twice") else {}  # one number each, in device memory
        assert loads == {16: loads[16], **slots} and set(stores) == {16}


@pytest.mark.sampled(3)  # of five cards a case: one or two of each
@pytest.mark.parametrize("op, case, arch", CASES)
def test_no_worse_than_the_table(op, case, arch):
    line = next(line for line in TABLE if (line["op"], line["case"], line["sm"]) == (op, case.name, str(arch)))
    report = case.compile(arch)
    now = row(op, case, report)
    assert report.stack <= int(line["stack"]), now
    assert report.registers <= int(line["registers"]) + SLACK, now
    assert report.shared <= int(line["shared"]) + 4096, now
    assert not report.serialised or "serialised" in line["tensor cores"], now
    for before, after in zip(read_widths(line["loads / stores"]), (report.loads, report.stores)):
        assert any(width >= 16 for width in after) or not any(width >= 16 for width in before), now
        for width, count in after.items():
            assert width >= 16 or count <= before.get(width, 0), now
