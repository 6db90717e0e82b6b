"""A request for one video, checked against the model before any weight is read, and several of them from one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from dualparal.config.decoding import row_ranges
from dualparal.config.images import check_images
from dualparal.config.reuse import StepPlan
from dualparal.config.video import VideoConfig
from dualparal.engine.inputs import Prompt, VideoInputs, a_
from dualparal.engine.setup import Setup
from dualparal.io.clips import probe_clip
from dualparal.io.images import read_image
from dualparal.models.base import Grid
from dualparal.sampling.images import ImageCondition
from dualparal.sampling.sampler import Sampler
from dualparal.schedule.layout import Layout
from dualparal.schedule.schedule import Schedule

UserCallback = Callable[[int, torch.Tensor, dict[str, Any]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Request:
    """Everything about a video but the text's embeddings, which need the text encoder.

    Attributes:
        video: size, length, steps, guidance and seed.
        layout: the places of its blocks.
        grid: the latent patches of a frame.
        sampler: the denoising steps.
        steps: those at which the model runs.
        prompts: first block -> text; empty when embeddings were given.
        negative_prompt: a text; None: an empty one.
        embeds: [1 or 2 (guidance), tokens, text_dim] when they were given instead of a text.
        latents: initial noise [1, C, L, h, w], when it was given.
        images: the first, or the first and the last frame, as PIL has them; of a resumed run none.
        clip: what it goes on from: the path of a file, or latents [1, C, L, h, w] on the CPU, block 0's and some before
            them; None: it begins, or (of a resumed run) another rank knows it.
        inverted_frames: latent frames of the clip's end whose noise the new blocks' is made of; 0: there is no clip.
        pool: that noise [1, C, f, h, w], of a resumed run.
        condition: what the model is told of its images, on the leading rank of a resumed run.
        fixed_frames: latent frames of the video's beginning that an image gives, 1 or 0: they stay.
        callback: the caller's, after every step: (step, timestep, {"latents", "block", "video"}); a returned dict's
            "latents" replace them.
    """

    video: VideoConfig
    layout: Layout
    grid: Grid
    sampler: Sampler
    steps: StepPlan
    prompts: dict[int, str]
    negative_prompt: str | None
    embeds: torch.Tensor | None
    latents: torch.Tensor | None
    images: tuple[Any, ...] = ()
    clip: Path | torch.Tensor | None = None
    inverted_frames: int = 0
    pool: torch.Tensor | None = None
    condition: ImageCondition | None = None
    fixed_frames: int = 0
    callback: UserCallback | None = None


def check_request(
    setup: Setup,
    scheduler: Any,
    video: VideoConfig,
    inputs: VideoInputs,
    callback: UserCallback | None = None,
    encoded: bool = False,
) -> Request:
    """The request for one video.

    Args:
        setup: the engine's.
        scheduler: diffusers' sampler object; it is copied, not used.
        video: its ``seed`` is replaced by that of ``inputs``.
        inputs: prompt, noise and seed of this video.
        callback: called after every step, see ``Request``.
        encoded: what the model is told of its images is known already, and none are given.

    Raises:
        ValueError: it cannot be run; the message names the value, the rule and the way out.
    """
    video = replace(video, seed=inputs.seed)
    spec = setup.source.spec
    spatial, temporal = spec.spatial_factor, spec.temporal_factor
    video.check_size(spatial * spec.patch_size[1], spatial * spec.patch_size[2])
    if video.guidance_scale_2 is not None and spec.num_experts == 1:
        raise ValueError(
            f"guidance_scale_2={video.guidance_scale_2}: this model has a single transformer; "
            "only models with two (Wan2.2) take a second scale"
        )
    if (inputs.prompt is None) == (inputs.prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds, and not both")
    given = {"image": inputs.image, "last_image": inputs.last_image}
    if not encoded:
        first, last = (image is not None for image in given.values())
        check_images(spec.image_counts, first, last, video.num_frames)
    if video.continues:
        for name, value in {"latents": inputs.latents, **given}.items():
            if value is not None and not encoded:
                raise ValueError(f"{name} and video were both given: a video that goes on from a clip has no {name}")
    fixed_frames = int(spec.keeps_first_frame and inputs.image is not None)
    if (anchor := setup.config.blocks.anchor_frames) and (spec.unequal_times or fixed_frames):
        raise ValueError(f"anchor_frames={anchor}: this model is told a timestep for each frame; leave it out")
    layout = Layout.of(setup.config.blocks, video, temporal)
    grid = spec.grid(video.height, video.width)
    config = setup.config
    layout.check_places(grid.tokens, config.sequence_parallel)
    if video.output_type != "latent" and (config.decode_ranks or config.decode_in_place):
        row_ranges(grid.height, config.decode_ranks or setup.num_stages)
    sampler = Sampler(
        scheduler, video.num_inference_steps, timesteps=video.timesteps, sigmas=video.sigmas, seed=video.seed
    )
    embeds = _embeds(inputs.prompt_embeds, inputs.negative_prompt_embeds, video.guidance, spec.text_dim)
    tokens = video.max_sequence_length if embeds is None else embeds.shape[1]
    if spec.text_tokens not in (None, tokens):
        raise ValueError(
            f"a text of {tokens} tokens: this model reads images before texts of {spec.text_tokens}; pad it, or leave "
            "max_sequence_length out"
        )
    clip, length = _clip(inputs.clip, video, layout, [spec.in_channels, grid.height, grid.width], temporal)
    return Request(
        video=video,
        layout=layout,
        grid=grid,
        sampler=sampler,
        steps=config.reuse.plan(sampler.levels, video.guidance),
        prompts={} if inputs.prompt is None else _prompts(inputs.prompt, layout, temporal, video.continues),
        negative_prompt=inputs.negative_prompt,
        embeds=embeds,
        latents=None if inputs.latents is None else _latents(inputs.latents, layout, grid, spec.in_channels),
        images=tuple(read_image(image, name) for name, image in given.items() if image is not None),
        fixed_frames=fixed_frames,
        clip=clip,
        inverted_frames=min(length, layout.pool_frames),
        callback=callback,
    )


def check_alike(requests: Sequence[Request]) -> None:
    """Checks that videos which are made together begin alike. Raises ValueError."""
    if len({request.fixed_frames for request in requests}) > 1:
        raise ValueError("image was given for some of the videos only: give one for each, or make them in two calls")


def schedule_of(setup: Setup, requests: Sequence[Request], start: int = 0) -> Schedule:
    """The order of work for videos that are made together, from iteration ``start`` on. Raises ValueError."""
    request = requests[0]
    return Schedule.of(
        setup.config,
        request.video,
        num_stages=setup.num_stages,
        steps=request.steps,
        num_blocks=request.layout.num_blocks,
        num_videos=len(requests),
        start=start,
    )


def _prompts(prompt: Prompt, layout: Layout, temporal_factor: int, continues: bool) -> dict[int, str]:
    """The texts by the first block that takes each, from texts by pixel frame. Raises ValueError.

    Args:
        prompt: a text, or texts by frame.
        layout: of the video.
        temporal_factor: frames of a latent frame.
        continues: frames are counted from those after a clip, and block 0 is the clip's end: the first text is its too.
    """
    if isinstance(prompt, str):
        return {0: prompt}
    if not isinstance(prompt, Mapping) or not all(isinstance(text, str) for text in prompt.values()):
        raise ValueError(
            f"prompt is {a_(prompt)}: use a text, {{first frame: text}}, or a list of these for several videos"
        )
    if 0 not in prompt:
        raise ValueError("prompt has no text for frame 0")
    found: dict[int, str] = {}
    for frame in sorted(prompt):
        if not isinstance(frame, Integral) or frame < 0:
            raise ValueError(f"prompt for frame {frame!r}: frames are counted from 0")
        latent = -(-frame // temporal_factor) + layout.first_frames * continues
        block = 0 if continues and not frame else layout.block_of(latent)
        if block in found or (continues and block == 1):
            raise ValueError(
                f"prompt for frame {frame} and an earlier one lie in the same block {block}: a block has "
                f"one prompt; put them {temporal_factor * layout.blocks.frames_per_block} frames apart"
            )
        found[block] = prompt[frame]
    return found


def _embeds(
    positive: torch.Tensor | None, negative: torch.Tensor | None, guidance: bool, text_dim: int
) -> torch.Tensor | None:
    """The given embeddings as [1 or 2 (guidance), tokens, text_dim] on the CPU; None: none were given.

    Raises ValueError.
    """
    if positive is None:
        if negative is not None:
            raise ValueError("negative_prompt_embeds were given without prompt_embeds")
        return None
    rows = {"prompt_embeds": positive}
    if guidance:
        if negative is None:
            raise ValueError("prompt_embeds with guidance need negative_prompt_embeds too; or use guidance_scale=1")
        rows["negative_prompt_embeds"] = negative
    for name, row in rows.items():
        if row.ndim != 3 or row.shape[0] != 1 or row.shape[2] != text_dim:
            raise ValueError(f"{name} has shape {list(row.shape)}; this model takes [1, tokens, {text_dim}]")
    if len({row.shape[1] for row in rows.values()}) != 1:
        lengths = " and ".join(str(row.shape[1]) for row in rows.values())
        raise ValueError(f"prompt_embeds and negative_prompt_embeds have {lengths} tokens; pad them to one length")
    return torch.cat(list(rows.values())).cpu()


def _latents(latents: torch.Tensor, layout: Layout, grid: Grid, channels: int) -> torch.Tensor:
    """Checks initial noise [1, C, L, h, w], with or without the surplus of the last block. Raises ValueError."""
    if layout.num_latents is None:
        raise ValueError("latents were given for an endless video; give num_frames too")
    lengths = sorted({layout.num_latents, layout.padded_latents or 0})
    shapes = [[1, channels, length, grid.height, grid.width] for length in lengths]
    if list(latents.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"latents have shape {list(latents.shape)}; this request takes {wanted}")
    if not torch.isfinite(latents).all():
        raise ValueError("latents hold NaN or infinity; initial noise is finite")
    return latents


def _clip(
    clip: Any, video: VideoConfig, layout: Layout, shape: list[int], factor: int
) -> tuple[Path | torch.Tensor | None, int]:
    """Checks a clip, and returns its path or its latents, float32 on the CPU, and their number; None, 0: there is none.

    Args:
        clip: a path of an mp4 file, or latents [1, C, L, h, w].
        video, layout: of the request.
        shape: C, h and w of its latents.
        factor: frames of a latent frame.

    Raises:
        ValueError: it does not fit.
    """
    if clip is None:
        return None, 0
    frames, size = layout.frames(0), (video.height, video.width)
    if isinstance(clip, torch.Tensor):
        if clip.ndim != 5 or [n for axis, n in enumerate(clip.shape) if axis != 2] != [1, *shape]:
            raise ValueError(
                f"video: latents of shape {list(clip.shape)}; this request goes on from [1, {shape[0]}, frames, "
                f"{shape[1]}, {shape[2]}]"
            )
        if not torch.isfinite(clip).all():
            raise ValueError("video: latents that hold NaN or infinity")
        length, clip = clip.shape[2], clip.to("cpu", torch.float32)
    elif isinstance(clip, (str, Path)):
        clip = Path(clip)
        found = probe_clip(clip)
        if (found.height, found.width) != size:
            raise ValueError(
                f"video {clip} has frames of {found.height}x{found.width} (height, width), and {size[0]}x{size[1]} was "
                "asked for; ask for its own size"
            )
        length = (found.frames - 1) // factor + 1
    else:
        raise ValueError(f"video is a {type(clip).__name__}: use the path of an mp4 file, or latents of its end")
    if length < frames:
        raise ValueError(
            f"video has {length} latent frames, and the first block goes on from {frames}: a latent is {factor} "
            "frames; use smaller blocks or a longer clip"
        )
    return clip, length
