"""Seeds of the simulation (``tests/simulation.py``): none is broken, and each guard that is gone breaks one."""

from __future__ import annotations

import importlib.util

import pytest

from dualparal.launch.blame import RankState
from places import ROOT
from virtual_effects import Broken
from virtual_folders import check_folders
from virtual_guards import FILES, MORE, noticed, without
from virtual_judge import check

SPEC = importlib.util.spec_from_file_location("mutants", ROOT / "tests" / "mutants.py")
assert SPEC is not None and SPEC.loader is not None
mutants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutants)

# A fault that was found here: a rank spoke just before it and its parent were suspended, and was held to be stuck.
SLEPT_AFTER_A_WORD = 174
# Places that waited within a unit for another one of their stage, which waited for a rank before it, were blamed.
HELD_BY_ANOTHER_PLACE = 5147, 87_372, 300_254
GUARDS = {guard.name: guard for guard in [*(guard for guard in mutants.GUARDS if guard.file in FILES), *MORE]}
NOTICED = (
    "a death by signal beats all other causes",
    "a lost peer waits for its own story",
    "who waits is innocent",
    "patience with a rank that starts",
    "silence is noticed",
    "no progress is noticed",
    "a rank's first word counts",
    "a signal to the ranks is meant for the run",
    "grace has an end",
    "time in which the parent slept counts for nobody",
    "what a rank started goes with it",
    "an old error.json goes away",
    "silence is not held against who complains",
    "ranks are asked to stop",
    "a signal's own deaths are no fault while stopping",
)


def test_no_seed_is_broken() -> None:
    for seed in range(200):
        check(seed)
    for seed in range(20):
        check_folders(seed)


def test_a_seed_says_the_same_again() -> None:
    first, second = check(7), check(7)
    assert first.world.log == second.world.log and first.world.now == second.world.now


@pytest.mark.parametrize("name", NOTICED)
def test_a_guard_that_is_gone_breaks_a_seed(name: str) -> None:
    assert noticed(GUARDS[name], 200) is not None


def test_a_word_from_before_a_sleep_is_not_older_for_it() -> None:
    check(SLEPT_AFTER_A_WORD)
    state = RankState(0, heard=0.0, moved=0.0)
    state.take({"phase": "run", "at": 1.0}, now=700.0, away_since=1.5)
    assert state.moved == 699.5  # as old as it was when they fell asleep
    state.take({"phase": "run", "at": 600.0}, now=700.0, away_since=1.5)
    assert state.moved == 700.0
    state.take({"error": "boom", "at": 2.0}, now=700.0, away_since=1.5)
    assert state.error is not None and state.error.at == 2.0  # who was first is told by the clock
    state.take({"phase": "run", "at": 701.0}, now=702.0)
    assert state.moved == 701.0


def test_a_place_is_innocent_while_another_waits_for_what_comes_before() -> None:
    for seed in HELD_BY_ANOTHER_PLACE:
        check(seed)
    with without(GUARDS["a place is innocent while another waits for what comes before"]), pytest.raises(Broken):
        check(HELD_BY_ANOTHER_PLACE[0])


def test_a_broken_promise_tells_its_seed_and_log() -> None:
    seed = noticed(GUARDS["silence is noticed"], 200)
    with without(GUARDS["silence is noticed"]), pytest.raises(Broken, match=rf"seed {seed}: (?s:.*)rank \d"):
        check(seed)
