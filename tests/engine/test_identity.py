"""The precision of float32 products, which torch leaves to the process: ranks compare it, and a resume warns."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.engine.engine import Engine
from dualparal.engine.identity import run_info

CALL = {"height": 32, "width": 32, "num_frames": 29, "num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def compared(engine: Engine) -> str:
    """What a rank with this process's settings would tell the others."""
    engine.stream("a cat", **CALL)  # type: ignore[arg-type]
    assert engine._run is not None
    spec = engine._run.spec
    return run_info(engine.setup, spec.scheduler, spec.requests, spec.schedule, None, None)["float32_products"]


def test_ranks_compare_it(wan21: Path) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu")
    assert compared(engine) == "ieee"
    torch.set_float32_matmul_precision("highest")  # said, and not only left as it was
    assert compared(engine) == "ieee"
    torch.set_float32_matmul_precision("medium")
    assert compared(engine) != "ieee"


def test_a_resume_warns_when_it_has_changed(wan21: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def engine() -> Engine:
        return Engine.from_pretrained(wan21, device="cpu", frames_per_block=2, context_frames=1, refresh_every=1)

    checkpoint = Checkpoint(tmp_path / "kept", 1)
    list(engine().stream("a cat", checkpoint=checkpoint, **CALL))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "dualparal"):
        engine().resume(checkpoint)
        assert not caplog.records
        torch.set_float32_matmul_precision("medium")
        engine().resume(checkpoint)
    assert any("float32 products" in record.getMessage() for record in caplog.records), caplog.text
