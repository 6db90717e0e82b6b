"""Weights in place of a folder's transformer: names, fp8, LoRAs on top, refusals, identity, and what a plan counts.

The oracle is the same model in its folder: bit for bit, also for fp8, whose numbers are written there in float32.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from counted_reads import noting
from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.checkpoint.snapshot import SnapshotError
from dualparal.cli.main import app
from dualparal.config.eight_bit import LINEAR_OFF, LinearPolicy
from dualparal.config.engine import EngineConfig
from dualparal.config.lora import Lora
from dualparal.config.transformer_file import TransformerFile
from dualparal.config.video import VideoConfig
from dualparal.engine.engine import Engine
from dualparal.kernels.linear_8bit import quantise_rows
from dualparal.models import linear as linear_module
from dualparal.models import weights
from dualparal.models.files import ModelFiles
from dualparal.models.headers import read_entries
from dualparal.models.json_files import ModelError
from dualparal.models.linear import placed
from dualparal.models.registry import model_sizes
from dualparal.models.wan.names import original_name
from dualparal.models.wan.shapes import tensor_shapes
from dualparal.models.wan.single_file import read_transformer
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.planning.cost import layer_arithmetic
from dualparal.planning.memory import slice_bytes
from dualparal.planning.workload import Workload
from engine_calls import embeds, reference_latents
from live_bytes import LiveBytes
from lora_files import write_lora
from transformer_files import FP8_KINDS, LAYOUTS, write_fp8, write_transformer

CPU, WEIGHTS = torch.device("cpu"), "diffusion_pytorch_model.safetensors"
CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 29, "num_inference_steps": 3}
Build = Callable[..., Engine]
State = dict[str, torch.Tensor]


def state_of(model: Path, folder: str = "transformer") -> State:
    return load_file(model / folder / WEIGHTS)


def with_weights(model: Path, path: Path, state: State | None) -> Path:
    """A copy of a model with other weights of its transformer; None: with none."""
    shutil.copytree(model, path)
    (path / "transformer" / WEIGHTS).unlink()
    if state is not None:
        save_file(state, path / "transformer" / WEIGHTS)
    return path


@pytest.fixture(scope="module")
def bare(wan21: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without weights of its transformer."""
    return with_weights(wan21, tmp_path_factory.mktemp("bare") / "model", None)


def latents(built: Engine) -> torch.Tensor:
    made: torch.Tensor = built(**embeds(built), guidance_scale=3.0, output_type="latent", **CALL).frames
    return made


def values(files: ModelFiles, layers: range, dtype: torch.dtype = torch.float32) -> State:
    """Tensors of a slice, before layers are joined."""
    found: list[State] = []
    files.spec.__class__.build, real = lambda self, tensors, layers: found.append(dict(tensors)), files.spec.build
    try:
        files.load_slices(layers, dtype, CPU)
    finally:
        files.spec.__class__.build = real.__func__  # type: ignore[attr-defined]
    return found[0]


# Names ------------------------------------------------------------------------------------------------------------


IMAGES = {"in_channels": 36, "out_channels": 16, "image_dim": 24, "added_kv_proj_dim": 48}


@pytest.mark.parametrize("change", [{"cross_attn_norm": True}, {"cross_attn_norm": False}, IMAGES])
def test_names_are_those_of_diffusers_conversion(wan21: Path, change: dict[str, Any]) -> None:
    config = json.loads((wan21 / "transformer" / "config.json").read_text())
    shapes = tensor_shapes({**config, "num_layers": 12, **change})
    found = convert_wan_transformer_to_diffusers({original_name(name): name for name in shapes})
    assert found == {name: name for name in shapes}


