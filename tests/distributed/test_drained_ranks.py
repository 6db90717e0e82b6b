"""Two to four ranks over a stand-in for NCCL, whose device drains before every action: the bits of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dualparal.engine.engine import Engine
from dualparal.launch.blame import Limits
from dualparal.launch.supervisor import Result, supervise
from places import TESTS, WORKERS

WORKER = WORKERS / "virtual_rank.py"
CALL = {"prompt": "a cat", "num_frames": 29, "num_inference_steps": 3}


def launch(folder: Path, ranks: int, cases: list[dict[str, Any]], *more: str) -> Result:
    (folder / "cases.json").write_text(json.dumps(cases))
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS / "helpers")}
    command = [sys.executable, str(WORKER), str(folder), *more]
    return supervise(command, ranks, limits=Limits(progress=60.0, startup=120.0), env=env)


def case(model: Path, context: str, depth: int = 2, **more: Any) -> dict[str, Any]:
    options = {"frames_per_block": 2, "context_frames": 1, "context": context, "depth": depth}
    return {"model": str(model), "options": options, "call": {**CALL, **more.pop("call", {})}, **more}


@pytest.mark.parametrize("ranks", [2, 4])
def test_drains_everywhere_change_nothing(tmp_path: Path, wan21: Path, ranks: int) -> None:
    """Also at an early end, whose messages and credits must be taken before the next run begins."""
    cases = [
        case(wan21, "cached"),
        case(wan21, "paper", depth=1),
        case(wan21, "cached", call={"num_frames": None}, leave_after=2),
        case(wan21, "cached", depth=3, call={"num_frames": 101}, leave_after=2),
        case(wan21, "prior"),
    ][: 5 if ranks == 2 else 3]
    assert launch(tmp_path, ranks, cases) == Result(0)
    for index, each in enumerate(cases):
        engine = Engine.from_pretrained(each["model"], device="cpu", **each["options"])
        call = {**each["call"], "num_frames": each["call"]["num_frames"] or 101}
        alone = engine(height=32, width=32, output_type="latent", **call).frames
        made = load_file(tmp_path / f"{index}.safetensors")["latents"]
        assert made.shape[2] >= 6 and torch.equal(made, alone[:, :, : made.shape[2]]), each
    for rank in range(ranks):
        stats = json.loads((tmp_path / f"stats-{rank}.json").read_text())
        assert stats[-1]["drains"] > 100 and stats[-1]["launched"] > 100
        for each, seen in zip(cases, stats, strict=True):
            assert seen["most"] <= 2 * each["options"]["depth"]


def test_receives_posted_ahead_hang(tmp_path: Path, wan21: Path) -> None:
    """How it once was: else the test above would show nothing."""
    result = launch(tmp_path, 2, [case(wan21, "cached")], "ahead")
    assert result.failure is not None
    assert "Hang: the device waits for a receive from the other end that was posted" in str(result.failure)
