"""The table of guards fits the sources: each is found once, and its tests exist. Whether they notice: mutants.py."""

from __future__ import annotations

import importlib.util

import pytest

from places import ROOT

SPEC = importlib.util.spec_from_file_location("mutants", ROOT / "tests" / "mutants.py")
assert SPEC is not None and SPEC.loader is not None
mutants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutants)


@pytest.mark.parametrize("guard", mutants.GUARDS, ids=lambda guard: guard.name)
def test_a_guard_is_there_once_and_its_tests_too(guard: mutants.Guard) -> None:
    assert (ROOT / guard.file).read_text(encoding="utf-8").count(guard.old) == 1 and guard.new != guard.old
    file, _, name = guard.tests[0].partition("::")
    assert f"def {name or 'test_'}" in (ROOT / file).read_text(encoding="utf-8")


def test_the_table_names_every_guard() -> None:
    assert len({guard.name for guard in mutants.GUARDS}) == len(mutants.GUARDS) >= 60
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = page.split(mutants.BEGIN)[1].split(mutants.END)[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[3:]] == [
        guard.name for guard in mutants.GUARDS
    ]
    assert mutants.SURVIVED not in table and mutants.BROKEN not in table
