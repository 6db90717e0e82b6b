"""The number of images that a video takes, by its model. No torch."""

from __future__ import annotations

from collections.abc import Sequence

MIN_FRAMES = 5  # of a video that an image begins and another ends: they need a latent frame each


def check_images(counts: Sequence[int], image: bool, last_image: bool, num_frames: int | None) -> None:
    """Checks that a model takes the images that are given.

    Args:
        counts: numbers of images that the model takes: 0 without any, 1 with the first one, 2 with the last one too.
        image, last_image: they are given.
        num_frames: of the video; None: it is endless.

    Raises:
        ValueError: too few or too many.
    """
    if last_image and not image:
        raise ValueError("last_image without image: a video that ends with an image begins with one; give image too")
    given = image + last_image
    if given not in counts:
        name = "last_image" if last_image else "image"
        if max(counts) == 0:
            raise ValueError(f"{name} was given, and this model makes videos of a text alone; leave it out")
        if given > max(counts):
            raise ValueError(f"{name} was given, and this model takes the first image only; leave it out")
        raise ValueError(
            "this model makes videos of images: give image"
            + (" and last_image, the video's first and last frame" if min(counts) == 2 else ", the video's first frame")
        )
    if last_image and (num_frames is None or num_frames < MIN_FRAMES):
        length = "an endless video" if num_frames is None else f"num_frames={num_frames}"
        raise ValueError(f"last_image with {length}: it is the last of a number of frames; use {MIN_FRAMES} or more")
