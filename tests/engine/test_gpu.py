"""On one GPU: the engine's promises with real streams and real graphs. ``pytest -m gpu``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.engine.engine import Engine
from dualparal.kernels import linear_8bit
from dualparal.launch.blame import Limits
from dualparal.launch.supervisor import Result, supervise
from dualparal.models.wan.tiny import build_tiny_pipeline
from engine_calls import embeds
from places import WORKERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CALL = {"height": 64, "width": 96, "num_frames": 77, "num_inference_steps": 6, "output_type": "latent"}
OPTIONS = {"frames_per_block": 4, "context_frames": 2, "device": "cuda"}


@pytest.fixture(scope="module")
def wan64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("models") / "wan64", layers=4, head_dim=64)


def generate(model: Path, **options: Any) -> torch.Tensor:
    engine = Engine.from_pretrained(model, **{**OPTIONS, **options})
    made: torch.Tensor = engine(**embeds(engine), **CALL).frames
    return made


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("policy", ["cached", "prior", "paper"])
def test_same_bits_for_any_number_of_stages_eager_and_captured(wan21: Path, policy: str, dtype: str) -> None:
    """Also with buffers used again, and on every repeat."""
    expected = generate(wan21, context=policy, dtype=dtype)
    assert expected.isfinite().all() and expected.std() > 0.1
    for stages in (1, 2, 4):
        for graphs in (False, True):
            for depth in (1, 2):
                made = generate(wan21, context=policy, dtype=dtype, stages=stages, graphs=graphs, depth=depth)
                assert torch.equal(made, expected), (stages, graphs, depth)


@pytest.mark.parametrize("place", [{"decode_ranks": 1}, {"decode_ranks": 2}, {"decode_in_place": True}], ids=str)
def test_who_decodes_moves_no_latent_and_frames_by_rounding(wan21: Path, place: dict[str, Any]) -> None:
    """Convolutions of fewer rows may take other algorithms. No card has shown by how much: three levels of 255."""
    call = {**CALL, "output_type": "uint8"}
    alone, parted = (
        Engine.from_pretrained(wan21, **OPTIONS, dtype="float32", stages=2, **options) for options in ({}, place)
    )
    expected, found = (list(engine.stream(**embeds(engine), **call)) for engine in (alone, parted))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert abs(a.frames.astype(int) - b.frames.astype(int)).max() <= 3


def test_two_experts_captured(wan22: Path) -> None:
    assert torch.equal(generate(wan22, stages=2, graphs=True), generate(wan22))


@pytest.mark.parametrize("policy", ["cached", "prior", "paper"])
@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_8_bits_for_any_number_of_stages_eager_and_captured(wan64: Path, policy: str, mode: str) -> None:
    """Triton's kernels, of which the tiny model's usual head_dim is none, and the way between 16 and 8 bits."""
    if mode == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8")
    schedule = EightBitPolicy(mode, keep_layers=(1,), first_steps=1, last_steps=1)  # type: ignore[arg-type]
    options: dict[str, Any] = {"context": policy, "dtype": "bfloat16"}
    plain = generate(wan64, **options)
    for attention_8bit in (mode, schedule):
        expected = generate(wan64, attention_8bit=attention_8bit, **options)
        assert 1e-4 < (expected - plain).norm() / plain.norm() < 3e-2
        for stages, graphs in ((1, True), (2, False), (4, True)):
            made = generate(wan64, attention_8bit=attention_8bit, stages=stages, graphs=graphs, **options)
            assert torch.equal(made, expected), (stages, graphs, attention_8bit)


@pytest.mark.parametrize("policy", ["cached", "prior", "paper"])
@pytest.mark.parametrize(
    "options",
    [{"linear_8bit": "fp8"}, {"features_8bit": True}, {"linear_8bit": "fp8", "features_8bit": True}],
    ids=lambda options: " ".join(options),
)
def test_fp8_linears_and_features_for_any_number_of_stages(wan64: Path, policy: str, options: dict[str, Any]) -> None:
    """Eager and captured; near the video without them."""
    if reason := linear_8bit.absent(torch.device("cuda", 0)):
        pytest.skip(reason)
    common: dict[str, Any] = {"context": policy, "dtype": "bfloat16"}
    plain, expected = generate(wan64, **common), generate(wan64, **options, **common)
    assert expected.isfinite().all() and 1e-4 < (expected - plain).norm() / plain.norm() < 0.1
    for stages in (1, 2, 4):
        for graphs in (False, True):
            made = generate(wan64, stages=stages, graphs=graphs, **options, **common)
            assert torch.equal(made, expected), (stages, graphs)


@pytest.mark.parametrize("policy", ["cached", "prior", "paper"])
def test_refreshes_and_resume(wan21: Path, tmp_path: Path, policy: str) -> None:
    """Latents leave the device beside the run, and come back to other stages, captured."""
    options = {**OPTIONS, "context": policy, "refresh_every": 3}
    expected = generate(wan21, **options)
    assert torch.equal(generate(wan21, stages=2, graphs=True, **options), expected)
    engine = Engine.from_pretrained(wan21, stages=2, **options)
    chunks = engine.stream(**embeds(engine), **CALL, checkpoint=Checkpoint(tmp_path / "kept", every=1))
    for _ in range(4):
        next(chunks)
        time.sleep(0.2)  # the disk keeps up
    chunks.close()
    rest = list(Engine.from_pretrained(wan21, stages=4, graphs=True, **options).resume(tmp_path / "kept"))
    made = torch.cat([chunk.latents for chunk in rest], dim=2)
    assert rest[0].block > 0 and torch.equal(made, expected[:, :, -made.shape[2] :])


def test_gpu_and_cpu_agree(wan21: Path) -> None:
    on_gpu, on_cpu = (generate(wan21, device=device, dtype="float32") for device in ("cuda", "cpu"))
    assert (on_gpu.cpu() - on_cpu).abs().max() < 2e-3


def test_frames_and_prompts(wan21: Path, engine: Callable[..., Engine]) -> None:
    """Text encoder, side-stream decoder and a prompt change, end to end."""
    call = {"height": 64, "width": 96, "num_frames": 45, "num_inference_steps": 2, "output_type": "uint8"}
    made = []
    for stages, graphs in ((1, False), (2, True)):
        built = Engine.from_pretrained(wan21, **OPTIONS, stages=stages, graphs=graphs)
        made.append(built({0: "a cat", 20: "a dog"}, **call).frames)
    assert made[0].shape == (1, 45, 64, 96, 3) and (made[0] == made[1]).all()


@pytest.mark.parametrize(("stages", "graphs"), [(1, False), (2, False), (2, True)])
def test_units_wait_for_nothing_on_the_host(wan21: Path, stages: int, graphs: bool) -> None:
    """From the first unit on, but where a block is given out: there its finiteness is asked for."""
    seen = []

    def report(phase: str, **_: Any) -> None:
        steady = phase in ("run", "wait_recv", "wait_send", "update")
        seen.append(phase)
        torch.cuda.set_sync_debug_mode("error" if steady else "default")

    try:
        expected = generate(wan21)
        made = generate(wan21, stages=stages, graphs=graphs, report=report)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(made, expected) and seen.count("run") == 60 * stages


def test_no_stream_reads_what_another_still_writes(wan21: Path) -> None:
    env = {**os.environ, "TORCH_CUDA_SANITIZER": "1"}
    command = [sys.executable, str(WORKERS / "sanitized_streams.py"), str(wan21)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=env)
    assert done.returncode == 0 and "CSAN" not in done.stderr, done.stderr[-3000:]


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("policy", ["cached", "paper"])
def test_two_cards_give_the_bits_of_one(wan21: Path, tmp_path: Path, policy: str) -> None:
    """Over NCCL: eager, captured, with one buffer, after an early end, and with a drain before every action."""
    options = {"frames_per_block": 4, "context_frames": 2, "context": policy}
    call = {"prompt": "a cat", "num_frames": 77, "num_inference_steps": 6}
    settings: list[dict[str, Any]] = [{}, {"graphs": True}, {"depth": 1}, {"drains": True}, {"leave_after": 1}, {}]
    cases = []
    for setting in settings:
        engine = {key: setting[key] for key in ("graphs", "depth") if key in setting}
        rest = {key: setting[key] for key in ("drains", "leave_after") if key in setting}
        cases.append({"model": str(wan21), "device": "cuda", "options": {**options, **engine}, "call": call, **rest})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(WORKERS / "engine_rank.py"), str(tmp_path)]
    assert supervise(command, 2, limits=Limits(progress=60.0, startup=120.0)) == Result(0)
    alone = Engine.from_pretrained(wan21, device="cuda", **options)
    expected = alone(height=32, width=32, output_type="latent", **call).frames.cpu()
    for index, case in enumerate(cases):
        made = load_file(tmp_path / f"{index}.safetensors")["latents"]
        assert torch.equal(made, expected[:, :, : made.shape[2]]), case


@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_op_reads_or_writes_where_it_may_not(tool: str) -> None:
    """The attention for Hopper has a test of its own (test_kernels_attention_hopper.py)."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    worker = WORKERS / "sanitized_gpu.py"
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(worker)],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
