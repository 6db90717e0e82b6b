"""Stages of several ranks, over private sockets: the bits of one process, at early ends too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dualparal.distributed.mesh import Mesh, role_of
from dualparal.engine.engine import Engine
from dualparal.io.video import SegmentWriter
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


def alone(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What one process gives, with one stage of one place: latents, and frames where they are wanted."""
    others = ("sequence_parallel", "sequence_parallel_form", "decode_ranks", "decode_in_place")
    kept = {name: value for name, value in case["options"].items() if name not in others}
    call = {"output_type": "latent", **case["call"], "num_frames": case["call"]["num_frames"] or 61}
    chunks = list(Engine.from_pretrained(case["model"], device="cpu", **kept).stream(**call))
    made = {"latents": torch.cat([chunk.latents for chunk in chunks], dim=2)}
    if call["output_type"] != "latent":
        made["frames"] = torch.cat([chunk.frames for chunk in chunks])
    return made


def test_ranks_that_share_stages_give_the_bits_of_one(tmp_path: Path, wan21: Path, three_heads: Path) -> None:
    """One, two and three stages of two ranks: the policies, guidance or none, heads that do not divide, both forms,
    refreshes, ends before the end, ranks that decode, an image and a clip. One set of processes: where there are fewer
    stages the others have nothing to decode."""
    frames = np.random.default_rng(0).integers(0, 256, (17, 128, 128, 3), dtype=np.uint8)
    clip = str(SegmentWriter(tmp_path / "clip", 16).write(0, frames))
    Image.fromarray(frames[0]).save(tmp_path / "image.png")
    images = build_tiny_pipeline(tmp_path / "images", layers=3, images="first")
    cases = [
        case(images, {"image": str(tmp_path / "image.png")}),
        case(three_heads, {"video": clip, "num_frames": 20}),
        case(three_heads, decode_ranks=4),
        case(wan21, {"num_frames": None, "guidance_scale": 1.0}, {"leave_after": 1}, decode_ranks=4),
        case(three_heads, context="paper", decode_ranks=2),
        case(wan21, {"guidance_scale": 1.0}, context="prior", depth=1, decode_ranks=2),
        case(three_heads, sequence_parallel_form="pipelined", refresh_every=2, decode_ranks=2),
        case(wan21, {"num_frames": None}, {"leave_after": 1}, decode_ranks=2),
        case(wan21, {"num_frames": 61}, {"leave_after": 1}, decode_ranks=2),
        case(wan21, {"num_frames": 61}, {"interrupt_at": 3}, decode_ranks=2),
        case(three_heads),
        case(wan21, {"output_type": "pt"}, decode_ranks=2),
        case(wan21, {"output_type": "pt", "guidance_scale": 1.0}, decode_in_place=True),
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    limits = Limits(progress=60.0, startup=120.0)
    command = [sys.executable, str(WORKER), str(tmp_path)]
    assert supervise(command, 6, limits=limits, env={"OMP_NUM_THREADS": "1"}) == Result(0)
    for index, each in enumerate(cases):
        made, whole = load_file(tmp_path / f"{index}.safetensors"), alone(each)
        for name, found in made.items():
            count = found.shape[2] if name == "latents" else len(found)
            expected = whole[name][:, :, :count] if name == "latents" else whole[name]
            assert count >= 3 and torch.equal(found, expected), (name, each)


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
