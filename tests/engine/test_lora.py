"""LoRAs merged while weights are read: every layout, refusals, who reads what, and the run's identity.

The oracle is diffusers' pipeline whose weights were merged by the textbook's formula; with ``peft`` installed,
diffusers' own ``load_lora_weights`` and ``fuse_lora`` as well.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from counted_reads import noting
from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.checkpoint.snapshot import SnapshotError
from dualparal.config.engine import EngineConfig
from dualparal.config.lora import Lora
from dualparal.engine.engine import Engine
from dualparal.engine.identity import run_info
from dualparal.models import lora as lora_module
from dualparal.models.files import ModelFiles
from dualparal.models.json_files import ModelError
from dualparal.models.loaded import LoadedPipeline
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.schedule.layout import split_layers
from engine_calls import embeds, reference_latents
from lora_files import IMAGE_MODULES, LAYOUTS, MODULES, Written, merge, write_lora

CPU = torch.device("cpu")
CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
LONG: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 29, "num_inference_steps": 3}
Build = Callable[..., Engine]


def state_of(model: Path, folder: str = "transformer") -> dict[str, torch.Tensor]:
    return load_file(model / folder / "diffusion_pytorch_model.safetensors")


def loaded(model: Path) -> Any:
    pipe = WanPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_diffusers(pipe: Any) -> torch.Tensor:
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return pipe("two cats", negative_prompt="dogs", latents=noise, **CALL).frames


def by_us(engine: Engine) -> torch.Tensor:
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return engine("two cats", negative_prompt="dogs", latents=noise, **CALL).frames


@pytest.fixture(scope="module")
def plain(wan21: Path) -> torch.Tensor:
    return by_diffusers(loaded(wan21))


@pytest.fixture(scope="module")
def written(wan21: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        layout: write_lora(folder / f"{layout}.safetensors", layout, state_of(wan21), seed)
        for seed, layout in enumerate(LAYOUTS)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_block_equals_diffusers_with_merged_weights(
    wan21: Path, written: dict[str, Written], plain: torch.Tensor, engine: Build, layout: str
) -> None:
    pipe = loaded(wan21)
    merge(pipe.transformer, written[layout].added, 0.7)
    expected = by_diffusers(pipe)
    assert (expected - plain).abs().max() > 0.05
    made = by_us(engine(stages=2, loras=[(written[layout].path, 0.7)]))
    assert (made - expected).abs().max() < 5e-5


@pytest.mark.parametrize(
    "layout", ["diffusers", "diffusers with alpha"]
)  # its other readers drop some keys or need all
def test_one_block_equals_diffusers_own_loader(
    wan21: Path, written: dict[str, Written], engine: Build, layout: str
) -> None:
    pytest.importorskip("peft")
    path = written[layout].path
    pipe = loaded(wan21)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    assert (by_us(engine(loras=[(path, 0.7)])) - by_diffusers(pipe)).abs().max() < 5e-5


@pytest.mark.parametrize("layout", ["diffusers", "original", "kohya"])
def test_layers_that_read_images_are_changed_too(tmp_path: Path, engine: Build, layout: str) -> None:
    model = build_tiny_pipeline(tmp_path / "model", layers=4, images="first")
    modules = {**MODULES, **IMAGE_MODULES}
    path, added = write_lora(tmp_path / "lora.safetensors", layout, state_of(model), 1, modules)
    call = {**CALL, "image": Image.radial_gradient("L").convert("RGB").resize((32, 32)), "prompt": "two cats"}
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    made = engine(model, stages=2, loras=[(path, 0.7)])(latents=noise, **call).frames
    expected = []
    for changes in (added, {name: added[name] for name in added if name.removesuffix(".weight") not in IMAGE_MODULES}):
        pipe = WanImageToVideoPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        merge(pipe.transformer, changes, 0.7)
        expected.append(pipe(latents=noise, **call).frames)
    assert (made - expected[0]).abs().max() < 5e-5 < 1e-3 < (made - expected[1]).abs().max()
    if layout == "diffusers" and importlib.util.find_spec("peft"):  # and their own loader
        pipe = WanImageToVideoPipeline.from_pretrained(model)
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        pipe.fuse_lora(lora_scale=0.7)
        pipe.unload_lora_weights()
        assert (made - pipe(latents=noise, **call).frames).abs().max() < 5e-5


def test_two_files_add_up_and_each_expert_has_its_own(
    wan22: Path, engine: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        write_lora(tmp_path / f"{seed}.safetensors", layout, state_of(wan22), seed)
        for seed, layout in enumerate(("original", "kohya", "diffusers"))
    ]
    pipe = loaded(wan22)
    merge(pipe.transformer, files[0].added, 1.0)
    merge(pipe.transformer_2, files[1].added, -0.5)
    merge(pipe.transformer_2, files[2].added, 0.25)
    expected = by_diffusers(pipe)
    monkeypatch.chdir(tmp_path)
    loras = ["high:0.safetensors", Lora("1.safetensors", -0.5, "low"), ("2.safetensors", 0.25, "low")]
    assert (by_us(engine(wan22, loras=loras)) - expected).abs().max() < 5e-5
    swapped = by_us(engine(wan22, loras=["low:0.safetensors", "high:1.safetensors:-0.5", "high:2.safetensors:0.25"]))
    assert (swapped - expected).abs().max() > 1e-2


def test_many_blocks_are_the_same_for_any_number_of_stages(engine: Build, written: dict[str, Written]) -> None:
    options: dict[str, Any] = {
        "frames_per_block": 2,
        "context_frames": 1,
        "loras": [written["original"].path, (written["kohya"].path, 0.5)],
    }
    prompt = embeds(engine(**options))
    expected = reference_latents(engine(**options), prompt, guidance_scale=3.0, **LONG)
    without = engine(**{**options, "loras": []})(**prompt, guidance_scale=3.0, output_type="latent", **LONG).frames
    assert (without - expected).abs().max() > 0.05
    for stages in (1, 2, 3, 4):
        made = engine(stages=stages, **options)(**prompt, guidance_scale=3.0, output_type="latent", **LONG).frames
        assert torch.equal(made, expected), stages


def test_a_run_goes_on_with_the_same_lora_only(engine: Build, written: dict[str, Written], tmp_path: Path) -> None:
    def build(stages: int, *loras: Any) -> Engine:
        return engine(stages=stages, frames_per_block=2, context_frames=1, refresh_every=1, loras=loras)

    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(written["original"].path.read_bytes())
    stream = build(2, lora).stream("a cat", output_type="latent", checkpoint=Checkpoint(tmp_path / "kept", 1), **LONG)
    whole = [next(stream).latents, next(stream).latents]
    stream.close()
    moved = lora.rename(tmp_path / "elsewhere.safetensors")
    resumed = list(build(3, moved).resume(tmp_path / "kept"))
    assert torch.equal(resumed[0].latents, whole[resumed[0].block])

    tensors = load_file(moved)  # another LoRA of the same trainer: the same header, the same size
    save_file(
        {key: tensor * 1.01 if tensor.ndim else tensor for key, tensor in tensors.items()}, lora, {"format": "pt"}
    )
    assert lora.stat().st_size == moved.stat().st_size
    for others in ((), (lora,), ((moved, 0.9),), (moved, moved)):
        with pytest.raises(SnapshotError, match="LoRA"):
            build(3, *others).resume(tmp_path / "kept")


def test_ranks_compare_the_files_and_not_their_places(
    engine: Build, written: dict[str, Written], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(written["kohya"].path.read_bytes())

    def told(*loras: Any) -> dict[str, Any]:
        built = engine(loras=loras)
        built.stream("a cat", output_type="latent", **LONG)
        assert built._run is not None
        spec = built._run.spec
        return run_info(built.setup, spec.scheduler, spec.requests, spec.schedule, None, None)

    assert told(written["kohya"].path) == told(copy)
    assert told(copy)["weights"] != told((copy, 0.5))["weights"] != told()["weights"]


# Reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys of the tensors that are read from LoRA files."""
    keys: list[str] = []
    monkeypatch.setattr(lora_module, "safe_open", noting(lora_module.safe_open, lambda path, name: keys.append(name)))
    yield keys


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_rank_reads_the_matrices_of_its_layers(
    wan21: Path, written: dict[str, Written], read: list[str], stages: int
) -> None:
    files = ModelFiles(wan21, (Lora(str(written["original"].path)),))
    files.check_weights(parts=False)
    assert read and all(key.endswith(".alpha") for key in read)  # one number each
    everything = {key for key in load_file(written["original"].path) if not key.endswith(".alpha")}
    seen: list[str] = []
    for index, layers in enumerate(split_layers(files.spec.num_layers, stages)):
        read.clear()
        files.load_slices(layers, torch.float32, CPU)
        blocks = {int(key.split(".")[2]) for key in read if ".blocks." in key}
        assert blocks == set(layers) and len(read) == len(set(read))
        assert any("patch_embedding" in key for key in read) == (index == 0)
        assert any("head.head" in key for key in read) == (index == stages - 1)
        seen += read
    assert set(seen) == everything


