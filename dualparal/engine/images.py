"""A request's images on the rank that leads: encoded before its layers are loaded, kept for a resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from dualparal.checkpoint.given import read_images
from dualparal.engine.parts import Parts
from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.io.images import fingerprint, pixels
from dualparal.sampling.images import ImageCondition

_CPU = torch.device("cpu")


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
    spec, device = setup.source.spec, setup.mesh.device
    condition = family.condition(spec, encoder, frames, layout.num_latents, layout.padded_latents).on(_CPU)
    if not spec.image_tokens:
        return condition
    reader = family.image_encoder(lambda: setup.source.load_image_encoder(device), device)
    try:
        tokens = reader.encode(request.images).to(_CPU, setup.dtype)
    finally:
        reader.free()
    # As wide as the text's, with which they travel.
    return replace(condition, tokens=F.pad(tokens, (0, spec.text_dim - tokens.shape[1])))


def kept_images(setup: Setup, requests: Sequence[Request], folder: Path, name: str) -> list[ImageCondition]:
    """Reads what ``encode_images`` made from a file in the snapshots' folder. Raises SnapshotError."""
    spec, grid = setup.source.spec, requests[0].grid
    like = ImageCondition(
        torch.empty(1, spec.condition_channels or spec.in_channels, 0, grid.height, grid.width),
        tokens=torch.empty(spec.image_tokens, spec.text_dim, dtype=setup.dtype) if spec.image_tokens else None,
    )
    return read_images(folder, name, len(requests), requests[0].layout.padded_latents or 0, like)
