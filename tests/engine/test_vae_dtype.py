"""The dtype of the VAE: its rule, its measured error, and all that depends on it. Latents do not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vae_error
from diffusers import WanPipeline

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.cli.flags import LimitFlags
from dualparal.cli.generate import GROUPS
from dualparal.cli.job import Job
from dualparal.config import decoding
from dualparal.config.decoding import choose_vae_dtype
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.engine import setup as engine_setup
from dualparal.engine.engine import Engine
from dualparal.engine.identity import run_info
from dualparal.models.wan.sizes import MODELS
from dualparal.models.wan.vae import StreamingDecoder
from dualparal.models.wan.vae_sizes import WanVaeSizes
from dualparal.models.weights import channels_last
from dualparal.planning.cost import Costing
from dualparal.planning.devices import CONV_GAIN, DEVICES, LINKS
from dualparal.planning.memory import decode_bytes
from dualparal.planning.workload import Workload

CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 2, "output_type": "pt"}


def make(engine: Engine, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [F, 3, H, W] and latents [1, C, L, h, w] of a video."""
    chunks = list(engine.stream("a cat", **{**CALL, **changes}))
    return torch.cat([chunk.frames for chunk in chunks]), torch.cat([chunk.latents for chunk in chunks], dim=2)


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MEASURED_LEVELS", decoding.MOST_LEVELS)
    assert choose_vae_dtype("auto", on_card=False) == "float32"
    assert choose_vae_dtype("auto", on_card=True) == "bfloat16"
    assert choose_vae_dtype("auto", on_card=True, has_bfloat16=False) == "float32"
    assert choose_vae_dtype("float16", on_card=False) == choose_vae_dtype("float16", on_card=True) == "float16"
    monkeypatch.setattr(decoding, "MEASURED_LEVELS", decoding.MOST_LEVELS + 1)
    assert choose_vae_dtype("auto", on_card=True) == "float32"  # the error decides, too


def test_the_card_is_asked_for_its_units(monkeypatch: pytest.MonkeyPatch, wan21: Path) -> None:
    monkeypatch.setattr(decoding, "MEASURED_LEVELS", decoding.MOST_LEVELS)
    source, card = Engine.from_pretrained(wan21, device="cpu").source, torch.device("cuda")
    found = []
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        found.append(engine_setup._vae_dtype(EngineConfig(), source, card))
    assert found == ["float32", "bfloat16", "bfloat16"]


def test_the_measured_error_is_still_that() -> None:
    """The bench on the longer of its videos, and the prompt, that the figure is from on which the rule rests."""
    both = vae_error.trained(frames=33, steps=6)
    sample = both._replace(latents=both.latents[1:])
    truth = vae_error.levels(sample, torch.float32)
    assert truth.std() > 5  # a grey picture would prove nothing
    found = vae_error.distance(sample, torch.bfloat16, truth)
    # Another CPU adds in another order, and one pixel makes the figure; but the rule's answer has to stay.
    assert decoding.MOST_LEVELS < found.most <= 2 * decoding.MEASURED_LEVELS
    assert found.mean < 1


def test_latents_do_not_depend_on_it_and_frames_do(engine: Callable[..., Engine]) -> None:
    plain, wanted = make(engine()), make(engine(vae_dtype="float32"))
    assert plain[0].dtype == torch.float32 and torch.equal(plain[0], wanted[0]) and torch.equal(plain[1], wanted[1])
    for dtype in (torch.bfloat16, "float16"):
        made = engine(vae_dtype=dtype)
        frames, latents = make(made)
        assert made.vae().dtype == frames.dtype == getattr(torch, str(dtype).removeprefix("torch."))
        assert torch.equal(latents, plain[1])
        assert 0 < (frames.float() - plain[0]).abs().mean() < 0.02
    with pytest.raises(ValueError, match="vae_dtype='int8' is not supported; use auto or one of float32"):
        engine(vae_dtype="int8")


def test_a_loaded_pipelines_vae_keeps_its_dtype_unless_told(wan21: Path) -> None:
    pipeline = WanPipeline.from_pretrained(wan21)
    pipeline.vae.to(torch.bfloat16)
    assert Engine.from_pretrained(pipeline, device="cpu").vae() is pipeline.vae
    told = Engine.from_pretrained(pipeline, device="cpu", vae_dtype="float32").vae()
    assert told.dtype == torch.float32 and pipeline.vae.dtype == torch.bfloat16


def test_ranks_compare_it(engine: Callable[..., Engine]) -> None:
    def compared(found: Engine) -> Any:
        found.stream("a cat", **CALL)
        assert found._run is not None
        spec = found._run.spec
        return run_info(found.setup, spec.scheduler, spec.requests, spec.schedule, None, None)["engine"]["vae_dtype"]

    assert compared(engine()) == "float32" and compared(engine(vae_dtype="float16")) == "float16"