def test_every_layout_is_the_folder_s_model_and_a_rank_reads_its_layers(
    wan21: Path, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, read = state_of(wan21), list[str]()
    monkeypatch.setattr(weights, "_open", noting(weights._open, lambda path, entry: read.append(entry.key)))
    for layout in LAYOUTS:
        file = write_transformer(tmp_path / f"{layout}.safetensors", layout, state)
        files = ModelFiles(bare, transformers=(TransformerFile(str(file)),))
        files.check_weights()
        for layers in (range(0, 2), range(2, 4)):
            expected = values(ModelFiles(wan21), layers)
            read.clear()
            made = values(files, layers)
            assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
            assert {int(key.split("blocks.")[1].split(".")[0]) for key in read if "blocks." in key} == set(layers)


@pytest.mark.parametrize(("images", "known"), [("condition", "wan2.2-i2v-a14b"), ("both", "wan2.1-flf2v-14b-720p")])
def test_a_file_of_an_image_to_video_model(bare: Path, tmp_path: Path, images: str, known: str) -> None:
    folder = build_tiny_pipeline(tmp_path / "model", layers=2, images=images)
    file = write_transformer(tmp_path / "file.safetensors", "original", state_of(folder))
    given = (TransformerFile(str(file)),)
    files, layers = ModelFiles(folder, transformers=given), range(2)
    files.check_weights()
    expected, made = values(ModelFiles(folder), layers), values(files, layers)
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
    assert model_sizes(str(folder), given) == model_sizes(str(folder))
    with pytest.raises(ModelError, match=r"\(image to video\).* of another kind \(text to video\)"):
        _ = ModelFiles(bare, transformers=given).spec
    real = model_sizes(known)
    assert read_transformer(tensor_shapes({**files.config("transformer"), **real.kind}), real.kind)  # for a plan


def test_the_same_video_with_a_lora_and_for_each_expert(
    engine: Build, wan21: Path, wan22: Path, bare: Path, tmp_path: Path
) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", "original", state_of(wan21)).path
    file = write_transformer(tmp_path / "file.safetensors", "comfy", state_of(wan21))
    options: dict[str, Any] = {"frames_per_block": 2, "context_frames": 1, "loras": [lora]}
    expected = latents(engine(**options))
    for stages in (1, 2):
        assert torch.equal(latents(engine(bare, transformers=[file], stages=stages, **options)), expected)
    del options["loras"]
    low = write_transformer(tmp_path / "low.safetensors", "original", state_of(wan22, "transformer"))
    mixed = with_weights(wan22, tmp_path / "mixed", None)
    shutil.copy(wan22 / "transformer_2" / WEIGHTS, mixed / "transformer" / WEIGHTS)
    shutil.copy(wan22 / "transformer" / WEIGHTS, mixed / "transformer_2" / WEIGHTS)
    high = write_transformer(tmp_path / "high.safetensors", "original", state_of(wan22, "transformer_2"))
    made = latents(engine(wan22, transformers=[f"high:{high}", (low, "low")], **options))
    assert torch.equal(made, latents(engine(mixed, **options)))
    assert torch.equal(
        latents(engine(wan22, transformers=[(low, "high")], **options)), latents(engine(wan22, **options))
    )


# 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FP8_KINDS)
def test_fp8_is_kept_and_makes_the_video_of_its_numbers(
    engine: Build, wan21: Path, bare: Path, tmp_path: Path, kind: str
) -> None:
    numbers = write_fp8(file := tmp_path / "fp8.safetensors", kind, state_of(wan21))
    oracle = with_weights(wan21, tmp_path / "oracle", numbers)
    dtype = "float32" if kind == "rows" else "bfloat16"
    options: dict[str, Any] = {"frames_per_block": 2, "context_frames": 1, "dtype": dtype}
    expected, plain = (latents(engine(model, **options)) for model in (oracle, wan21))
    assert (plain - expected).abs().max() > 1e-3
    built = engine(bare, transformers=[file], **options)
    assert torch.equal(reference_latents(built, embeds(built), guidance_scale=3.0, **CALL), expected)
    assert torch.equal(latents(engine(bare, transformers=[file], stages=2, **options)), expected)
    spec, found = built.source.spec, values(built.source, range(4), built.dtype)  # type: ignore[arg-type]
    for name in spec.names(0, range(4)):
        eight = spec.linear_layer(name) is not None
        assert (found[name].dtype == torch.float8_e4m3fn) == eight
        assert eight or torch.equal(found[name], numbers[name].to(found[name].dtype))

    # The planner counts what is kept.
    config = EngineConfig.of(frames_per_block=2, context_frames=1, dtype=dtype, transformers=[file])
    video = VideoConfig(32, 32, 29, 3)
    work, other = (Workload(model_sizes(str(bare), files), video, config) for files in (config.transformers, ()))
    assert slice_bytes(work, [4], 0) == sum(tensor.nbytes for tensor in found.values()) < slice_bytes(other, [4], 0)
    assert built.source.sizes == work.model  # type: ignore[attr-defined]
    assert layer_arithmetic(work, 100, 300).moved > layer_arithmetic(other, 100, 300).moved


def test_fp8_equals_diffusers_with_its_numbers(engine: Build, wan21: Path, bare: Path, tmp_path: Path) -> None:
    numbers = write_fp8(file := tmp_path / "fp8.safetensors", "comfy", state_of(wan21))
    pipe = WanPipeline.from_pretrained(wan21)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.load_state_dict(numbers)
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    call: dict[str, Any] = {**CALL, "num_frames": 9, "latents": noise, "output_type": "latent"}
    made = engine(bare, transformers=[file])("two cats", **call).frames
    assert (made - pipe("two cats", **call).frames).abs().max() < 5e-5


def test_fp8_products_take_the_file_s_numbers_and_a_lora_rounds_once_more(
    wan21: Path, bare: Path, tmp_path: Path
) -> None:
    numbers = write_fp8(file := tmp_path / "fp8.safetensors", "rows", state_of(wan21))
    lora = write_lora(tmp_path / "lora.safetensors", "diffusers", state_of(wan21))
    plain = ModelFiles(bare, transformers=(TransformerFile(str(file)),))
    name = "blocks.0.attn1.to_q.weight"  # the LoRA changes it
    stored = load_file(file)
    for policy in (LINEAR_OFF, LinearPolicy("fp8")):
        own, scale = stored["blocks.0.self_attn.q.weight"], stored["blocks.0.self_attn.q.weight_scale"]
        end = "_scale" if policy.on else "_kept_scale"
        kept = placed(plain.spec, name, own, torch.bfloat16, CPU, policy, scale)
        assert torch.equal(kept[name].float(), own.float()) and torch.equal(kept[name + end], scale)
        changed = ModelFiles(bare, (Lora(str(lora.path)),), plain.transformers)
        merge = partial(changed.lora_files[0][0].merge, name)
        made = placed(plain.spec, name, own, torch.bfloat16, CPU, policy, scale, merge)
        wanted = quantise_rows((numbers[name].double() + lora.added[name]).float())
        error = (made[name].float() * made[name + end] - wanted.values.float() * wanted.scale).abs().max()
        assert error < 0.1 * numbers[name].abs().max() and made[name].dtype == torch.float8_e4m3fn
        assert (made[name].float() * made[name + end] - numbers[name]).abs().max() > 2 * error


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_a_lora_is_added_to_some_rows_at_a_time(
    wan21: Path, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write_fp8(file := tmp_path / "fp8.safetensors", "rows", state_of(wan21))
    lora = write_lora(tmp_path / "lora.safetensors", "original", state_of(wan21))
    files = ModelFiles(bare, (Lora(str(lora.path)),), (TransformerFile(str(file)),))
    file_of_it, stored, end = files.lora_files[0][0], load_file(file), "_kept_scale"

    def made(name: str) -> dict[str, torch.Tensor]:
        own = stored[f"{original_name(name.removesuffix('.weight'))}.weight"]
        scale = stored.get(f"{original_name(name.removesuffix('.weight'))}.weight_scale")
        own, scale = (own, scale) if kind == "fp8" else (own.bfloat16(), None)
        return placed(files.spec, name, own, torch.bfloat16, CPU, LINEAR_OFF, scale, partial(file_of_it.merge, name))

    names = [name for name in files.spec.names(0, range(1)) if name.endswith("weight") and file_of_it.changes(name)]
    assert len(names) >= 6
    whole = {name: made(name) for name in names}
    monkeypatch.setattr(linear_module, "_PIECE", 250)  # five rows of 48 numbers, two of 96
    for name in names:
        parts = made(name)
        assert parts.keys() == whole[name].keys()
        for key, tensor in parts.items():
            rounding = 0.07 if tensor.dtype == torch.float8_e4m3fn else 1e-2
            torch.testing.assert_close(tensor.float(), whole[name][key].float(), rtol=rounding, atol=1e-3)
    assert any(name + end in whole[name] for name in names) == (kind == "fp8")


def test_no_second_copy_of_a_matrix_is_held_while_a_lora_is_added(
    wan21: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_PIECE", 1 << 16)
    name, spec = "blocks.0.ffn.net.0.proj.weight", ModelFiles(wan21).spec
    matrix = torch.ones(2048, 1024, dtype=torch.bfloat16)
    for own, scale in ((matrix, None), (matrix.to(torch.float8_e4m3fn), torch.ones(1))):
        with LiveBytes() as live:
            made = placed(spec, name, own, torch.bfloat16, CPU, LINEAR_OFF, scale, lambda piece, _: piece.float() + 1)
        assert made[name].shape == own.shape
        assert live.peak < 2 * own.nbytes + 8 * 4 * (1 << 16)  # the file's, the model's, and pieces in float32


# Identity ---------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_same_file_only(engine: Build, wan21: Path, bare: Path, tmp_path: Path) -> None:
    state = state_of(wan21)
    file = write_transformer(tmp_path / "file.safetensors", "original", state)

    def build(path: Path, stages: int) -> Engine:
        options: dict[str, Any] = {"frames_per_block": 2, "context_frames": 1, "refresh_every": 1}
        return engine(bare, stages=stages, transformers=[path], **options)

    stream = build(file, 2).stream("a cat", output_type="latent", checkpoint=Checkpoint(tmp_path / "kept", 1), **CALL)
    whole = [next(stream).latents, next(stream).latents]
    stream.close()
    moved = file.rename(tmp_path / "elsewhere.safetensors")
    resumed = list(build(moved, 3).resume(tmp_path / "kept"))
    assert torch.equal(resumed[0].latents, whole[resumed[0].block])
    other = write_transformer(tmp_path / "other.safetensors", "original", {k: 1.01 * t for k, t in state.items()})
    assert other.stat().st_size == moved.stat().st_size
    with pytest.raises(SnapshotError, match="weights"):
        build(other, 2).resume(tmp_path / "kept")


def test_values_of_the_flag_and_of_the_option(wan21: Path, tmp_path: Path) -> None:
    config = EngineConfig.of(transformers=["high:a.safetensors", (Path("b"), "low")])
    assert config.transformers == (TransformerFile("a.safetensors", "high"), TransformerFile("b", "low"))
    assert EngineConfig.from_json(json.loads(json.dumps(asdict(config)))) == config and hash(config)
    for value, words in {
        "a.gguf": "GGUF is not read; use the same model as .safetensors",
        "low:a.pth": "a pickle, which is never read",
        ("a.safetensors", "mid"): "use 'high' or 'low'",
        3: "use a file",
        "": "use a .safetensors file",
    }.items():
        with pytest.raises(ValueError, match=words):
            EngineConfig.of(transformers=[value])
    with pytest.raises(ValueError, match="list of files"):
        EngineConfig.of(transformers="a.safetensors")
    write_fp8(file := tmp_path / "fp8.safetensors", "rows", state_of(wan21))
    flags = ["--model", str(wan21), "--gpus", "1xh100", "--num-frames", "29", "--size", "64x64"]
    result = CliRunner().invoke(app, ["plan", *flags, "--transformer", str(file)])
    assert result.exit_code == 0, result.exception
    result = CliRunner().invoke(
        app, ["generate", "--model", str(wan21), "--prompt", "a", "--transformer", "none.safetensors"]
    )
    assert isinstance(result.exception, ValueError) and "none.safetensors: there is no such" in str(result.exception)


# Refusals ---------------------------------------------------------------------------------------------------------

Q = "blocks.0.self_attn.q"
EIGHT = torch.zeros(48, 48, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_emb.proj.0.weight": torch.zeros(1)}, r"\(image to video\), where the model's folder is of another kind"),
        ({"vace_blocks.0.after_proj.bias": torch.zeros(1)}, "VACE"),
        ({"patch_embedding.weight": torch.zeros(48, 36, 1, 2, 2)}, r"takes 36 channels and makes 16 \(image to"),
        ({"patch_embedding.weight": torch.zeros(50, 16, 1, 2, 2)}, "width of 50 does not divide into heads of 24"),
        ({"patch_embedding.weight": None}, "patch_embedding.weight is missing: no Wan transformer"),
        ({"blocks.0.ffn.0.weight": torch.zeros(4)}, r"ffn.0.weight is \[4\]: no Wan"),
        ({"blocks.3.cross_attn.k.weight": None}, "1 missing .blocks.3.attn2.to_k.weight"),
        ({"blocks.3.cross_attn.k.weight": torch.zeros(48, 40)}, r"1 of another shape .blocks.3.attn2.to_k.weight \(48"),
        ({"blocks.0.self_attn.extra": torch.zeros(1)}, "1 unknown .blocks.0.self_attn.extra"),
        ({f"{Q}.weight": torch.zeros(48, 48, dtype=torch.int8)}, "I8 .*quantized weights of this kind"),
        ({f"{Q}.weight": torch.zeros(48, 48, dtype=torch.float8_e5m2)}, "F8_E5M2 .*quantized weights of this kind"),
        ({f"{Q}.scale_weight": torch.ones(1)}, "q.scale_weight' is the scale of no weight in F8_E4M3"),
        ({f"{Q}.weight": EIGHT, f"{Q}.weight_scale": torch.ones(3, 3)}, r"weight_scale' is F32 \[3, 3\]: scales of a"),
        ({f"model.diffusion_model.{Q}.weight": torch.zeros(48, 48)}, "mean the same tensor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_before_weights_are_read(
    engine: Build, wan21: Path, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str
) -> None:
    monkeypatch.setattr(ModelFiles, "load_slices", lambda *_: pytest.fail("weights were read"))
    state = {original_name(name): tensor for name, tensor in state_of(wan21).items()} | change
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, path := tmp_path / "f.safetensors")
    with pytest.raises(ModelError, match=words) as error:
        engine(bare, transformers=[path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_and_models_that_cannot_be(engine: Build, wan21: Path, wan22: Path, tmp_path: Path) -> None:
    file = write_transformer(tmp_path / "f.safetensors", "original", state_of(wan21))
    (torn := tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:-10])
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Any, list[Any], str]] = [
        (None, [tmp_path / "none.safetensors"], "there is no such file"),
        (None, [tmp_path / "empty"], "no weight file"),
        (None, [torn], "not a whole safetensors file"),
        (None, [(file, "high")], "a model with one transformer; leave high: out"),
        (None, [file, file], "one transformer has one"),
        (wan22, [file], f"two transformers; say high:{re.escape(str(file))} or low:"),
        (WanPipeline.from_pretrained(wan21), [file], "loaded pipeline: it has its own"),
        (file, [], "is a file, which has no VAE.*--transformer"),
        (tmp_path / "a.gguf", [], "GGUF is not read"),
    ]
    for model, files, words in cases:
        with pytest.raises(ModelError, match=words) as error:
            engine(model, transformers=files)
        assert "\n" not in str(error.value)


def test_a_file_larger_than_memory_is_opened(tmp_path: Path) -> None:
    """Linux refuses to map so much to write, as the library's own reader does."""
    size = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)
    entries = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [size], "data_offsets": [8, 8 + size]},
    }
    header = json.dumps(entries).encode()
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.0, 2.0))
        try:
            file.truncate(8 + len(header) + 8 + size)  # sparse
        except OSError:
            pytest.skip("no file of this size here")
    files = weights.WeightFiles(tmp_path, read_entries(tmp_path))
    assert dict(files.read(["a"]))["a"].tolist() == [1.0, 2.0]
