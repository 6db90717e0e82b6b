"""A call of a whole run fails, tears or is the last; then the same command has the same bytes. A sample of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import failing_io


@pytest.mark.parametrize(("kind", "start"), [("fail", 7), ("kill", 3), ("tear", 5)])
def test_a_run_survives_a_call_that_does_not(tmp_path: Path, kind: str, start: int, exhaustive: bool) -> None:
    """``python tests/helpers/failing_io.py`` is all of them."""
    model = failing_io.tiny_model(tmp_path / "model")
    found = list(failing_io.cases(model, tmp_path, 1 if exhaustive else 61, (kind,), "a.mp4", start))
    assert len(found) >= 2 and {case.kind for case in found} == {kind}
    assert not [case for case in found if case.fault]
