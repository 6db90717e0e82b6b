"""A second family of models runs by its row in the registry alone: engine, planner and command line know no family."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import dualparal
import toy_family
from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.cli.main import app
from dualparal.engine.engine import Engine
from dualparal.io.latents import read_latents
from dualparal.models import registry
from dualparal.models.files import ModelFiles
from dualparal.models.json_files import ModelError
from dualparal.models.loaded import LoadedPipeline
from dualparal.models.registry import FAMILIES, family_of, model_sizes
from dualparal.planning.memory import slice_bytes
from dualparal.planning.planner import plan
from dualparal.planning.workload import Workload
from engine_calls import embeds, reference_latents

CALL: dict[str, Any] = {"height": 8, "width": 12, "num_frames": 15, "num_inference_steps": 4}  # eight latent frames


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", toy_family.FAMILY)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_family.write(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def handlers() -> Iterator[None]:
    """The command line takes signals for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _engine(model: Any, stages: int = 1, **options: Any) -> Engine:
    options = {"frames_per_block": 3, "context_frames": 1, **options}
    return Engine.from_pretrained(model, device="cpu", stages=stages, **options)


@pytest.mark.parametrize("options", [{}, {"context": "prior"}, {"context": "paper"}, {"max_blocks_in_flight": 2}])
def test_the_engine_makes_the_same_video_for_any_number_of_stages(toy: Path, options: dict[str, Any]) -> None:
    prompt = embeds(_engine(toy))
    expected = reference_latents(_engine(toy, **options), prompt, seed=3, guidance_scale=3.0, **CALL)
    assert expected.shape == (1, 3, 8, 4, 6) and expected.isfinite().all() and expected.std() > 0.1
    for stages in (1, 2, 3):
        made = _engine(toy, stages, **options)(**prompt, seed=3, guidance_scale=3.0, output_type="latent", **CALL)
        assert torch.equal(made.frames, expected), stages


def test_prompts_are_encoded_and_frames_decoded_by_the_family(toy: Path, tmp_path: Path) -> None:
    chunks = list(_engine(toy, 2).stream({0: "a cat", 9: "a dog"}, output_type="pt", **CALL))
    frames, latents = torch.cat([c.frames for c in chunks]), torch.cat([c.latents for c in chunks], dim=2)
    assert frames.shape == (15, 3, 8, 12)
    ideal = toy_family.ToyDecoder(ModelFiles(toy).load_vae(torch.device("cpu"))).push(latents)
    assert torch.equal(frames, ideal / 2 + 0.5)
    assert not torch.equal(_engine(toy)("a cat", output_type="latent", **CALL).frames, latents)


def test_a_run_of_another_family_is_resumed(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    stream = _engine(toy, 2, refresh_every=2).stream(
        "a cat", output_type="pt", checkpoint=Checkpoint(folder, 1), **CALL
    )
    whole = [next(stream).frames, next(stream).frames]
    stream.close()
    resumed = list(_engine(toy, 3, refresh_every=2).resume(folder))
    assert torch.equal(resumed[0].frames, whole[resumed[0].block])


def test_a_loaded_pipeline_is_as_good_as_its_files(toy: Path) -> None:
    prompt = embeds(_engine(toy))
    expected, made = (
        _engine(model, 2)(**prompt, output_type="np", **CALL).frames for model in (toy, toy_family.ToyPipeline(toy))
    )
    assert (expected == made).all()


def test_a_plan_counts_by_the_family_s_sizes(toy: Path) -> None:
    found = plan(str(toy), "2xrtx4090", height=64, width=96, num_frames=16 * 2 + 1, num_inference_steps=4)
    assert sum(found.split) == 5 and found.seconds > 0 and found.work.tokens == 32 * 48
    assert not [other.note for other in found.alternatives if "trained" in other.note]
    assert plan("toys/Toy_Large-Diffusers", "2xh100", num_frames=33).work.model is toy_family.KNOWN_SIZES["toy-large"]
    with pytest.raises(ValueError, match=r"num_frames=82 cannot be decoded exactly: the VAE makes 2k \+ 1 frames"):
        plan(str(toy), "1xh100", num_frames=82)
    spec = ModelFiles(toy).spec
    work = Workload(model_sizes(str(toy)), found.work.video)
    sizes = {name: torch.Size(shape).numel() * 2 for name, shape in spec.shapes(0).items()}
    for stage, layers in enumerate((range(0, 2), range(2, 5))):
        assert slice_bytes(work, [2, 3], stage) == sum(sizes[name] for name in spec.names(0, layers))


@pytest.mark.usefixtures("handlers")
def test_the_command_line_needs_no_more(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(toy), "--num-frames", "15", "--steps", "4"]
    blocks = ["--frames-per-block", "3", "--context-frames", "1"]
    planned = CliRunner().invoke(app, ["plan", *flags, *blocks, "--size", "96x64", "--gpus", "2xh100"])
    assert planned.exit_code == 0 and "toy, 15 frames of 96x64" in " ".join(planned.output.split())
    generate = ["generate", *flags, *blocks, "--device", "cpu", "--threads", "1", "--prompt", "a cat"]
    generate += [
        "--height",
        "32",
        "--width",
        "48",
        "--plan",
        "auto",
        "--latents-out",
        "l.safetensors",
        "--out",
        "v.mp4",
    ]
    made = CliRunner().invoke(app, generate)
    assert made.exit_code == 0, made.output
    assert (tmp_path / "v.mp4").stat().st_size > 0 and "15 frames" in made.output
    expected = _engine(toy)("a cat", output_type="latent", **{**CALL, "height": 32, "width": 48}).frames
    assert torch.equal(read_latents(tmp_path / "l.safetensors"), expected)


def test_a_family_refuses_what_it_does_not_run(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="only rgb is supported"):
        _engine(toy_family.write(tmp_path / "grey", colours="grey"))
    with pytest.raises(ModelError, match="component 'transformer_2' is none of a ToyPipeline"):
        ModelFiles(toy_family.write(tmp_path / "two", transformer_2=["toys", "ToyTransformer"]))
    empty = toy_family.write(tmp_path / "empty")
    (empty / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="not a config of a toy transformer"):
        _ = ModelFiles(empty).spec
    with pytest.raises(ModelError, match="a loaded WanPipeline, WanImageToVideoPipeline, ToyPipeline"):
        LoadedPipeline({})


def test_a_class_that_no_row_names_is_refused(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "toy")
    for read in (ModelFiles, lambda path: model_sizes(str(path))):
        with pytest.raises(ModelError, match="pipeline class 'ToyPipeline' is not supported; supported: WanPipeline"):
            read(toy)


@pytest.mark.parametrize("key", ["wan"])
def test_a_row_finds_all_that_it_names(key: str) -> None:
    family = FAMILIES[key]
    assert all(family_of(name) is family for name in family.pipelines)
    parts = [path for component in family.components.values() for path in (component.empty, component.load) if path]
    for path in (*parts, family.spec_class, family.decoder_class, family.prompt_encoder_class, family.read_sizes):
        assert callable(registry.resolve(path))
    assert all(name == sizes.name == name.lower() for name, sizes in family.named_sizes().items())


def test_only_the_registry_names_a_family() -> None:
    package = Path(dualparal.__file__).parent
    naming = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"models\.wan\b|models import wan\b|from \.+wan\b", path.read_text(encoding="utf-8"))
    }
    assert {path for path in naming if not path.startswith("models/wan/")} == {"models/registry.py"}
