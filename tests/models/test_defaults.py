"""What a model's videos are where nothing was asked for: its generation_config.json, the same for every caller."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from diffusers import WanPipeline
from huggingface_hub.errors import LocalEntryNotFoundError

from dualparal.cli import generate, serve
from dualparal.cli.flags import VideoFlags
from dualparal.config.video import OF_MODEL, VideoConfig
from dualparal.models.defaults import video_defaults
from dualparal.models.json_files import ModelError
from dualparal.models.loaded import LoadedPipeline
from dualparal.models.registry import BUILT_IN, BUILT_IN_FOLDER
from dualparal.planning.planner import plan

OWN = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture
def model(wan21: Path, tmp_path: Path) -> Path:
    """A tiny model that brings its own."""
    folder = shutil.copytree(wan21, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(OWN | {"top_k": 50}))
    return folder


def own(video: VideoConfig) -> dict[str, Any]:
    return {name: getattr(video, name) for name in OF_MODEL}


def test_a_folder_brings_them_and_what_it_leaves_out_is_as_in_diffusers(model: Path, wan21: Path) -> None:
    assert own(video_defaults(model)) == own(video_defaults(str(model))) == OWN
    assert video_defaults(wan21) == video_defaults("wan2.1-t2v-1.3b") == VideoConfig()
    (model / "generation_config.json").write_text('{"guidance_scale": 1}')
    assert video_defaults(model) == VideoConfig(guidance_scale=1)
    size = video_defaults(BUILT_IN)
    assert (size.height, size.width) == (64, 64) and size == video_defaults(BUILT_IN_FOLDER)


def test_what_was_asked_for_counts_more(model: Path) -> None:
    mine = video_defaults(model)
    assert own(VideoConfig.of(mine)) == own(VideoConfig.of(mine, **dict.fromkeys(OF_MODEL))) == OWN
    assert own(VideoConfig.of(mine, width=64, guidance_scale=7)) == {**OWN, "width": 64, "guidance_scale": 7.0}
    assert VideoConfig.of(mine, timesteps=[900, 600, 300]).num_inference_steps == 3


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"guidance_scale": "1"}', "guidance_scale='1' is not a number"),
        ('{"guidance_scale": null}', "guidance_scale=None is not a number"),
        ('{"height": 64.0}', "height=64.0: the height of a frame"),
        ('{"num_inference_steps": 0}', "num_inference_steps=0: denoising steps"),
        ("[1]", "holds list, not an object"),
        ('{"height": 64', "cannot be read as JSON"),
    ],
)
def test_what_no_video_can_have_is_refused_with_its_file(model: Path, text: str, words: str) -> None:
    (model / "generation_config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        video_defaults(model)
    assert words in str(caught.value) and str(model / "generation_config.json") in str(caught.value)


def test_of_a_hub_id_the_one_file_is_downloaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        if repo == "nobody/none":
            raise LocalEntryNotFoundError("no network")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert own(video_defaults("someone/else")) == OWN
    for name in ("nobody/none", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "./someone", "a" * 5000, "a/b/c"):
        assert video_defaults(name) == VideoConfig()
    assert asked == [(repo, ["generation_config.json"]) for repo in ("someone/else", "nobody/none")]


def test_every_caller_takes_them(engine: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = engine(model)
    assert own(built.source.defaults) == OWN
    monkeypatch.chdir(model)  # not the folder of pipelines that come from none
    assert LoadedPipeline(WanPipeline(**WanPipeline.from_pretrained(model).components)).defaults == VideoConfig()
    frames = built("a cat", num_frames=1).frames
    assert np.array_equal(frames, built("a cat", num_frames=1, **OWN).frames) and frames.shape == (1, 1, 32, 48, 3)
    assert own(generate._video(VideoFlags(), str(model), "np", None)) == OWN
    assert own(plan(str(model), "1x24GB", num_frames=5, context_frames=1, frames_per_block=2).work.video) == OWN
    found: list[Any] = []
    monkeypatch.setattr(serve, "_serve", found.append)
    serve.serve(None, serve.ServeFlags(str(model)), serve.ServeLimits(), serve.BlockFlags(), serve.ReuseFlags())  # type: ignore[arg-type]
    (settings,) = found
    assert (settings.height, settings.width, settings.steps, settings.guidance_scale) == tuple(OWN.values())
