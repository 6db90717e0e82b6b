"""Image-to-video models: one block is diffusers' pipeline, several are the plain loop on any number of stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline
from engine_calls import embeds, reference_latents

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 25, 35, 3), dtype=np.uint8)
FIRST = {"image": IMAGES[0]}
ENDS = {"image": IMAGES[0], "last_image": IMAGES[1]}
KINDS: dict[str, dict[str, Any]] = {  # of ``build_tiny_pipeline``
    "wan2.2-i2v": {"images": "condition", "wan22": True},
    "wan2.1-i2v": {"images": "first"},
    "wan2.1-flf2v": {"images": "both"},
}
CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 2, "guidance_scale": 3.0}
Build = Callable[..., Engine]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    made: dict[str, Path] = {}

    def build(kind: str, **options: Any) -> Engine:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "model"
            made[kind] = build_tiny_pipeline(folder, layers=4, flow_shift=6.0, **KINDS[kind])
        return Engine.from_pretrained(made[kind], device="cpu", **options)

    return build


@pytest.mark.parametrize(("kind", "images"), [("wan2.2-i2v", FIRST), ("wan2.2-i2v", ENDS), ("wan2.1-i2v", FIRST),
                                              ("wan2.1-flf2v", ENDS)])  # fmt: skip
def test_one_block_is_what_diffusers_makes(build: Build, kind: str, images: dict[str, Any]) -> None:
    engine = build(kind, frames_per_block=4)
    pipe = diffusers.WanImageToVideoPipeline.from_pretrained(engine.source.path)
    pipe.set_progress_bar_config(disable=True)
    pictures = {name: diffusers.image_processor.VaeImageProcessor.numpy_to_pil(image / 255)[0]
                for name, image in images.items()}  # fmt: skip
    latents = torch.randn(1, 16, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    asked = {"prompt": "a cat", "negative_prompt": "bad", **CALL}
    finished: list[torch.Tensor] = []

    def keep(*given: Any) -> dict[str, Any]:
        finished.append(given[-1]["latents"])
        return {}

    theirs = pipe(**asked, **pictures, latents=latents.clone(), callback_on_step_end=keep).frames
    wanted = finished[-1]
    ours = engine(**asked, **images, latents=latents.clone(), callback_on_step_end=keep).frames
    assert (finished[-1] - wanted).abs().max() < 5e-5
    assert np.abs(ours - theirs).max() < 2e-4


@pytest.mark.parametrize(
    ("kind", "images", "context", "numbers"),
    [
        ("wan2.2-i2v", ENDS, "cached", range(1, 5)),
        ("wan2.2-i2v", FIRST, "paper", [2]),
        ("wan2.1-flf2v", ENDS, "prior", [3]),
    ],
)
def test_any_number_of_stages_makes_the_same_bits_and_a_resume_goes_on_with_them(
    build: Build, tmp_path: Path, kind: str, images: dict[str, Any], context: str, numbers: Sequence[int]
) -> None:
    blocks = {"frames_per_block": 2, "context_frames": 1, "context": context}
    blocks |= {} if context == "paper" else {"refresh_every": 2}
    engine = build(kind, **blocks)
    inputs = {**embeds(engine, tokens=512), **images}
    call = {**CALL, "num_frames": 37 if context == "paper" else 33}  # five blocks, the last with a surplus frame
    wanted = reference_latents(engine, inputs, **call)
    call["output_type"] = "latent"
    for stages in numbers:
        assert torch.equal(build(kind, stages=stages, **blocks)(**inputs, **call).frames, wanted), stages
    stream = build(kind, stages=2, **blocks).stream(**inputs, **call, checkpoint=Checkpoint(tmp_path / "kept", 1))
    done = [next(stream).latents for _ in range(3)]
    stream.close()
    rest = [chunk.latents for chunk in engine.resume(tmp_path / "kept")]
    assert 2 <= len(rest) <= 4
    assert torch.equal(torch.cat([*done[: 5 - len(rest)], *rest], dim=2), wanted)


def test_images_that_a_model_does_not_take_are_refused_before_weights_are_read(build: Build, wan21: Path) -> None:
    ask = {**CALL, "prompt": "a cat"}
    none, one, both = Engine.from_pretrained(wan21, device="cpu"), build("wan2.1-i2v"), build("wan2.1-flf2v")
    cases: list[tuple[Engine, dict[str, Any], str]] = [
        (none, FIRST, "makes videos of a text alone; leave it out"),
        (one, {}, "makes videos of images: give image, the video's first frame"),
        (one, ENDS, "takes the first image only"),
        (one, {**FIRST, "max_sequence_length": 64}, "a text of 64 tokens: this model reads images before texts of 512"),
        (both, FIRST, "give image and last_image"),
        (both, {"last_image": IMAGES[1]}, "last_image without image"),
        (both, {**ENDS, "num_frames": 1}, "last_image with num_frames=1"),
        (both, {**ENDS, "image": wan21 / "none.png"}, "there is no such file"),
    ]
    for engine, given, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            engine.stream(**{**ask, **given})
        assert "\n" not in str(error.value) and not engine.parts.slices


def test_a_loaded_pipeline_and_prompts_with_an_image_each(build: Build) -> None:
    options = {"frames_per_block": 2, "context_frames": 1}
    files = build("wan2.1-i2v", stages=2, **options)
    pipe = diffusers.WanImageToVideoPipeline.from_pretrained(files.source.path)
    asked = {**CALL, "output_type": "latent"}
    both = Engine.from_pretrained(pipe, device="cpu", **options)(
        ["a cat", "a dog"], image=list(IMAGES), seed=3, **asked
    )
    for number, prompt in enumerate(["a cat", "a dog"]):
        alone = files(prompt, image=IMAGES[number], seed=3 + number, **asked).frames
        assert torch.equal(both.frames[number : number + 1], alone)
