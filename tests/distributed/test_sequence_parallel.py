"""Stages of several ranks over gloo: the bits of one process, at early ends too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dualparal.distributed.mesh import Mesh, role_of
from dualparal.engine.engine import Engine
from dualparal.launch.blame import Limits
from dualparal.launch.supervisor import Result, supervise
from dualparal.models.wan.tiny import build_tiny_pipeline
from places import WORKERS

WORKER = WORKERS / "engine_rank.py"
OPTIONS = {"frames_per_block": 3, "context_frames": 2}
CALL = {"prompt": "a cat", "height": 128, "width": 128, "num_frames": 21, "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def three_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Over two places: two heads and one."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("three"), layers=3, heads=3)


def case(model: Path, call: dict[str, Any] | None = None, more: dict[str, Any] | None = None, **options: Any) -> Any:
    call = {**CALL, "guidance_scale": 5.0, **(call or {})}
    return {
        "model": str(model),
        "options": {**OPTIONS, "sequence_parallel": 2, **options},
        "call": call,
        **(more or {}),
    }


def alone(case: dict[str, Any]) -> torch.Tensor:
    """What one process gives, with one stage of one place."""
    kept = {name: value for name, value in case["options"].items() if not name.startswith("sequence")}
    call = {**case["call"], "num_frames": case["call"]["num_frames"] or 61}
    frames: torch.Tensor = Engine.from_pretrained(case["model"], device="cpu", **kept)(
        output_type="latent", **call
    ).frames
    return frames


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_ranks_that_share_stages_give_the_bits_of_one(
    tmp_path: Path, wan21: Path, three_heads: Path, stages: int
) -> None:
    """The policies, guidance or none, heads that do not divide, both forms, refreshes, and ends before the end."""
    cases = {
        1: [
            case(three_heads),
            case(wan21, {"num_frames": None, "guidance_scale": 1.0}, {"leave_after": 1}),
            case(wan21, context="paper", sequence_parallel_form="pipelined"),
        ],
        2: [
            case(three_heads, context="paper"),
            case(wan21, {"guidance_scale": 1.0}, context="prior", depth=1),
            case(three_heads, sequence_parallel_form="pipelined", refresh_every=2),
            case(wan21, {"num_frames": None}, {"leave_after": 1}),
            case(wan21, {"num_frames": 61}, {"leave_after": 1}),
            case(three_heads, {"guidance_scale": 1.0}),
        ],
        3: [case(three_heads), case(wan21, {"guidance_scale": 1.0}, context="paper", refresh_every=2)],
    }[stages]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    limits = Limits(progress=60.0, startup=120.0)
    command = [sys.executable, str(WORKER), str(tmp_path)]
    assert supervise(command, 2 * stages, limits=limits, env={"OMP_NUM_THREADS": "1"}) == Result(0)
    for index, each in enumerate(cases):
        made, whole = load_file(tmp_path / f"{index}.safetensors")["latents"], alone(each)
        assert made.shape[2] >= 6 and torch.equal(made, whole[:, :, : made.shape[2]]), each


def test_places_of_ranks() -> None:
    """Stages of two ranks, then those that decode."""
    meshes = [Mesh(rank, 8, 3, torch.device("cpu"), True, 2) for rank in range(8)]
    assert [list(mesh.stages) for mesh in meshes] == [[0], [0], [1], [1], [2], [2], [], []]
    assert [mesh.place for mesh in meshes[:6]] == [0, 1] * 3
    assert [(mesh.before, mesh.after) for mesh in meshes[:6]] == [(4, 2), (5, 3), (0, 4), (1, 5), (2, 0), (3, 1)]
    assert [mesh.schedule_place for mesh in meshes] == [0, None, 1, None, 2, None, 3, 4]
    assert [meshes[0].rank_of(place) for place in range(5)] == [0, 2, 4, 6, 7]
    assert [mesh.is_leader for mesh in meshes] == [True] + [False] * 7
    assert meshes[3].role == {"stage": 1, "place": 1} and meshes[7].role == {"decoder": 1}
    assert role_of(1, 2, 1) == {"stage": 1}, "of one place nothing is said"
