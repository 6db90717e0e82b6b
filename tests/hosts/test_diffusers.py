"""Long video inside diffusers: its call's arguments, its modular blocks, and a pipeline that was switched over."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from diffusers.modular_pipelines import WanBlocks

import dualparal
from dualparal.models.registry import BUILT_IN
from engine_calls import embeds

Build = Callable[..., Any]
SIZE = {"height": 32, "width": 32, "num_inference_steps": 3}
BLOCKS = {"frames_per_block": 2, "context_frames": 1}
LONG = {**SIZE, "num_frames": 25}  # four blocks of BLOCKS


class WantsTexts(PipelineCallback):
    tensor_inputs = ["prompt_embeds"]  # noqa: RUF012

    def callback_fn(self, *args: Any) -> Any: ...


def stock(path: Path) -> Any:
    pipe = diffusers.WanPipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_every_argument_of_the_pipeline_is_one_of_the_engine(engine: Build) -> None:
    theirs = list(inspect.signature(diffusers.WanPipeline.__call__).parameters)
    ours = list(inspect.signature(dualparal.Engine.stream).parameters)
    theirs.remove("return_dict")  # of a call of the engine
    assert ours[: len(theirs)] == theirs
    with pytest.raises(TypeError, match="'num_frame'"):
        engine().stream("a cat", num_frame=5)


@pytest.mark.parametrize(
    "call, words",
    [
        ({"attention_kwargs": {"scale": 0.5}}, "attention_kwargs with scale: attention here is the engine's own"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end_tensor_inputs="),
        ({"callback_on_step_end": WantsTexts()}, "callback_on_step_end_tensor_inputs="),
        ({"callback_on_step_end": 5}, "callback_on_step_end is an int: use a function"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0: videos of each prompt"),
        ({"guidance_scale": "five"}, "guidance_scale='five' is not a number"),
        ({"negative_prompt": 5}, "negative_prompt is an int: use a text"),
        ({"negative_prompt": ["a", 5]}, "negative_prompt for 2 videos, and prompts for 1"),
        ({"prompt": 5}, "prompt is an int: use a text"),
        ({"generator": 5}, "generator is an int: use a torch.Generator"),
        ({"latents": [1]}, "latents is a list: use a torch tensor"),
        ({"seed": 1.5}, "seed=1.5: a seed is a non-negative"),
        ({"seed": True}, "seed=True: a seed is a non-negative"),
        ({"height": np.float32(32)}, "height="),
    ],
)
def test_wrong_arguments_are_named(engine: Build, call: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        engine().stream(**{"prompt": "a cat", **SIZE, "num_frames": 5, **call})
    assert str(caught.value).startswith(words)


def test_numbers_of_numpy_and_videos_per_prompt(engine: Build) -> None:
    built = engine()
    call = {**{name: np.int64(value) for name, value in SIZE.items()}, "num_frames": np.int32(5)}
    seen: list[set[str]] = []
    two = built(
        **{**embeds(built), **call},
        seed=np.int64(7),
        num_videos_per_prompt=np.int64(2),
        guidance_scale=np.float32(5),
        attention_kwargs={},
        output_type="latent",
        callback_on_step_end=lambda _, step, time, values: seen.append(set(values)),
        callback_on_step_end_tensor_inputs=[],
    ).frames
    assert seen and all(names == {"block", "video"} for names in seen)
    for video, seed in enumerate((7, 8)):
        alone = built(**embeds(built), **SIZE, num_frames=5, seed=seed, output_type="latent").frames
        assert torch.equal(two[video : video + 1], alone)
    with pytest.raises(ValueError, match="latents for 3 videos, and prompts for 2"):
        built.stream(**embeds(built), **call, num_videos_per_prompt=2, latents=torch.zeros(3, 16, 2, 4, 4))


def test_size_is_the_models_where_none_is_asked_for() -> None:
    built = dualparal.Engine.from_pretrained(BUILT_IN, device="cpu")
    (chunk,) = built.stream(**embeds(built), num_frames=1, num_inference_steps=1, output_type="uint8")
    assert chunk.frames.shape == (1, 64, 64, 3)
    assert stock_size() == (480, 832)


def stock_size() -> tuple[int, int]:
    parameters = inspect.signature(diffusers.WanPipeline.__call__).parameters
    return parameters["height"].default, parameters["width"].default


def test_blocks_in_the_place_of_the_stock_ones(engine: Build, wan21: Path) -> None:
    pipe = stock(wan21)
    parts = {"vae": pipe.vae, "transformer": pipe.transformer, "scheduler": pipe.scheduler}
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    built = engine(pipe, **BLOCKS)  # the same memory: another alignment can be another last bit
    texts = embeds(built)

    def run(denoise: Any = None, decode: Any = None, **call: Any) -> tuple[torch.Tensor, Any]:
        blocks = WanBlocks()
        del blocks.sub_blocks["text_encoder"]  # embeddings are given
        if denoise is not None:
            blocks.sub_blocks["denoise"], blocks.sub_blocks["decode"] = denoise, decode
        made = blocks.init_pipeline()
        made.update_components(**parts, guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0))
        state = made(**{**texts, **SIZE, **call})
        return state.get("latents"), state.get("videos")

    short = {"num_frames": 9, "latents": noise}  # one block
    theirs, ours = run(**short), run(dualparal.DualParalDenoise(), dualparal.DualParalDecode(), **short)
    assert (theirs[0] - ours[0]).abs().max() < 5e-5
    assert ours[1].shape == theirs[1].shape == (1, 9, 32, 32, 3)
    assert np.abs(theirs[1] - ours[1]).max() < 2e-4

    wanted = built(**texts, **LONG, generator=torch.Generator().manual_seed(3))
    latents, frames = run(
        dualparal.DualParalDenoise(**BLOCKS),
        dualparal.DualParalDecode(),
        num_frames=25,
        generator=torch.Generator().manual_seed(3),
    )
    assert np.array_equal(frames, wanted.frames)
    again = built(**texts, **LONG, generator=torch.Generator().manual_seed(3), output_type="latent").frames
    assert torch.equal(latents, again)
    parts["guider"] = diffusers.ClassifierFreeGuidance(guidance_scale=5.0, stop=0.5)
    block = dualparal.DualParalDenoise(**BLOCKS)
    with pytest.raises(ValueError, match=r"guider.stop=0.5: the engine has 1.0 alone"):
        block(type("Components", (), {**parts, "transformer_2": None})(), _state(block, texts))


def _state(block: Any, texts: dict[str, torch.Tensor]) -> Any:
    from diffusers.modular_pipelines import PipelineState

    state = PipelineState()
    for name, value in {**texts, **LONG}.items():
        state.set(name, value)
    return state


@pytest.mark.parametrize("gpus", [None, 2])
def test_a_pipeline_that_makes_long_video_until_it_is_switched_back(
    engine: Build, wan21: Path, gpus: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipe = stock(wan21)
    built = engine(wan21 if gpus else pipe, **BLOCKS)
    texts = embeds(built)
    wanted = built(**texts, **LONG, seed=4).frames
    seen: list[Any] = []

    def note(pipeline: Any, step: int, time: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(pipeline)
        return {}

    with dualparal.enable(pipe, gpus=gpus, **BLOCKS) as handle:
        assert type(pipe).__name__ == "WanPipeline" and isinstance(pipe, diffusers.WanPipeline)
        with pytest.raises(ValueError, match="switched over already"):
            dualparal.enable(pipe)
        found = pipe(None, None, 32, 32, 25, 3, **texts, seed=4, callback_on_step_end=note)
        assert isinstance(found, diffusers.pipelines.wan.pipeline_output.WanPipelineOutput)
        assert np.array_equal(found.frames, wanted)
        assert seen and all(each is pipe for each in seen)
        assert handle.engine.stats.ranks and len(handle.engine.stats.ranks) == (gpus or 1)
        (frames,) = pipe(**texts, **SIZE, num_frames=5, return_dict=False)
        assert frames.shape == (1, 5, 32, 32, 3)
    assert type(pipe) is diffusers.WanPipeline and not list(tmp_path.iterdir())
    assert pipe(**texts, **SIZE, num_frames=5).frames.shape == (1, 5, 32, 32, 3)
    dualparal.disable(pipe)  # again: nothing


def test_a_pipeline_keeps_what_its_folder_brings(wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = shutil.copytree(wan21, tmp_path / "model")
    own = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 1.0}
    (model / "generation_config.json").write_text(json.dumps(own))
    texts = {"prompt_embeds": torch.zeros(1, 6, 32)}  # without guidance one is enough
    found = []
    for gpus in (None, 2):
        pipe = stock(model)
        with dualparal.enable(pipe, gpus=gpus, **BLOCKS):
            found.append(pipe(**texts, num_frames=5, seed=4).frames)
    built = dualparal.Engine.from_pretrained(wan21, device="cpu", **BLOCKS)
    wanted = built(**texts, **own, num_frames=5, seed=4).frames
    assert all(np.array_equal(frames, wanted) for frames in found)


def test_an_interrupt_of_the_pipeline_ends_the_video(engine: Build, wan21: Path) -> None:
    pipe = stock(wan21)

    def stop(pipeline: Any, step: int, time: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = values["block"] == 3
        return {}

    handle = dualparal.enable(pipe, **BLOCKS)
    found = pipe(**embeds(handle.engine), **LONG, callback_on_step_end=stop).frames
    assert 0 < found.shape[1] < 25
    with pytest.raises(ValueError, match="without gpus"):
        dualparal.enable(stock(wan21), model=wan21)
    dualparal.disable(pipe)
    assert type(pipe) is diffusers.WanPipeline
