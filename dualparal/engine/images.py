"""A request's images on the rank that leads: encoded before its layers are loaded, kept for a resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dualparal.checkpoint.given import read_images
from dualparal.engine.parts import Parts
from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.io.images import fingerprint, pixels
from dualparal.sampling.images import ImageCondition


def fingerprints(request: Request) -> list[str]:
    """A checksum of each image of a request."""
    return [fingerprint(image) for image in request.images]


def encode_images(setup: Setup, parts: Parts, requests: Sequence[Request]) -> list[ImageCondition | None]:
    """Encodes what the model is told of the images of each video, on the CPU; None for one without images.

    The VAE encodes them on this rank's device; it is loaded if it is needed.

    Raises:
        ModelError, OSError: a part of the model cannot be loaded.
    """
    made: dict[tuple[str, ...], ImageCondition] = {}  # videos often share their images
    found: list[ImageCondition | None] = []
    for request in requests:
        name = tuple(fingerprints(request))
        if name and name not in made:
            made[name] = _encoded(setup, parts, request)
        found.append(made[name] if name else None)
    return found


def _encoded(setup: Setup, parts: Parts, request: Request) -> ImageCondition:
    video, layout, family = request.video, request.layout, setup.source.family
    frames = [torch.from_numpy(pixels(image, video.height, video.width)) for image in request.images]
    encoder = family.encoder(parts.vae)
    condition = family.condition(setup.source.spec, encoder, frames, layout.num_latents, layout.padded_latents)
    return condition.on(torch.device("cpu"))


def kept_images(setup: Setup, requests: Sequence[Request], folder: Path, name: str) -> list[ImageCondition]:
    """Reads what ``encode_images`` made of a run's images from a file in its snapshots' folder. Raises SnapshotError."""
    spec, grid = setup.source.spec, requests[0].grid
    like = ImageCondition(
        torch.empty(1, spec.condition_channels, 0, grid.height, grid.width),
        tokens=torch.empty(spec.image_tokens, spec.text_dim, dtype=setup.dtype) if spec.image_tokens else None,
    )
    return read_images(folder, name, len(requests), requests[0].layout.padded_latents or 0, like)
