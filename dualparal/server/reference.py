"""Images that clients send for a video to begin with: of few kinds and bounded size, decoded before they are kept."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from dualparal.server.errors import ApiError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 8 << 20  # of a file
_MAX_PIXELS = 1 << 24  # decoded they are 48 MiB
_FORMATS = "JPEG", "PNG", "WEBP"  # PIL knows more, some of which run programs


def check_reference(data: bytes) -> None:
    """Decodes an image, to see that it can be. Raises ApiError (400)."""
    if len(data) > MAX_BYTES:
        raise _bad(f"has {len(data)} bytes; send {MAX_BYTES} or fewer")
    try:
        _open(io.BytesIO(data)).load()
    except _TooLarge:
        raise _bad(f"has too many pixels; send {_MAX_PIXELS} or fewer, such as 4096x4096") from None
    except Exception:  # of any kind: decoders raise what they like about a file that is none of theirs
        raise _bad(f"is no image that can be read; send one of {', '.join(_FORMATS)}") from None


def read_reference(path: Path) -> Image:
    """The image in a file that was checked, turned as its camera says. Raises OSError."""
    from PIL import ImageOps

    with open(path, "rb") as file:
        return ImageOps.exif_transpose(_open(file)).convert("RGB")


class _TooLarge(Exception):
    pass


def _open(file: io.BufferedReader | io.BytesIO) -> Image:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below PIL's
        found = Image.open(file, formats=_FORMATS)
    if found.width * found.height > _MAX_PIXELS:
        raise _TooLarge
    return found


def _bad(rule: str) -> ApiError:
    return ApiError(400, f"input_reference {rule}", param="input_reference", code="invalid_value")
