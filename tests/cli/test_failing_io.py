"""A call of a whole run fails, tears, is the last, or meets a power cut; then the same command has the same bytes."""

from __future__ import annotations

from pathlib import Path

import failing_io


def test_a_run_survives_a_call_that_does_not(tmp_path: Path, exhaustive: bool) -> None:
    """A sample; ``python tests/helpers/failing_io.py`` is all of them."""
    form = failing_io.Form(failing_io.tiny_model(tmp_path / "model"), "new/a.mp4", resume=False)
    found = list(failing_io.cases(form, tmp_path, 1 if exhaustive else 101, failing_io.KINDS, 7))
    assert {case.kind for case in found} == set(failing_io.KINDS)
    assert not [case for case in found if case.fault]
