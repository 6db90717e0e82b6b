"""Arguments for a call of an engine, and the latents that the oracle makes of the same call."""

from __future__ import annotations

from typing import Any

import torch

from dualparal import reference
from dualparal.config.video import VideoConfig
from dualparal.engine.engine import Engine
from dualparal.engine.images import encode_images
from dualparal.engine.inputs import VideoInputs
from dualparal.engine.request import check_request
from dualparal.sampling.noise import BlockNoise


def embeds(engine: Engine, guidance: bool = True, seed: int = 1, tokens: int = 16) -> dict[str, torch.Tensor]:
    """Random prompt embeddings as call arguments."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, tokens, engine.source.spec.text_dim, generator=generator)
    found = {"prompt_embeds": rows[:1]}
    if guidance:
        found["negative_prompt_embeds"] = rows[1:]
    return found


def reference_latents(engine: Engine, prompt: dict[str, Any], **call: Any) -> torch.Tensor:
    """The plain loop's latents for the same request; images are among the values of ``prompt``."""
    video = VideoConfig(output_type="latent", **call)
    request = check_request(engine.setup, engine.scheduler, video, VideoInputs(**prompt, seed=video.seed))
    spec = engine.source.spec
    assert request.embeds is not None
    (images,) = encode_images(engine.setup, engine.parts, [request])
    rows = request.embeds if images is None else images.before(request.embeds)
    second = video.guidance_scale if video.guidance_scale_2 is None else video.guidance_scale_2
    return reference.generate(
        spec,
        engine.source.load_slices(range(spec.num_layers), engine.dtype, torch.device("cpu"), engine.config.linear_8bit),
        request.sampler,
        request.layout,
        request.grid,
        BlockNoise(request.layout, (spec.in_channels, request.grid.height, request.grid.width), video.seed),
        lambda block: rows,
        [video.guidance_scale, second],
        engine.config.attention_8bit,
        engine.config.features_8bit,
        engine.config.reuse,
        images.of if images is not None and spec.condition_channels else None,
        images.first if images is not None and spec.keeps_first_frame else None,
    )
