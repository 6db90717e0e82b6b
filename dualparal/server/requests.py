"""Requests for videos: the fields of a body, each within its limits, as one checked value."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dualparal.config.video import VideoConfig
from dualparal.schedule.layout import Layout
from dualparal.server.errors import ApiError
from dualparal.server.settings import Settings

MAX_PROMPT = 4000  # characters
_MAX_SEED = 2**63 - 1
_FIELDS = (
    "model", "prompt", "negative_prompt", "size", "seconds", "steps", "guidance_scale", "seed", "storyboard",
    "input_reference",
)  # fmt: skip
_MAX_SCENES = 64
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
        scenes: [first block, text] of the storyboard, after the prompt.
        image: it begins with an image, which lies beside its record.
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
    scenes: tuple[tuple[int, str], ...] = ()
    image: bool = False


def read_request(fields: Mapping[str, Any], settings: Settings) -> VideoRequest:
    """The request in a body's fields; numbers may be texts, as forms have them. Raises ApiError (400, 404)."""
    for name in fields:
        if name not in _FIELDS:
            raise _bad(shown(name), f"is no field of a video; use {', '.join(_FIELDS)}", "unknown_parameter")
    _check_image(fields.get("input_reference"), settings)
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
    texts = _storyboard(fields.get("storyboard"), seconds)
    if 0 in texts and fields.get("prompt") not in (None, ""):
        raise _bad("storyboard", "has a text for second 0, which is the prompt; leave one of them out")
    request = VideoRequest(
        prompt=texts.pop(0) if 0 in texts else read_text(fields.get("prompt"), "prompt"),
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
        image=fields.get("input_reference") is not None,
    )  # fmt: skip
    try:
        VideoConfig(height, width, request.num_frames, steps, guidance, seed=seed)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    return replace(request, scenes=_scenes(texts, request.num_frames, settings))


def layout_of(num_frames: int, settings: Settings) -> Layout:
    """The blocks of a video of so many frames, of a length that ``read_request`` has made."""
    return Layout(settings.engine.blocks, (num_frames - 1) // _LATENT + 1)


def first_frame(layout: Layout, block: int) -> int:
    """The frame with which a block begins."""
    return 0 if block == 0 else (layout.start(block) - 1) * _LATENT + 1


def shown(name: object) -> str:
    """A name that a client gave, as an answer may repeat it."""
    return "".join(each if each.isprintable() else "?" for each in str(name)[:64])


def read_text(value: Any, name: str) -> str:
    """A text of a body, stripped. Raises ApiError (400): none, empty or too long; it is not repeated."""
    if not isinstance(value, str) or not value.strip():
        raise _bad(name, "is missing: say in words what the video shows")
    if len(value) > MAX_PROMPT:
        raise _bad(name, f"has {len(value)} characters; use {MAX_PROMPT} or fewer")
    if any(unicodedata.category(each) == "Cc" and each not in "\n\r\t" for each in value):
        raise _bad(name, "holds control characters; leave them out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _bad(name, "holds half of a surrogate pair; leave it out") from None
    return value.strip()


def _storyboard(value: Any, seconds: float) -> dict[float, str]:
    """The texts by second. Raises ApiError (400)."""
    if value in (None, ""):
        return {}
    try:
        found = json.loads(value) if isinstance(value, str) else value  # as forms have it
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not 1 <= len(found) <= _MAX_SCENES:
        raise _bad("storyboard", f'is {{second: text}} of at most {_MAX_SCENES} texts, such as {{"2.5": "a dog"}}')
    texts: dict[float, str] = {}
    for key, text in found.items():
        try:
            second = float(key) if len(key) <= 16 else math.nan
        except ValueError:
            second = math.nan
        if not 0 <= second < seconds or second in texts:
            raise _bad("storyboard", f"{shown(key)}: use seconds from 0 to below the video's {seconds:g}, each once")
        texts[second] = read_text(text, "storyboard")
    return texts


def _scenes(texts: Mapping[float, str], num_frames: int, settings: Settings) -> tuple[tuple[int, str], ...]:
    """The texts by the first block that has each. Raises ApiError (400): a block would have two."""
    layout = layout_of(num_frames, settings)
    found = [(0, "")]
    for second in sorted(texts):
        block = layout.block_of(-(-round(second * settings.fps) // _LATENT))
        if block == found[-1][0]:
            apart = settings.engine.blocks.frames_per_block * _LATENT / settings.fps
            raise _bad("storyboard", f"{second:g}: it lies in the block of the text before; put them {apart:g} s apart")
        if block < (layout.num_blocks or 0):  # else the video has ended before
            found.append((block, texts[second]))
    return tuple(found[1:])


def _check_image(value: Any, settings: Settings) -> None:
    """Checks that an image is there, or none, as the model has it. Raises ApiError (400)."""
    counts, most = settings.image_counts, max(settings.image_counts)
    rule = ""
    if value is None and 0 not in counts:
        rule = " is missing: this model makes videos of an image; send it as a file of a form (multipart/form-data)"
    elif value is not None and most == 0:
        rule = ": this model makes videos of a text alone; leave it out"
    elif value is not None and not isinstance(value, bytes):
        rule = ": send the image as a file of a form (multipart/form-data); no address is fetched"
    if most and 1 not in counts and (value is not None or rule):
        rule = f": this model takes {most} images for a video, and this API has one; use 'dualparal generate'"
    if rule:
        raise ApiError(400, f"input_reference{rule}", param="input_reference", code="invalid_value")


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
