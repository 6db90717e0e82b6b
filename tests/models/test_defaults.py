"""What a model's videos are where nothing was asked for: its generation_config.json, the same for every caller."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from diffusers import WanPipeline
from huggingface_hub.errors import LocalEntryNotFoundError

import dualparal
from dualparal.cli import serve
from dualparal.cli.main import main
from dualparal.config.blocks import BlockConfig
from dualparal.config.video import OF_MODEL, VideoConfig
from dualparal.models.defaults import Defaults, model_defaults
from dualparal.models.json_files import ModelError
from dualparal.models.loaded import LoadedPipeline
from dualparal.models.registry import BUILT_IN, BUILT_IN_FOLDER
from dualparal.planning.planner import plan

OWN = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 1.0}
OWN_BLOCKS = {"max_blocks_in_flight": 1, "context_version": "newest"}


@pytest.fixture
def model(wan21: Path, tmp_path: Path) -> Path:
    """A tiny model that brings its own."""
    folder = shutil.copytree(wan21, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(OWN | OWN_BLOCKS | {"top_k": 50, "context_frames": 1}))
    return folder


def own(video: VideoConfig) -> dict[str, Any]:
    return {name: getattr(video, name) for name in OF_MODEL}


def test_a_folder_brings_them_and_what_it_leaves_out_is_as_in_diffusers(model: Path, wan21: Path) -> None:
    found = model_defaults(model)
    assert found == model_defaults(str(model)) == Defaults(VideoConfig(**OWN), BlockConfig(**OWN_BLOCKS))
    assert model_defaults(wan21) == model_defaults("wan2.1-t2v-1.3b") == Defaults()
    (model / "generation_config.json").write_text('{"guidance_scale": 1}')
    assert model_defaults(model) == Defaults(VideoConfig(guidance_scale=1))
    shipped = model_defaults(BUILT_IN)
    assert (shipped.video.height, shipped.video.width) == (64, 64) and shipped == model_defaults(BUILT_IN_FOLDER)
    assert shipped.blocks == BlockConfig(max_blocks_in_flight=5, context_version="newest")


def test_what_was_asked_for_counts_more(model: Path) -> None:
    mine, blocks = model_defaults(model).video, model_defaults(model).blocks
    assert own(VideoConfig.of(mine)) == own(VideoConfig.of(mine, **dict.fromkeys(OF_MODEL))) == OWN
    assert own(VideoConfig.of(mine, width=64, guidance_scale=7)) == {**OWN, "width": 64, "guidance_scale": 7.0}
    assert VideoConfig.of(mine, timesteps=[900, 600, 300]).num_inference_steps == 3
    assert BlockConfig.of(blocks, context_frames=2) == BlockConfig(context_frames=2, **OWN_BLOCKS)
    assert BlockConfig.of(blocks, max_blocks_in_flight=None) == BlockConfig(context_version="newest")
    assert BlockConfig.of(blocks, context_version="matching") == BlockConfig(max_blocks_in_flight=1)
    assert BlockConfig.of(blocks, context="paper") == BlockConfig(context="paper", max_blocks_in_flight=1)
    assert BlockConfig.of() == BlockConfig()


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"guidance_scale": "1"}', "guidance_scale='1' is not a number"),
        ('{"guidance_scale": null}', "guidance_scale=None is not a number"),
        ('{"height": 64.0}', "height=64.0: the height of a frame"),
        ('{"num_inference_steps": 0}', "num_inference_steps=0: denoising steps"),
        ('{"max_blocks_in_flight": 0}', "max_blocks_in_flight=0: a block must be able to enter"),
        ('{"context_version": "oldest"}', "context_version='oldest' is not a version of features"),
        ("[1]", "holds list, not an object"),
        ('{"height": 64', "cannot be read as JSON"),
    ],
)
def test_what_cannot_be_is_refused_with_its_file(model: Path, text: str, words: str) -> None:
    (model / "generation_config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        model_defaults(model)
    assert words in str(caught.value) and str(model / "generation_config.json") in str(caught.value)


def test_of_a_hub_id_the_one_file_is_downloaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        if repo == "nobody/none":
            raise LocalEntryNotFoundError("no network")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert own(model_defaults("someone/else").video) == OWN
    for name in ("nobody/none", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "./someone", "a" * 5000, "a/b/c"):
        assert model_defaults(name) == Defaults()
    assert asked == [(repo, ["generation_config.json"]) for repo in ("someone/else", "nobody/none")]


def test_every_caller_takes_them(engine: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, blocks = engine(model), BlockConfig(**OWN_BLOCKS)
    assert own(built.source.defaults) == OWN and built.config.blocks == blocks
    monkeypatch.chdir(model)  # not the folder of pipelines that come from none
    stock = WanPipeline.from_pretrained(model)
    assert engine(stock).config.blocks == blocks
    other = LoadedPipeline(WanPipeline(**stock.components))
    assert other.defaults == VideoConfig() and engine(other.pipeline).config.blocks == BlockConfig()
    frames = built("a cat", num_frames=49).frames
    assert np.array_equal(frames, engine(model, **OWN_BLOCKS)("a cat", num_frames=49, **OWN).frames)
    assert frames.shape == (1, 49, 32, 48, 3)
    assert not np.array_equal(frames, engine(model, max_blocks_in_flight=None)("a cat", num_frames=49).frames)
    found: list[Any] = []
    monkeypatch.setattr("dualparal.workers.engine.WorkerEngine", lambda _, config, gpus: found.append(config))
    dualparal.Engine.from_pretrained(model, gpus=2)
    work = plan(str(model), "1x24GB", num_frames=5, context_frames=1).work
    assert own(work.video) == OWN and work.blocks == replace(blocks, context_frames=1)
    monkeypatch.setattr("dualparal.cli.generate._run_job", lambda job, *_: found.append(job) or 0)
    for flags in ([], ["--checkpoint", "kept"], ["--plan", "auto"]):
        monkeypatch.setattr(sys, "argv", ["dualparal", "generate", "--model", str(model), "--prompt", "a cat", *flags])
        with pytest.raises(SystemExit):
            main()
    monkeypatch.setattr(serve, "_serve", found.append)
    serve.serve(None, serve.ServeFlags(str(model)), serve.ServeLimits(), serve.BlockFlags(), serve.ReuseFlags())  # type: ignore[arg-type]
    settings = found[-1]
    assert (settings.height, settings.width, settings.steps, settings.guidance_scale) == tuple(OWN.values())
    workers, *jobs, _ = found
    assert all(own(job.video) == OWN for job in jobs)
    plain, kept, planned = (job.engine.blocks for job in jobs)
    assert workers.blocks == plain == planned == blocks
    assert kept == settings.engine.blocks == replace(blocks, refresh_every=1)