def test_it_is_added_before_numbers_are_rounded(wan21: Path, tmp_path: Path) -> None:
    name, layers = "blocks.0.attn1.to_out.0", range(0, 1)
    weight = state_of(wan21)[f"{name}.weight"]
    # Less than half of the last bit of bfloat16: lost, if the sum is made after the rounding.
    save_file({f"{name}.diff": (weight * 2.0**-9).contiguous()}, path := tmp_path / "lora.safetensors")
    files = ModelFiles(wan21, (Lora(str(path)),))
    made = files.load_slices(layers, torch.bfloat16, CPU)[0]._layers[0].out.weight  # type: ignore[attr-defined]
    assert torch.equal(made, (weight + weight * 2.0**-9).bfloat16())
    assert not torch.equal(made, weight.bfloat16())


# Refusals ---------------------------------------------------------------------------------------------------------

Q = "transformer.blocks.0.attn1.to_q"
DOWN, UP = torch.zeros(2, 48), torch.zeros(48, 2)
PAIR = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensors"),
        ({**PAIR, "transformer.blocks.4.attn1.to_q.lora_A.weight": DOWN}, "blocks.4.attn1.to_q.lora_A.weight.*not und"),
        ({**PAIR, "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": DOWN}, "k_img.*not understood"),
        ({**PAIR, f"{Q}.hada_w1_a": DOWN}, "hada_w1_a.*not understood"),
        ({**PAIR, f"{Q}.dora_scale": DOWN}, "dora_scale.*DoRA"),
        ({**PAIR, "text_encoder.layers.0.q.lora_A.weight": DOWN}, "text_encoder.*text encoder.*take it out"),
        ({**PAIR, "lora_te1_layers_0_q.alpha": torch.tensor(1.0)}, "lora_te1.*text encoder"),
        ({f"{Q}.lora_A.weight": DOWN}, "to_q.lora_A.weight' has no matrix"),
        ({f"{Q}.alpha": torch.tensor(1.0)}, "to_q.alpha' has no matrices, and so no rank"),
        ({**PAIR, f"{Q}.alpha": torch.tensor(float("nan"))}, "one finite number"),
        ({**PAIR, f"{Q}.alpha": torch.zeros(2)}, "one finite number"),
        ({**PAIR, f"{Q}.lora_A.weight": torch.zeros(2, 32)}, r"\[2, 32\].*do not fit blocks.0.attn1.to_q.weight, \[48"),
        ({**PAIR, f"{Q}.lora_B.weight": torch.zeros(48, 3)}, r"\[48, 3\]; they do not fit"),
        ({**PAIR, f"{Q}.lora_A.weight": torch.zeros(0, 48), f"{Q}.lora_B.weight": torch.zeros(48, 0)}, "no matrix"),
        ({f"{Q}.diff": torch.zeros(48, 1)}, "diff' is.*do not fit"),
        ({"blocks.0.scale_shift_table.diff_b": DOWN}, "scale_shift_table.bias, which the model does not have"),
        ({**PAIR, "blocks.0.self_attn.q.lora_up.weight": UP}, "mean the same part"),
        ({f"{Q}.diff": torch.zeros(48, 48, dtype=torch.int8)}, "is I8; F64"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named_before_weights_are_read(
    engine: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor], words: str
) -> None:
    def no_weights(*args: Any) -> None:
        raise AssertionError("weights were read")

    path = tmp_path / "lora.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)  # it refuses shared ones
    monkeypatch.setattr(ModelFiles, "load_slices", no_weights)
    with pytest.raises(ModelError, match=words) as error:
        engine(loras=[path])
    assert str(error.value).startswith(f"LoRA {path}: ") and "\n" not in str(error.value)


