"""fp8 linears in the engine: the bits of the reference for any number of stages, on where they were asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.config.blocks import BlockConfig
from dualparal.config.eight_bit import LinearPolicy
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.engine.engine import Engine
from dualparal.engine.identity import _identity
from dualparal.kernels import linear_8bit as kernels
from dualparal.kernels.linear_8bit import Rows8
from dualparal.models import linear
from dualparal.models.linear import Linear
from dualparal.models.loaded import LoadedPipeline
from dualparal.planning.cost import layer_arithmetic
from dualparal.planning.devices import DEVICES
from dualparal.planning.memory import slice_bytes
from dualparal.planning.planner import model_sizes
from dualparal.planning.workload import Workload
from engine_calls import embeds, reference_latents

Build = Callable[..., Engine]
CALL: dict[str, Any] = {"num_frames": 33, "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 3}
CALL |= {"height": 32, "width": 48}
CPU = torch.device("cpu")
SOME = LinearPolicy("fp8", (1,))


def build(engine: Build, *args: Any, **options: Any) -> Engine:
    return engine(*args, **{"frames_per_block": 4, "context_frames": 1, "dtype": "bfloat16", **options})


def latents(built: Engine) -> torch.Tensor:
    made: torch.Tensor = built(**embeds(built), output_type="latent", **CALL).frames
    return made


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


@pytest.mark.parametrize(("policy", "mode"), [("cached", "fp8"), ("prior", SOME), ("paper", "both")], ids=str)
def test_engine_equals_reference_for_any_number_of_stages(engine: Build, policy: str, mode: Any) -> None:
    options: dict[str, Any] = {"context": policy, "linear_8bit": "fp8" if mode == "both" else mode}
    if mode == "both":
        options["attention_8bit"] = "fp8"
    built = build(engine, **options)
    expected = reference_latents(built, embeds(built), **CALL)
    assert expected.isfinite().all() and expected.std() > 0.1
    for stages in (1, 3):
        assert torch.equal(latents(build(engine, stages=stages, **options)), expected), stages


def test_another_video_and_a_near_one(engine: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, plain = latents(build(engine, dtype="float32")), latents(build(engine))
    eight, some = latents(build(engine, linear_8bit="fp8")), latents(build(engine, linear_8bit=SOME))
    assert 0 < relative(plain, exact) < relative(some, exact) < relative(eight, exact) < 0.1
    # With an error ten times that of fp8 it would not have been near.
    quantise = linear.quantise_rows

    def coarse(x: torch.Tensor) -> Rows8:
        values, scale = quantise(x)
        return Rows8(values, scale * (1 + 0.3 * torch.randn(scale.shape, generator=torch.Generator().manual_seed(0))))

    monkeypatch.setattr(linear, "quantise_rows", coarse)
    assert relative(latents(build(engine, linear_8bit="fp8")), exact) > 2 * relative(eight, exact)


def test_two_experts_and_a_loaded_pipeline(engine: Build, wan21: Path, wan22: Path) -> None:
    built = build(engine, wan22, linear_8bit="fp8")
    expected = reference_latents(built, embeds(built), **CALL, guidance_scale_2=2.0)
    made = build(engine, wan22, linear_8bit="fp8", stages=2)
    assert torch.equal(made(**embeds(made), output_type="latent", guidance_scale_2=2.0, **CALL).frames, expected)

    import diffusers

    pipeline = diffusers.WanPipeline.from_pretrained(wan21)
    assert torch.equal(latents(build(engine, pipeline, linear_8bit="fp8")), latents(build(engine, linear_8bit="fp8")))
    assert isinstance(LoadedPipeline(pipeline).load_slices(range(4), torch.bfloat16, CPU, SOME), list)


def tensors(layer: Any) -> dict[str, Linear]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, Linear)}


def test_which_weights_have_8_bits(engine: Build) -> None:
    """All linears that see tokens, of the layers asked for; quantised from the checkpoint's own numbers."""
    built = build(engine, linear_8bit=SOME)
    eight, plain = (
        built.source.load_slices(range(4), torch.bfloat16, CPU, policy)[0]._layers  # type: ignore[attr-defined]
        for policy in (SOME, LinearPolicy())
    )
    exact = built.source.load_slices(range(4), torch.float32, CPU)[0]._layers  # type: ignore[attr-defined]
    for index, layer in enumerate(eight):
        covered = {name for name, one in tensors(layer).items() if one.scale is not None}
        wanted = {"qkv", "out", "cross_q", "cross_out", "ffn_in", "ffn_out"} if index != 1 else set()
        assert covered == wanted
        for name, one in tensors(layer).items():
            if name in covered:
                want = kernels.quantise_rows(tensors(exact[index])[name].weight)
                assert torch.equal(one.weight.float(), want.values.float()) and torch.equal(one.scale, want.scale)
            else:
                assert torch.equal(one.weight, tensors(plain[index])[name].weight) and one.scale is None
            assert torch.equal(one.bias, tensors(plain[index])[name].bias)


