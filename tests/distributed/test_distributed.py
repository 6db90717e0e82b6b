"""Several processes give the bits of one process; ending early, and disagreeing, end well on all ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from dualparal.config.eight_bit import EightBitPolicy
from dualparal.engine.engine import Engine
from dualparal.io.video import SegmentWriter
from dualparal.launch.blame import Limits
from dualparal.launch.supervisor import Result, supervise
from pairwise import pairwise
from places import WORKERS

WORKER = WORKERS / "engine_rank.py"
LIMITS = Limits(progress=60.0, startup=120.0)


def launch(folder: Path, ranks: int, cases: list[dict[str, Any]]) -> Result:
    (folder / "cases.json").write_text(json.dumps(cases))
    result = supervise([sys.executable, str(WORKER), str(folder)], ranks, limits=LIMITS, env={"OMP_NUM_THREADS": "1"})
    assert not [p for p in psutil.Process().children(recursive=True) if "engine_rank" in " ".join(p.cmdline())]
    return result


def case(model: Path, policy: str = "cached", guidance: float = 5.0, **more: Any) -> dict[str, Any]:
    own, context, steps, frames = more.pop("shape", (2, 1, 3, 29))
    return {
        "model": str(model),
        "options": {"frames_per_block": own, "context_frames": context, "context": policy, **more.pop("options", {})},
        "call": {
            "prompt": "a cat", "num_frames": frames, "num_inference_steps": steps, "guidance_scale": guidance,
            **more.pop("call", {}),
        },
        **more,
    }  # fmt: skip


_ALONE: dict[str, torch.Tensor] = {}


def alone(case: dict[str, Any]) -> torch.Tensor:
    """What one process with one stage gives, which is the same whatever two or three ranks are compared with it."""
    options = {k: v for k, v in case["options"].items() if k != "layers_per_stage"}
    name = json.dumps({**case, "options": options})
    if name not in _ALONE:
        _ALONE[name] = run_alone(case, options)
    return _ALONE[name]


def run_alone(case: dict[str, Any], options: dict[str, Any]) -> torch.Tensor:
    eight_bit = EightBitPolicy(**case.get("eight_bit", {}))
    engine = Engine.from_pretrained(case["model"], device="cpu", attention_8bit=eight_bit, **options)
    call = dict(case["call"])
    if "later" in case:
        call["prompt"] = {0: call["prompt"], case["later"]: "a dog"}
    frames: torch.Tensor = engine(height=32, width=32, output_type="latent", **call).frames
    return frames


@pytest.mark.parametrize("ranks", [3])  # two: test_sequence_parallel.py
def test_ranks_give_the_bits_of_one_process(tmp_path: Path, wan21: Path, wan22: Path, ranks: int) -> None:
    """One set of processes for all: they import for seconds."""
    cases = [
        case(model, policy, guidance)
        for model, policy, guidance in pairwise([wan21, wan22], ["cached", "prior", "paper"], [1.0, 5.0])
    ]
    cases += [
        case(wan21, shape=(2, 1, 1, 29)),  # T < N
        case(wan21, shape=(8, 4, 4, 17)),  # M = 1
        case(wan21, shape=(2, 0, 3, 13)),  # C = 0, M < N
        case(wan21, shape=(2, 2, 3, 21)),  # C = B
        case(wan21, "paper", shape=(2, 2, 3, 33), options={"depth": 1}),
        case(wan21, options={"depth": 3}, later=17),
        case(wan21, shape=(2, 1, 5, 29), options={"max_blocks_in_flight": 2, "context_version": "newest"}),
        case(wan21, "paper", shape=(2, 1, 5, 29), options={"max_blocks_in_flight": 2}),
        case(wan21, options={"layers_per_stage": [3, 1] if ranks == 2 else [1, 2, 1]}),
    ]
    cases += [
        case(model, policy, eight_bit={"mode": "int8", "first_steps": 1}, options={"dtype": "bfloat16"})
        for model, policy in ((wan21, "cached"), (wan21, "prior"), (wan22, "paper"))
    ]
    frames = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), dtype=np.uint8)
    clip = {"video": str(SegmentWriter(tmp_path / "clip", 16).write(0, frames)), "num_frames": 24}
    cases += [
        case(wan21, options={"anchor_frames": 1}),
        case(wan21, options={"anchor_frames": 2, "refresh_every": 2}, call=clip),
        case(wan22, "paper", call=clip),
    ]
    more, check = (several_videos if ranks == 2 else leaving_early)(wan21)
    assert launch(tmp_path, ranks, [*cases, *more]) == Result(0)
    made = [load_file(tmp_path / f"{index}.safetensors")["latents"] for index in range(len(cases) + len(more))]
    for each, ours in zip(cases, made):
        assert torch.equal(ours, alone(each)), each
    check(made[len(cases) :])
    if sys.platform == "linux":
        check_threads(tmp_path, ranks)


Cases = tuple[list[dict[str, Any]], Callable[[list[torch.Tensor]], None]]


def several_videos(wan21: Path) -> Cases:
    """Each has the bits it has alone."""
    prompts = ["a cat", "a dog"]
    both = [
        case(wan21, policy, shape=(2, 1, 4, 29), options=options, call={"prompt": prompts, "seed": 3})
        for policy in ("cached", "prior", "paper")
        for options in ({}, {"max_blocks_in_flight": 2, "depth": 1})
    ]
    left = case(wan21, call={"prompt": prompts, "num_frames": None}, leave_after=3)

    def check(made: list[torch.Tensor]) -> None:
        for each, ours in zip(both, made):
            single = [{**each, "call": {**each["call"], "prompt": p, "seed": 3 + v}} for v, p in enumerate(prompts)]
            assert torch.equal(ours, torch.cat([alone(one) for one in single])), each

    return [*both, left], check


def leaving_early(wan21: Path) -> Cases:
    """And a change of prompt: both end well on all ranks."""
    endless = case(wan21, call={"num_frames": None}, leave_after=3)
    finite = case(wan21, call={"num_frames": 101}, leave_after=2, options={"depth": 1})
    change = case(wan21, call={"num_frames": 61}, change_after=2)
    after = case(wan21)

    def check(made: list[torch.Tensor]) -> None:
        whole = alone(case(wan21, call={"num_frames": 101}))
        for ours, blocks in ((made[0], 4), (made[1], 3)):
            assert ours.shape[2] >= 2 * blocks and torch.equal(ours, whole[:, :, : ours.shape[2]])
        changed, kept = made[2], alone(case(wan21, call={"num_frames": 61}))
        assert torch.equal(changed[:, :, :2], kept[:, :, :2]) and not torch.equal(changed, kept)
        assert torch.equal(made[3], alone(after))

    return [endless, finite, change, after], check


def check_threads(folder: Path, ranks: int) -> None:
    for rank in range(ranks):
        gloo, running, gloo_left, left = map(int, (folder / f"threads-{rank}.txt").read_text().split())
        assert gloo == gloo_left == 0, "ranks of one machine meet over gloo, which listens on TCP"
        assert running > 0 and left == 0, "the groups outlive Python"


def test_ranks_that_disagree_say_in_what(tmp_path: Path, wan21: Path) -> None:
    result = launch(tmp_path, 2, [case(wan21, differs=1, shape=(8, 4, 2, 29))])
    assert result.exit_code == 3 and result.failure is not None
    text = str(result.failure)
    assert 'ranks disagree: engine.attention_8bit.mode: rank 0 = "off", rank 1 = "int8"' in text
    assert 'schedule.context: rank 0 = "cached", rank 1 = "prior"' in text


def test_more_ranks_than_layers_are_refused_by_every_rank(tmp_path: Path, wan21: Path) -> None:
    result = launch(tmp_path, 2, [case(wan21, options={"stages": 3})])
    assert result.failure is not None and "stages=3" in str(result.failure)
