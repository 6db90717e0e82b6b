"""Features kept in fp8 beside attention in 16 bits: the bits of the reference, half of the memory, if asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.checkpoint.snapshot import SnapshotError
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.engine.engine import Engine
from dualparal.engine.identity import _identity
from dualparal.engine.inputs import VideoInputs
from dualparal.engine.request import check_request, schedule_of
from dualparal.kernels import linear_8bit
from dualparal.kernels.attention_8bit import TILE
from dualparal.models.keys_values import KeysValues, Packed
from dualparal.planning import memory
from dualparal.planning.planner import model_sizes
from dualparal.planning.workload import Workload
from dualparal.runtime.features import FeatureStore
from engine_calls import embeds, reference_latents

Build = Callable[..., Engine]
# 60 tokens per frame: what is lent ends inside of tiles of 128
SIZE = {"height": 96, "width": 160}
CALL: dict[str, Any] = {"num_frames": 33, "num_inference_steps": 3, "guidance_scale": 1.0, "seed": 3, **SIZE}
SOME = EightBitPolicy("fp8", keep_layers=(1,), first_steps=1)


def build(engine: Build, *args: Any, **options: Any) -> Engine:
    return engine(*args, **{"frames_per_block": 4, "context_frames": 1, "dtype": "bfloat16", **options})


def latents(built: Engine, **changes: Any) -> torch.Tensor:
    made: torch.Tensor = built(**embeds(built, False), output_type="latent", **{**CALL, **changes}).frames
    return made


@pytest.mark.parametrize(
    "policy, options",
    [
        ("cached", {}),
        ("prior", {}),
        ("paper", {}),
        ("cached", {"dtype": "float32"}),
        ("cached", {"attention_8bit": SOME}),
        ("prior", {"attention_8bit": SOME}),
    ],
    ids=str,
)
def test_engine_equals_reference_for_any_number_of_stages(engine: Build, policy: str, options: dict[str, Any]) -> None:
    """With attention in 8 bits at some steps and layers, a slot holds either format, and readers convert."""
    options = {"context": policy, "features_8bit": True, **options}
    built = build(engine, **options)
    expected = reference_latents(built, embeds(built, False), **CALL)
    assert expected.isfinite().all() and expected.std() > 0.1
    for stages in (1, 3):
        assert torch.equal(latents(build(engine, stages=stages, **options)), expected), stages


def test_another_video_and_a_near_one(engine: Build) -> None:
    exact = latents(build(engine, dtype="float32"))
    kept = latents(build(engine, dtype="float32", features_8bit=True))
    distance = (kept - exact).norm() / exact.norm()
    assert 0 < distance < 0.05


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"features_8bit": "no"}, "features_8bit='no': it has no modes; use True or False"),
        ({"features_8bit": "fp8"}, "features_8bit='fp8': it has no modes; use True or False"),
        ({"features_8bit": 1}, "features_8bit=1: it has no modes; use True or False"),
        ({"context_frames": 0}, "with context_frames=0: nobody lends features"),
        ({"attention_8bit": "fp8"}, "with attention_8bit='fp8' in all layers and steps"),
        ({"attention_8bit": "int8"}, "with attention_8bit='int8' in all layers and steps"),
    ],
    ids=str,
)
def test_what_would_do_nothing_is_refused(options: dict[str, Any], says: str) -> None:
    """It would change the identity of a run, and nothing else."""
    with pytest.raises(ValueError, match=says) as refused:
        EngineConfig.of(**{"features_8bit": True, **options})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("options", [{"attention_8bit": SOME}, {"attention_8bit": "fp8", "refresh_every": 3}], ids=str)
def test_where_attention_has_16_bits_at_times_it_does_something(engine: Build, options: dict[str, Any]) -> None:
    made, plain = (latents(build(engine, features_8bit=on, **options)) for on in (True, False))
    assert not torch.equal(made, plain)


def test_rows_come_back_near_and_do_not_know_each_other() -> None:
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
    back = KeysValues(*torch.full_like(x, torch.nan))
    Packed.of(KeysValues(*x)).restore(back)
    for made, given in zip(back, x):
        assert 0 < (made - given).norm() / given.norm() < 0.04
    part = KeysValues(*torch.empty(2, 20, 64))
    Packed.of(KeysValues(*x[:, 30:])).restore(part)
    assert all(torch.equal(a, b[30:]) for a, b in zip(part, back))


CASES: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "kept in 8": {"features_8bit": True},
    "int8 attention": {"attention_8bit": "int8"},
    "fp8 attention": {"attention_8bit": "fp8"},
    "some": {"attention_8bit": SOME},
    "some, kept in 8": {"attention_8bit": SOME, "features_8bit": True},
    "refreshes": {"attention_8bit": "fp8", "refresh_every": 3},
    "float32": {"dtype": "float32", "features_8bit": True},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", ["cached", "paper"])
def test_the_planner_counts_the_bytes_of_the_store(
    engine: Build, wan21: Path, policy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each stage, to the byte; before, 8-bit attention's features were counted as 16-bit ones."""
    small = {"height": 32, "width": 48}  # 6 tokens per frame
    found: list[int] = []
    make = FeatureStore.__init__

    def watch(self: FeatureStore, *args: Any) -> None:
        make(self, *args)
        found.append(self.nbytes)

    monkeypatch.setattr(FeatureStore, "__init__", watch)
    built = build(engine, stages=2, context=policy, **CASES[name])
    latents(built, **small)
    video = VideoConfig(output_type="latent", **{**CALL, **small})
    request = check_request(built.setup, built.scheduler, video, VideoInputs(**embeds(built, False)))
    work = Workload(model_sizes(str(wan21)), request.video, built.config)
    schedule = schedule_of(built.setup, [request])
    counted = [memory.stage_memory(work, schedule, [2, 2], stage).features for stage in range(2)]
    assert counted == found


def test_half_of_the_memory_of_a_large_model() -> None:
    sizes = model_sizes("wan2.1-t2v-14b")
    video = VideoConfig(num_frames=1025, num_inference_steps=50)
    plain, kept = (Workload(sizes, video, EngineConfig.of(features_8bit=on)) for on in (False, True))
    ratio = memory.slot_bytes(kept, range(40), "tail") / memory.slot_bytes(plain, range(40), "tail")
    assert ratio == pytest.approx(0.5 + 4 / 2 / 5120)
    assert memory.KEY_TILE == TILE


def test_snapshots_compare_it(engine: Build, tmp_path: Path) -> None:
    """A run goes on with features as they were kept."""
    options = {"refresh_every": 2, "features_8bit": True}
    built = build(engine, **options)
    assert _identity(built.setup, built.scheduler)["features_8bit"] is True
    whole = latents(built)
    stream = build(engine, **options).stream(**embeds(built, False), output_type="latent", checkpoint=tmp_path, **CALL)
    next(iter(stream))
    stream.close()
    with pytest.raises(SnapshotError, match="features_8bit: True there, False here"):
        build(engine, **{**options, "features_8bit": False}).resume(tmp_path)
    rest = [chunk.latents for chunk in build(engine, stages=2, **options).resume(tmp_path)]
    assert all(part is not None for part in rest)
    assert whole.isfinite().all()
    assert EngineConfig.from_json(asdict(built.config)) == built.config


def test_a_card_without_fp8_is_refused(engine: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_8bit, "rows_absent", lambda device: "fp8 needs compute capability 8.9, see cuda:0")
    with pytest.raises(ValueError, match=r"features_8bit=True cannot run: fp8 needs .* leave it out"):
        build(engine, features_8bit=True)
