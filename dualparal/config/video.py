"""One request as the caller types it, checked and frozen: size, length, steps, guidance. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from dualparal.config.blocks import MAX_STEPS, check_int

OutputType = Literal["np", "uint8", "pt", "pil", "latent"]
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)

# Caps against typing mistakes (a height of 10**6), far above what any known model can use.
MAX_SIDE = 16384
MAX_GUIDANCE = 1_000_000
MAX_TIMESTEP = 1e9  # a sampler has its own limit besides
MAX_FRAMES = 100_000_000
OF_MODEL = ("height", "width", "num_inference_steps", "guidance_scale")  # a model may bring its own


@dataclass(frozen=True)
class VideoConfig:
    """The size, length, steps and guidance of one request. Names are ``WanPipeline.__call__``'s (diffusers).

    Attributes:
        height, width: pixels.
        num_frames: pixel frames; None: until the consumer stops.
        num_inference_steps: denoising steps of a block, T; the length of a list of them, where one is given.
        guidance_scale: weight of classifier-free guidance; 1.0 or less: none.
        guidance_scale_2: the same for the second transformer of a model with two; None: ``guidance_scale``.
        seed: of the initial noise.
        output_type: one of ``OUTPUT_TYPES``.
        max_sequence_length: tokens to which a prompt is cut.
        timesteps, sigmas: the steps one by one, from the noisiest down, as ``set_timesteps`` of diffusers' schedulers
            takes them (``sigmas`` are noise levels up to 1, before the sampler's shift); at most one of the two. None:
            the sampler spaces ``num_inference_steps`` of them. Any numbers will do; they are kept as tuples of floats.
        continues: the video goes on from a clip: ``num_frames`` are those that come after it.

    Raises:
        ValueError: a value is out of range; the message names the value, the rule and the way out.
    """

    height: int = 480
    width: int = 832
    num_frames: int | None = 81
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    guidance_scale_2: float | None = None
    seed: int = 0
    output_type: OutputType = "np"
    max_sequence_length: int = 512
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    continues: bool = False

    @classmethod
    def of(cls, defaults: VideoConfig | None = None, **fields: Any) -> VideoConfig:
        """The request of some fields, where a list of steps may say how many there are.

        Args:
            defaults: whose height, width, steps and guidance_scale are taken where a field is None or left out; None:
                those of the class.
            fields: num_inference_steps of None is first the length of ``timesteps`` or ``sigmas``.

        Raises:
            ValueError: as the class raises it.
        """
        if fields.get("num_inference_steps") is None:
            lists = [tuple(fields[name]) for name in ("timesteps", "sigmas") if _is_list(fields.get(name))]
            fields["num_inference_steps"] = len(lists[0]) if lists else None
        default = defaults or cls()
        own = {name: getattr(default, name) for name in OF_MODEL if fields.get(name) is None}
        found = {**fields, **own}
        scales = "guidance_scale", "guidance_scale_2"
        return cls(**{name: _plain(value, real=name in scales) for name, value in found.items()})

    def __post_init__(self) -> None:
        self._keep_list("timesteps", "steps of the sampler, from the noisiest down, such as 1000,757,522", MAX_TIMESTEP)
        self._keep_list("sigmas", "noise levels from at most 1 down, such as 1.0,0.9,0.6", 1.0)
        check_int("height", self.height, 1, MAX_SIDE, "the height of a frame in pixels")
        check_int("width", self.width, 1, MAX_SIDE, "the width of a frame in pixels")
        check_int("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS, "denoising steps of a block")
        check_int("max_sequence_length", self.max_sequence_length, 1, 4096, "text tokens of a prompt")
        check_int("seed", self.seed, 0, 2**63 - 1, "a seed is a non-negative 63-bit integer")
        if self.num_frames is not None:
            check_int("num_frames", self.num_frames, 1, MAX_FRAMES, "a video has at least one frame")
        for name in ("guidance_scale", "guidance_scale_2"):
            value = getattr(self, name)
            if value is None and name == "guidance_scale_2":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not -MAX_GUIDANCE <= value <= MAX_GUIDANCE:  # nor is NaN in between
                raise ValueError(
                    f"{name}={value!r} is not a number up to {MAX_GUIDANCE}; use a value such as 5.0 (1.0: no guidance)"
                )
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={self.output_type!r} is not supported; use one of {OUTPUT_TYPES}")

    @property
    def guidance(self) -> bool:
        """True when an unconditional unit runs besides the conditional one (diffusers' rule: scale > 1)."""
        return self.guidance_scale > 1

    @property
    def skipped_blocks(self) -> int:
        """Blocks at the beginning that are not given out: the clip's end. Blocks that are count from 0."""
        return int(self.continues)

    def _keep_list(self, name: str, rule: str, most: float) -> None:
        """Checks a list of steps, and keeps it as floats. Raises ValueError."""
        values = getattr(self, name)
        if values is None:
            return
        if not _is_list(values):
            raise ValueError(f"{name}={values!r}: use a list of numbers, {rule}")
        steps = tuple(values)
        if name == "sigmas" and self.timesteps is not None:
            raise ValueError("timesteps and sigmas were both given: each says all steps; use one of them")
        before = math.inf
        for index, value in enumerate(steps):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number or not 0 < value <= most or not value < before:  # nor are NaN and infinity
                raise ValueError(f"{name}[{index}]={value!r}: use {rule}, each above 0 and below the one before")
            before = float(value)
        if not 1 <= len(steps) <= MAX_STEPS or len(steps) != self.num_inference_steps:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps} with {len(steps)} {name}: a list has every step, 1 to "
                f"{MAX_STEPS} of them; leave num_inference_steps out"
            )
        object.__setattr__(self, name, tuple(map(float, steps)))

    def num_latents(self, temporal_factor: int = 4) -> int | None:
        """Latent frames L of ``num_frames`` = factor * (L - 1) + 1 pixel frames; of a video that goes on from a clip
        those that are new, factor * L frames.

        Raises:
            ValueError: no such L; names the two nearest legal lengths.
        """
        if self.num_frames is None:
            return None
        if self.continues:
            groups, rest = divmod(self.num_frames, temporal_factor)
            if rest or not groups:
                raise ValueError(
                    f"num_frames={self.num_frames} after a clip: every latent becomes {temporal_factor} frames; use "
                    f"{temporal_factor * groups or temporal_factor} or {temporal_factor * (groups + 1)}"
                )
            return groups
        groups, rest = divmod(self.num_frames - 1, temporal_factor)
        if rest:
            lower = groups * temporal_factor + 1
            raise ValueError(
                f"num_frames={self.num_frames} cannot be decoded exactly: the VAE makes {temporal_factor}k + 1 "
                f"frames; use {lower} or {lower + temporal_factor}"
            )
        return groups + 1

    def check_size(self, multiple_height: int, multiple_width: int) -> None:
        """Checks that frames divide into latent patches.

        Args:
            multiple_height, multiple_width: pixels of a patch: the VAE's scale times the model's patch size.

        Raises:
            ValueError: they do not; names the nearest sizes that do.
        """
        for name, value, multiple in (
            ("height", self.height, multiple_height),
            ("width", self.width, multiple_width),
        ):
            if value % multiple:
                lower = max(multiple, value // multiple * multiple)
                raise ValueError(
                    f"{name}={value} is not divisible by {multiple} (VAE scale times patch size of this model); "
                    f"use {lower} or {value // multiple * multiple + multiple}"
                )


def _plain(value: Any, real: bool) -> Any:
    """A number, such as one of numpy's, as Python's int or (``real``) float; all else as it is."""
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return float(value) if real else int(value) if isinstance(value, Integral) else value


def _is_list(value: object) -> bool:
    """True for several values in a row: a list, a tuple or an array."""
    return isinstance(value, Collection) and not isinstance(value, (str, bytes))
