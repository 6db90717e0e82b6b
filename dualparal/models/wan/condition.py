"""Conditions of Wan's image-to-video models, frame by frame, as diffusers' WanImageToVideoPipeline makes them.

A clip whose first (and last) frame is the image, and whose other frames are grey, goes through the VAE; a mask says
which frames are the image's. Here the clip is as long as the video, however long that is: the VAE sees a bounded
number of frames back, so after some the latents of grey are one and the same, and nothing after them is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dualparal.models.images import Encoder
from dualparal.sampling.images import ImageCondition


def image_condition(
    spec: Any, encoder: Encoder, images: Sequence[torch.Tensor], length: int | None, computed: int | None
) -> ImageCondition:
    """The condition of every latent frame: mask, then latents of the clip.

    Args:
        spec: the model's ``WanSpec``.
        encoder: of one video, fresh.
        images: the first, or the first and the last frame, [3, H, W] in [-1, 1].
        length: latent frames of the video, where the last image belongs; None: endless.
        computed: the same with the surplus of the last block, frames that nobody sees: grey ones.
    """
    step = spec.temporal_factor
    grey = images[0].new_zeros(step, *images[0].shape)
    ends = length - 1 if length is not None and len(images) == 2 else None
    settled = encoder.history + 1  # from this latent on they are alike
    early = min(settled, computed or settled, settled if ends is None else ends)
    first = [encoder.push(images[0][None]), *(encoder.push(grey) for _ in range(1, early))]
    later = ending = None
    if ends is not None:
        assert computed is not None, "an endless video has no last image"
        if ends > early:
            later = encoder.push(grey)
        last = [encoder.push(torch.cat([grey[1:], images[1][None]]))]
        last += [encoder.push(grey) for _ in range(ends + 1, computed)]
        ending = _masked(torch.cat(last, dim=2), step)
        ending[:, step - 1, 0] = 1
    elif computed is None or computed > early:
        later = encoder.push(grey)
    told = _masked(torch.cat(first, dim=2), step)
    told[:, :step, 0] = 1
    length = 0 if ending is None else computed or 0
    return ImageCondition(told, None if later is None else _masked(later, step), ending, length)


def _masked(latents: torch.Tensor, frames: int) -> torch.Tensor:
    """Latents [1, C, F, h, w] behind a mask of zeros, a channel for each of so many ``frames`` of a latent frame."""
    mask = latents.new_zeros(1, frames, *latents.shape[2:])
    return torch.cat([mask, latents], dim=1)
