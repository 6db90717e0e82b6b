"""A run that is made does not fail for figures that are missing."""

from __future__ import annotations

import pytest
import torch

from dualparal.distributed import figures
from dualparal.distributed.mesh import Mesh


@pytest.mark.parametrize("error", [TimeoutError("rank(s) [1] did not come"), RuntimeError("closed"), OSError("gone")])
def test_missing_figures_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(figures.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(figures, "gather", fail)
    mesh = Mesh(0, 2, 2, torch.device("cpu"), distributed=True)
    assert figures.collect(mesh, None, [1.5]) == [[1.5]]  # type: ignore[arg-type]
    assert str(error) in caplog.text
