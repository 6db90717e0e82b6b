"""The pattern of steps that are run: by hand, over all small cases, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualparal.config.engine import EngineConfig
from dualparal.config.reuse import PRESETS, REUSE_OFF, Reuse

EVEN = [1 - step / 10 for step in range(10)]
patterns = st.builds(
    Reuse,
    steps=st.integers(1, 5),
    uncond=st.integers(1, 5),
    order=st.integers(0, 2),
    first=st.integers(1, 4) | st.floats(0.01, 0.9),
    last=st.integers(1, 3),
    low=st.floats(0, 0.6),
    high=st.floats(0.7, 1),
)


def test_patterns_by_hand() -> None:
    plan = Reuse(steps=2, uncond=2, first=3).plan(EVEN, guidance=True)
    assert plan.runs == (0, 1, 2, 4, 6, 8, 9)
    assert [plan.runs[run] for run in plan.conditional_only] == [4, 8]
    assert [list(plan.span(run)) for run in (2, 3, 6)] == [[2, 3], [4, 5], [9]]
    assert (plan.known(4, 0), plan.known(4, 1), plan.known(0, 1)) == ((4, 6), (2, 6), (0,))
    within = Reuse(uncond=3, low=0.3, high=0.85, order=0).plan(EVEN, guidance=True)
    assert within.runs == tuple(range(10)) and within.guided == (False,) * 2 + (True,) * 6 + (False,) * 2
    assert within.conditional_only == (0, 1, 3, 4, 6, 7, 8, 9)
    assert (within.known(9, 0), within.known(9, 1), within.kept) == ((), (5,), 1)
    assert Reuse(steps=4).plan(EVEN, guidance=False).conditional_only == ()
    whole = REUSE_OFF.plan([0.0] * 3, guidance=True)
    assert (whole.runs, whole.conditional_only, whole.guided, whole.kept) == ((0, 1, 2), (), (True,) * 3, 0)


@given(patterns, st.integers(1, 30), st.booleans())
def test_every_pattern(reuse: Reuse, steps: int, guidance: bool) -> None:
    levels = [1 - step / steps for step in range(steps)]
    plan = reuse.plan(levels, guidance)
    assert [at for run in range(len(plan.runs)) for at in plan.span(run)] == list(range(steps)), "each once, in order"
    first = reuse.first if reuse.first >= 1 else max(1, round(reuse.first * steps))
    ends = {step for step in range(steps) if step < first or step >= steps - reuse.last}
    assert ends <= set(plan.runs) == set(reuse.runs(steps))
    assert all(after - before <= reuse.steps for before, after in pairwise(plan.runs))
    whole = [run for run in range(len(plan.runs)) if plan.guided[run] and run not in plan.conditional_only]
    for run, step in enumerate(plan.runs):
        assert plan.guided[run] == (guidance and (not reuse.on or reuse.low <= levels[step] <= reuse.high))
        if plan.guided[run]:
            assert any(other <= run for other in whole), "something to extrapolate from"
            assert run in whole or step not in ends
            for branch in (0, 1):
                known = plan.known(run, branch)
                assert len(known) <= reuse.order + 1 and list(known) == sorted(known)
        else:
            assert not guidance or run in plan.conditional_only
    assert plan.kept <= 2 * (reuse.order + 1)


def test_texts() -> None:
    assert Reuse.of("steps=2, uncond=3,order=0,first=4,last=2,from=0.25,to=1") == Reuse(2, 3, 0, 4, 2, 0.25, 1.0)
    assert Reuse.of("first=0.2").runs(10) == Reuse.of("first=2").runs(10)
    assert Reuse.of("off") == REUSE_OFF and not REUSE_OFF.on and all(PRESETS[name].on for name in ("mild", "strong"))
    engine = EngineConfig.of(reuse="mild")
    assert engine.reuse == PRESETS["mild"] and EngineConfig.of(reuse=engine.reuse) == engine
    for text, why in [
        ("wild", "reuse='wild': 'wild' is not understood; use one of off, mild, strong, or a number"),
        ("steps=2,steps=3", "'steps=3' is not understood"),
        ("low=0.5", "'low=0.5' is not understood"),
        ("steps=two", "steps=two is not a number of its kind"),
        ("steps=0", "steps=0: of reuse"),
        ("first=1.5", "first=1.5: of reuse: steps run at the start, or a share of them below 1"),
        ("order=3", "order=3: of reuse: 0 holds, 1 is linear, 2 quadratic; use an integer from 0 to 2"),
        ("from=nan", "low=nan of reuse: a noise level"),
        ("from=0.9,to=0.1", "low=0.9 and high=0.1 of reuse: no noise level is between"),
    ]:
        with pytest.raises(ValueError, match=why):
            Reuse.of(text)
    with pytest.raises(ValueError, match="reuse with 3 steps: some have the same noise level"):
        Reuse(steps=2).plan([0.9, 0.9, 0.1], guidance=True)


@pytest.mark.parametrize(("name", "share"), [("mild", 0.6), ("strong", 0.4)])
def test_presets_run_what_they_promise(name: str, share: float) -> None:
    for steps in (20, 30, 50):
        plan = PRESETS[name].plan([1 - step / steps for step in range(steps)], guidance=True)
        forwards = 2 * len(plan.runs) - len(plan.conditional_only)
        assert share - 0.05 <= forwards / (2 * steps) <= share + 0.02, (steps, forwards)
