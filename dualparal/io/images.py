"""Images that a video begins or ends with: from a file, a PIL image or an array to numbers, as diffusers has them."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_SIDE = 16384  # pixels; what decodes to more is no picture for a video


def read_image(image: Any, name: str) -> Image:
    """An image as PIL has it, in RGB of 8 bits, turned as its camera says.

    Args:
        image: a path, a PIL image, or an array [H, W, 3] of uint8, or of numbers from 0 to 1.
        name: of the argument or flag, for errors.

    Raises:
        ValueError: no such file, or no image.
    """
    from PIL import Image, ImageOps

    if isinstance(image, (str, Path)):
        path = Path(image)
        if not os.path.isfile(path):
            raise ValueError(f"{name} {path}: there is no such file")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as found:
                    _check_sides(found.size, f"{name} {path}")
                    return ImageOps.exif_transpose(found).convert("RGB")
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{name} {path} is not an image that can be read ({error})") from None
    if isinstance(image, Image.Image):
        _check_sides(image.size, name)
        return image.convert("RGB")
    return Image.fromarray(_array(image, name))


def _array(image: Any, name: str) -> npt.NDArray[np.uint8]:
    """An array as uint8 [H, W, 3]. Raises ValueError."""
    try:
        array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError):
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "uf" or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(
            f"{name} is a {type(image).__name__}: use a path, a PIL image, or an array [height, width, 3] of uint8, or "
            "of numbers from 0 to 1"
        )
    _check_sides((array.shape[1], array.shape[0]), name)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "u" or not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise ValueError(f"{name}: an array of {array.dtype} holds numbers from 0 to 1; or use uint8")
    return np.round(array * 255).astype(np.uint8)


def _check_sides(size: tuple[int, int], name: str) -> None:
    if max(size) > _MAX_SIDE or min(size) < 1:
        raise ValueError(f"{name} has {size[0]}x{size[1]} pixels: use an image of {_MAX_SIDE} a side at most")


def pixels(image: Image, height: int, width: int) -> npt.NDArray[np.float32]:
    """The image stretched to a size, [3, height, width] in [-1, 1]: bit for bit diffusers' ``VideoProcessor``."""
    from PIL.Image import Resampling

    resized = image.resize((width, height), Resampling.LANCZOS)
    found: npt.NDArray[np.float32] = 2.0 * (np.asarray(resized).astype(np.float32) / 255.0) - 1.0
    return np.ascontiguousarray(found.transpose(2, 0, 1))


def fingerprint(image: Image) -> str:
    """A checksum of the image's pixels and size."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:32]