def test_the_planner_counts_them(engine: Build, wan21: Path) -> None:
    built = build(engine, linear_8bit=SOME)
    sizes = model_sizes(str(wan21))
    work = Workload(sizes, VideoConfig(32, 32, 29, 3), EngineConfig(BlockConfig(2, 1), linear_8bit=SOME))
    plain = Workload(sizes, work.video, EngineConfig(work.blocks))
    start = 0
    for stage, count in enumerate(split := [1, 2, 1]):
        layers, names = range(start, start + count), built.source.spec.names(0, range(start, start + count))
        files, real = dict(_read(built, names)), 0
        for name in names:
            made = linear.placed(built.source.spec, name, files[name], torch.bfloat16, CPU, SOME)
            real += sum(tensor.nbytes for tensor in made.values())
        assert slice_bytes(work, split, stage) == real
        assert (real < slice_bytes(plain, split, stage)) == any(map(SOME.covers, layers))
        start += count
    ours, theirs = (layer_arithmetic(w, 100, 300) for w in (work, plain))
    assert ours.linear_8bit == pytest.approx(3 * ours.linear) and theirs.linear_8bit == 0
    assert ours.linear_8bit + ours.linear == pytest.approx(theirs.linear)
    card = DEVICES["h200"]
    assert 1.0e15 < card.linear_8bit < 1.2e15 and ours.moved > theirs.moved


def _read(built: Engine, names: list[str]) -> Any:
    from dualparal.models.weights import WeightFiles

    return WeightFiles(built.source.path / "transformer").read(names)  # type: ignore[attr-defined]


def test_ranks_and_snapshots_compare_it(engine: Build) -> None:
    one, other = build(engine, linear_8bit="fp8"), build(engine)
    for built, mode in ((one, "fp8"), (other, "off")):
        assert _identity(built.setup, built.scheduler)["linear_8bit"]["mode"] == mode
        assert asdict(built.config)["linear_8bit"]["mode"] == mode  # run_info has the config whole
    assert EngineConfig.from_json(json.loads(json.dumps(asdict(one.config)))) == one.config


@pytest.mark.parametrize(
    "options, says",
    [
        ({"dtype": "float32"}, "linear_8bit='fp8' with dtype=float32"),
        ({"dtype": None}, "linear_8bit='fp8' with dtype=float32"),  # a CPU's own
        ({"dtype": "float16"}, "come in bfloat16"),
        ({"linear_8bit": "int8"}, "mode='int8' is not a mode of 8-bit linears"),
        ({"linear_8bit": LinearPolicy("fp8", (4,))}, "the model has 4 layers"),
        ({"linear_8bit": LinearPolicy("fp8", (0, 1, 2, 3))}, "leaves none of the model's 4 layers to 8-bit linears"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(engine: Build, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(engine, **{"linear_8bit": "fp8", **options})


def test_a_card_and_a_model_without_are_refused_in_one_line(
    engine: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualparal.models.wan.tiny import build_tiny_pipeline

    odd = build_tiny_pipeline(tmp_path / "odd", layers=1, ffn_dim=88)
    with pytest.raises(ValueError, match=r"ffn.net.*and both sides must divide by 16; leave it out") as refused:
        build(engine, odd, linear_8bit="fp8")
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(kernels, "absent", lambda device: "fp8 needs compute capability 8.9, see cuda:0")
    with pytest.raises(ValueError, match="linear_8bit='fp8' cannot run: fp8 needs compute capability"):
        build(engine, linear_8bit="fp8")
