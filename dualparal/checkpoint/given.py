"""Files beside snapshots that hold what was given to a run: initial noise, and what came of images and clips."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from dualparal.checkpoint import sealed
from dualparal.checkpoint.sealed import SnapshotError
from dualparal.sampling.images import ImageCondition

FORMAT = "dualparal-snapshot"
NAMES = re.compile(r"(noise|images|clips)-([0-9a-f]{32})\.safetensors")  # of the files of this module


def write_noise(folder: Path, noise: torch.Tensor) -> str:
    """Writes initial noise [videos, C, L, H, W] that was given instead of a seed; returns the name of its file.

    Raises OSError.
    """
    return sealed.write(folder, "noise", {"latents": noise}, {"format": FORMAT}).name


def read_noise(folder: Path, name: str) -> torch.Tensor:
    """Reads the noise [videos, C, L, H, W] that ``write_noise`` wrote under ``name``.

    Raises:
        SnapshotError: not such a name, or the file is missing or damaged.
    """
    return floats(_read(folder, name, "noise").get("latents"), 5)


def write_clips(folder: Path, latents: Sequence[torch.Tensor], pools: Sequence[torch.Tensor]) -> str:
    """Writes the last latents [1, C, L, h, w] of the clip that each video goes on from, and their noise
    [1, C, f, h, w]; returns the file's name.

    Raises OSError.
    """
    tensors = {str(video): tensor.contiguous() for video, tensor in enumerate(latents)}
    tensors |= {f"{video}/noise": tensor.contiguous() for video, tensor in enumerate(pools)}
    return sealed.write(folder, "clips", tensors, {"format": FORMAT}).name


def read_clips(folder: Path, name: str, videos: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Reads what ``write_clips`` wrote under ``name``: for each video latents and noise.

    Raises:
        SnapshotError: not such a name, or the file is missing, damaged, or of other videos.
    """
    tensors = _read(folder, name, "clips")
    return [(floats(tensors.get(str(v)), 5), floats(tensors.get(f"{v}/noise"), 5)) for v in range(videos)]


def write_images(folder: Path, conditions: Sequence[ImageCondition]) -> str:
    """Writes what came of the images of each video, which a resumed run does not see again; returns the file's name.

    Raises OSError.
    """
    tensors = {f"{v}/{name}": t for v, found in enumerate(conditions) for name, t in found.tensors().items()}
    return sealed.write(folder, "images", tensors, {"format": FORMAT}).name


def read_images(folder: Path, name: str, videos: int, length: int, like: ImageCondition) -> list[ImageCondition]:
    """Reads what ``write_images`` wrote under ``name``.

    Args:
        videos: their number.
        length: latent frames that are computed; 0: of an endless video.
        like: empty tensors, which have the sizes that the run needs but for numbers of frames.

    Raises:
        SnapshotError: not such a name, the file is missing or damaged, or holds something else.
    """
    tensors = _read(folder, name, "images")
    found = []
    for video in range(videos):
        own = {key.partition("/")[2]: t for key, t in tensors.items() if key.partition("/")[0] == str(video)}
        try:
            condition = ImageCondition.of_tensors(own, length)
        except KeyError:
            raise SnapshotError(f"{folder / name}: nothing of video {video}") from None
        for kind, tensor in condition.tensors().items():
            wanted = like.first if kind != "tokens" else like.tokens
            if wanted is None or floats(tensor, wanted.ndim).dtype != wanted.dtype or _sides(tensor) != _sides(wanted):
                raise SnapshotError(f"{folder / name}: {kind} is {tensor.dtype} {list(tensor.shape)}")
        early = condition.first.shape[2]
        ending = 0 if condition.ending is None else condition.ending.shape[2]
        if (condition.tokens is None) != (like.tokens is None) or (condition.later is None and early + ending < length):
            raise SnapshotError(f"{folder / name}: not what came of the images of such a video")
        found.append(condition)
    return found


def _sides(tensor: torch.Tensor) -> list[int]:
    """The shape, without the number of frames."""
    return [size for axis, size in enumerate(tensor.shape) if axis != 2 or tensor.ndim < 5]


def _read(folder: Path, name: str, kind: str) -> dict[str, torch.Tensor]:
    match = NAMES.fullmatch(name)
    if match is None or match[1] != kind:
        raise SnapshotError(f"{name!r} is not the name of a file with {kind}")
    return sealed.read(folder / name)[0]


def floats(value: object, dimensions: int) -> torch.Tensor:
    """The value itself, a floating-point tensor of so many dimensions. Raises SnapshotError for anything else."""
    if not isinstance(value, torch.Tensor) or value.ndim != dimensions or not value.is_floating_point():
        raise SnapshotError(f"a tensor of {dimensions} dimensions is missing")
    return value
