"""The tiny pipeline: complete, loadable, repeatable, and with numbers that stay sane."""

import json
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from dualparal.models.wan.tiny import build_tiny_pipeline


def weights(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*.safetensors")}


def load(directory: Path) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(directory, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("options", [{}, {"wan22": True}, {"residual_vae": True}], ids=lambda o: "-".join(o) or "wan21")
def test_wan_pipeline_loads_and_runs_it(options: dict[str, bool], tmp_path: Path) -> None:
    pipe = load(build_tiny_pipeline(tmp_path, **options))
    frames = pipe(
        "a cat, un été, 猫 🐈",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        max_sequence_length=64,
    ).frames
    assert frames.shape == (1, 5, 32, 32, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0.1
    assert np.abs(np.diff(frames[0], axis=0)).mean() > 0.01
    if "wan22" in options:
        assert pipe.config.boundary_ratio == 0.875
        pair = pipe.transformer.state_dict(), pipe.transformer_2.state_dict()
        assert not any(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


@pytest.mark.parametrize(("layers", "steps"), [(4, 50), (30, 6)])
def test_latents_stay_near_one(layers: int, steps: int, tmp_path: Path) -> None:
    pipe = load(build_tiny_pipeline(tmp_path, layers=layers, heads=1, head_dim=8))
    latents = pipe(
        "a cat",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=5.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames
    assert latents.isfinite().all()
    assert 0.5 < latents.std() < 3.0
    assert latents.abs().max() < 15.0


def test_other_frames_and_the_prompt_matter(tiny: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(tiny / "transformer")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 4, 4, 4, generator=generator)
    text = torch.randn(1, 8, 32, generator=generator)
    changed = latents.clone()
    changed[:, :, 0] += 1.0

    def velocity(latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return transformer(latents, torch.tensor([500]), text).sample[:, :, 1:]

    before = velocity(latents, text)
    assert (velocity(changed, text) - before).std() > 0.03 * before.std()
    assert (velocity(latents, -text) - before).std() > 0.03 * before.std()
    # Positions matter too: the same frames in another order are another result.
    swapped = velocity(latents[:, :, [1, 0, 2, 3]], text)
    assert (swapped[:, :, 1:] - before[:, :, 1:]).std() > 0.01 * before.std()


def test_same_seed_same_bytes_whatever_the_random_state(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    random.seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    torch.set_default_dtype(torch.float64)
    try:
        again = build_tiny_pipeline(tmp_path / "again")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert weights(again) == weights(tiny)
    assert set(weights(tiny)) == {
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }

    other = weights(build_tiny_pipeline(tmp_path / "other", seed=1))
    assert all(other[name] != content for name, content in weights(tiny).items())


def test_small_complete_and_without_pickles_or_paths(tiny: Path) -> None:
    files = [path for path in tiny.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    index = json.loads((tiny / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["transformer_2"] == [None, None]
    assert not any(str(tiny) in path.read_text() for path in files if path.suffix == ".json")
    vae = json.loads((tiny / "vae/config.json").read_text())
    assert len(set(vae["latents_mean"])) == len(set(vae["latents_std"])) == 16


def test_tokenizer_takes_any_text_and_keeps_letters_apart(tiny: Path) -> None:
    tokenizer = load(tiny).tokenizer
    ids = tokenizer("a cat")["input_ids"]
    assert ids != tokenizer("a cap")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer("猫 🐈 \x00")["input_ids"].count(tokenizer.unk_token_id) >= 2
    assert tokenizer("")["input_ids"] == [1]
    assert len(tokenizer("x" * 900, truncation=True, max_length=512)["input_ids"]) == 512


def test_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the builder opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    build_tiny_pipeline(tmp_path)


@pytest.mark.parametrize("wan22", [False, True])
def test_shards_hold_the_same_tensors(wan22: bool, tmp_path: Path) -> None:
    whole = build_tiny_pipeline(tmp_path / "whole", wan22=wan22)
    sharded = build_tiny_pipeline(tmp_path / "sharded", wan22=wan22, max_shard_size="100KB")
    for name in ("transformer", "transformer_2") if wan22 else ("transformer",):
        folder = sharded / name
        index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 2
        assert {path.name for path in shards} == set(index["weight_map"].values())
        tensors = {key: tensor for path in shards for key, tensor in load_file(path).items()}
        expected = load_file(whole / name / "diffusion_pytorch_model.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    WanPipeline.from_pretrained(sharded, local_files_only=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"layers": 0}, "layers=0"), ({"head_dim": 7}, "head_dim=7"), ({"head_dim": 4}, "head_dim=4")],
)
def test_refuses_impossible_sizes(options: dict[str, int], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        build_tiny_pipeline(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_refuses_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="not empty"):
        build_tiny_pipeline(tmp_path)