def test_files_and_models_that_cannot_be(engine: Build, wan21: Path, wan22: Path, tmp_path: Path) -> None:
    save_file(PAIR, path := tmp_path / "lora.safetensors")
    (torn := tmp_path / "torn.safetensors").write_bytes(path.read_bytes()[:-10])
    cases: list[tuple[Any, Any, str]] = [
        (None, tmp_path / "none.safetensors", "no such file"),
        (None, torn, "not a whole safetensors file"),
        (None, (path, 1.0, "high"), "a model with one transformer; leave high: out"),
        (wan22, path, f"two transformers; say high:{re.escape(str(path))} or low:"),
        (WanPipeline.from_pretrained(wan21), path, "loaded pipeline: fuse it there"),
    ]
    for model, lora, words in cases:
        with pytest.raises(ModelError, match=words):
            engine(model, loras=[lora])
    assert LoadedPipeline(cases[-1][0]).spec.num_layers == 4


def test_values_of_the_flag_and_of_the_option() -> None:
    assert Lora.parse("a.safetensors") == Lora("a.safetensors")
    assert Lora.parse("low:b/a.safetensors:-0.25") == Lora("b/a.safetensors", -0.25, "low")
    assert Lora.parse("C:a.safetensors:2") == Lora("C:a.safetensors", 2.0)
    for text, words in {
        "a.safetensors:much": "weight 'much'",
        "a.safetensors:nan": "finite",
        "a.safetensors:inf": "finite",
        "a.pt": "pickles",
        "high:a.pt:0.5": "pickles",
        "": "not a .safetensors",
    }.items():
        with pytest.raises(ValueError, match=words):
            Lora.parse(text)
    for value in (("a.safetensors", "1"), ("a.safetensors", True), ("a.safetensors", 1.0, "mid"), (), 3):
        with pytest.raises(ValueError, match="LoRA"):
            Lora.of(value)
    config = EngineConfig.of(loras=["a.safetensors", (Path("b.safetensors"), 0.5, "low")])
    assert config.loras == (Lora("a.safetensors"), Lora("b.safetensors", 0.5, "low")) and hash(config)
    assert EngineConfig.from_json(json.loads(json.dumps(asdict(config)))) == config  # as snapshots keep it
    with pytest.raises(ValueError, match="list of files"):
        EngineConfig.of(loras="a.safetensors")
