"""Requests for videos: the fields of a body, each within its limits, as one checked value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualparal.config.video import VideoConfig
from dualparal.server.errors import ApiError
from dualparal.server.settings import Settings

MAX_PROMPT = 4000  # characters
_MAX_SEED = 2**63 - 1
_FIELDS = "model", "prompt", "negative_prompt", "size", "seconds", "steps", "guidance_scale", "seed"
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_LATENT = 4  # frames of a latent frame


@dataclass(frozen=True)
class VideoRequest:
    """A video that somebody asked for.

    Attributes:
        prompt, negative_prompt: texts.
        width, height: pixels.
        seconds: as it was asked for; ``num_frames`` is the nearest number of frames that a model makes.
        steps, guidance_scale, seed: as in ``VideoConfig``.
    """

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    seconds: str
    num_frames: int
    steps: int
    guidance_scale: float
    seed: int


def read_request(fields: Mapping[str, Any], settings: Settings) -> VideoRequest:
    """The request in a body's fields; numbers may be texts, as forms have them. Raises ApiError (400, 404)."""
    if "input_reference" in fields:
        raise ApiError(
            400, "input_reference: this server makes videos from text only; leave it out", param="input_reference"
        )
    for name in fields:
        if name not in _FIELDS:
            raise _bad(str(name)[:64], f"is no field of a video; use {', '.join(_FIELDS)}", "unknown_parameter")
    model = fields.get("model") or settings.model_name
    if model != settings.model_name:
        raise ApiError(
            404,
            f"model: this server has {settings.model_name!r} and no other; leave model out or give that",
            param="model",
            code="model_not_found",
        )
    width, height = _size(fields.get("size"), settings)
    seconds = _number(fields, "seconds", settings.seconds, 0.01, settings.max_seconds)
    wanted = max(0, round((seconds * settings.fps - 1) / _LATENT))
    steps = int(_number(fields, "steps", settings.steps, 1, settings.max_steps, whole=True))
    guidance = _number(fields, "guidance_scale", settings.guidance_scale, 0, 100)
    seed = int(_number(fields, "seed", 0, 0, _MAX_SEED, whole=True))
    request = VideoRequest(
        prompt=read_text(fields.get("prompt"), "prompt"),
        negative_prompt=None if fields.get("negative_prompt") in (None, "") else read_text(
            fields["negative_prompt"], "negative_prompt"
        ),
        width=width,
        height=height,
        seconds=f"{seconds:g}",
        num_frames=wanted * _LATENT + 1,
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
    )  # fmt: skip
    try:
        VideoConfig(height, width, request.num_frames, steps, guidance, seed=seed)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    return request


def read_text(value: Any, name: str) -> str:
    """A text of a body, stripped. Raises ApiError (400): none, empty or too long; it is not repeated."""
    if not isinstance(value, str) or not value.strip():
        raise _bad(name, "is missing: say in words what the video shows")
    if len(value) > MAX_PROMPT:
        raise _bad(name, f"has {len(value)} characters; use {MAX_PROMPT} or fewer")
    if any(ord(each) < 32 and each not in "\n\r\t" for each in value):
        raise _bad(name, "holds control characters; leave them out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _bad(name, "holds half of a surrogate pair; leave it out") from None
    return value.strip()


def _size(value: Any, settings: Settings) -> tuple[int, int]:
    """Width and height. Raises ApiError (400)."""
    if value in (None, ""):
        return settings.width, settings.height
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise _bad("size", f"{value!r:.40}: use WIDTHxHEIGHT in pixels, such as {settings.width}x{settings.height}")
    width, height = int(found[1]), int(found[2])
    each = settings.multiple
    if not width or not height or width % each or height % each:
        raise _bad("size", f"{width}x{height}: both sides are multiples of {each}")
    if width * height > settings.max_pixels:
        raise _bad("size", f"{width}x{height} has {width * height} pixels; this server makes {settings.max_pixels}")
    return width, height


def _number(
    fields: Mapping[str, Any], name: str, default: float, least: float, most: float, *, whole: bool = False
) -> float:
    """A number of a body. Raises ApiError (400)."""
    value = fields.get(name)
    if value is None or value == "":
        return default
    rule = f"use a {'whole ' if whole else ''}number from {least:g} to {most:g}"
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or len(str(value)) > 32:
            raise ValueError
        number = int(value) if whole else float(value)
        if whole and isinstance(value, float) and number != value:
            raise ValueError
    except (ValueError, OverflowError):
        raise _bad(name, f"{value!r:.40}: {rule}") from None
    if not math.isfinite(number) or not least <= number <= most:
        raise _bad(name, f"{value!r:.40}: {rule}")
    return number


def _bad(name: str, rule: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{name} {rule}", param=name, code=code)