def test_a_resume_with_another_goes_on_and_warns(
    engine: Callable[..., Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"frames_per_block": 2, "context_frames": 1, "refresh_every": 1}
    for output_type, warnings in (("pt", 1), ("latent", 0)):
        checkpoint = Checkpoint(tmp_path / output_type, 1)
        stream = engine(**options).stream("a cat", checkpoint=checkpoint, **{**CALL, "output_type": output_type})
        next(stream)
        stream.close()
        _, whole = make(engine(**options))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dualparal"):
            again = engine(**options, vae_dtype="bfloat16")
            chunks = list(again.resume(checkpoint))
        assert sum("vae_dtype=bfloat16, begun with float32" in r.getMessage() for r in caplog.records) == warnings
        latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
        assert torch.equal(latents, whole[:, :, -latents.shape[2] :])
        if warnings:
            assert chunks[0].frames.dtype == torch.bfloat16


def test_who_resumed_last_is_who_is_compared(
    engine: Callable[..., Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"frames_per_block": 2, "context_frames": 1, "refresh_every": 1}
    checkpoint = Checkpoint(tmp_path / "kept", 1)
    next(engine(**options).stream("a cat", checkpoint=checkpoint, **CALL))
    list(engine(**options, vae_dtype="bfloat16").resume(checkpoint))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dualparal"):
        engine(**options, vae_dtype="bfloat16").resume(checkpoint)
    assert not caplog.records


def test_channels_last_changes_the_layout_and_not_what_a_cut_does(wan21: Path) -> None:
    plain = Engine.from_pretrained(wan21, device="cpu")
    vae = plain.source.load_vae(torch.device("cpu"), torch.bfloat16)
    latents = torch.randn(1, 16, 4, 4, 5, generator=torch.Generator().manual_seed(0))
    before = StreamingDecoder(vae).push(latents)
    assert channels_last(vae) is vae
    wide = [p for p in vae.decoder.parameters() if p.dim() == 5 and min(p.shape) > 1]
    assert wide and all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in wide)
    decoder = StreamingDecoder(vae)
    frames = torch.cat([decoder.push(part) for part in latents.split([1, 2, 1], dim=2)])
    assert torch.equal(frames, StreamingDecoder(vae).push(latents))
    assert (frames.float() - before.float()).abs().mean() < 0.02


def test_files_lie_channels_last_in_16_bits_on_a_card_only(wan21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Engine.from_pretrained(wan21, device="cpu").source
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)  # no card here
    for kind, dtype, expected in (
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ):
        weight = files.load_vae(torch.device(kind), dtype).decoder.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last_3d) == expected, (kind, dtype)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_planner_counts_it(itemsize: int) -> None:
    dtype = {2: "bfloat16", 4: "float32"}[itemsize]
    model, video = MODELS["wan2.1-t2v-1.3b"], VideoConfig(num_frames=257)
    work = Workload(model, video, EngineConfig(vae_dtype=dtype))
    assert work.decode_itemsize == itemsize
    out = decode_bytes(work) - itemsize * model.vae.parameters - model.vae.cache_bytes(work.pixels, itemsize)
    assert out - model.vae.working_bytes(work.pixels, itemsize) == 2 * 3 * 4 * 8 * 4 * 480 * 832  # two blocks, float32
    costing = Costing(work, work.schedule(2), [15, 15], [DEVICES["h100"]] * 2, [LINKS["nvlink4"]] * 2)
    flops = 8 * model.vae.flops(work.pixels)
    assert costing.decode(1) == pytest.approx(flops / DEVICES["h100"].conv / (CONV_GAIN if itemsize == 2 else 1))


def test_the_planner_decides_as_a_card_would() -> None:
    work = Workload(MODELS["wan2.1-t2v-1.3b"], VideoConfig(num_frames=257))
    assert work.decode_itemsize == {"bfloat16": 2, "float32": 4}[choose_vae_dtype("auto", True)]


def test_history_in_16_bits_is_what_the_decoder_holds() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        decoder = StreamingDecoder(AutoencoderKLWan(base_dim=8, num_res_blocks=1).to(torch.bfloat16))
        for _ in range(2):
            decoder.push(torch.zeros(1, 16, 1, 8, 6))
    assert WanVaeSizes(8, num_res_blocks=1).cache_bytes(48, 2) == decoder.state_bytes


def test_the_command_passes_it_on() -> None:
    from dualparal.cli.generate import _job

    flags = [
        group() if group.__name__ != "PromptFlags" else group(["a cat"]) for group in GROUPS if group is not LimitFlags
    ]
    flags = [replace(group, vae_dtype="bfloat16") if hasattr(group, "vae_dtype") else group for group in flags]
    job = _job(*flags)
    assert job.engine.vae_dtype == "bfloat16"
    assert Job.of_notes(job.notes()).engine.vae_dtype == "bfloat16"
