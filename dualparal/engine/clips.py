"""A request's clip on the rank that leads: its last latents, encoded or as they were given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from dualparal.engine.parts import Parts
from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.io import clips
from dualparal.sampling.continued import Clip


def clip_fingerprint(request: Request) -> str | None:
    """A checksum of the clip that a request goes on from; None: it goes on from none."""
    if isinstance(request.clip, torch.Tensor):
        return hashlib.sha256(request.clip.contiguous().numpy().tobytes()).hexdigest()[:32]
    return None if request.clip is None else clips.fingerprint(request.clip)


def encode_clips(setup: Setup, parts: Parts, requests: Sequence[Request]) -> list[Clip | None]:
    """The clip of each video, on the CPU; None for one without. The VAE is loaded if one is to be encoded.

    Raises:
        ModelError, OSError: a part of the model, or the clip, cannot be read.
        ValueError: the clip has another number of frames than its header says.
    """
    found: list[Clip | None] = []
    for request in requests:
        latents = request.clip
        if isinstance(latents, Path):
            latents = _encoded(setup, parts, latents, request)
        found.append(None if latents is None else Clip.of(latents, request.layout.frames(0)))
    return found


def _encoded(setup: Setup, parts: Parts, path: Path, request: Request) -> torch.Tensor:
    """The last latents of a clip: those that are inverted, block 0's, and before them those that the decoder sees.

    The encoder begins with a frame by itself, and what follows sees it for a while: as many more are encoded, where the
    clip has them, and dropped.
    """
    encoder, factor = setup.source.family.encoder(parts.vae), setup.source.spec.temporal_factor
    (decoder,) = parts.decoders(1)
    needed = max(request.layout.frames(0), request.inverted_frames)
    wanted = max(needed, decoder.history)
    pictures = clips.last_frames(path, (wanted + encoder.history - 1) * factor + 1)
    pictures = pictures[(len(pictures) - 1) % factor :]
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = encoder.push(pixels).cpu()
    if latents.shape[2] < needed:
        raise ValueError(f"video {path} has fewer frames than its header says")
    return latents[:, :, -wanted:]
