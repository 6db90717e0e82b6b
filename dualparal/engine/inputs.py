"""The inputs of one call as its caller types them: their kinds, and those of each video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch

Prompt = str | Mapping[int, str]  # a text, or {first frame: text}

_EMBEDS = "prompt_embeds", "negative_prompt_embeds"


@dataclass(frozen=True)
class VideoInputs:
    """The inputs of one video; each as in ``WanPipeline.__call__``, images as ``io.images.read_image`` takes them."""

    prompt: Prompt | None = None
    negative_prompt: str | None = None
    latents: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    image: Any = None
    last_image: Any = None
    clip: Any = None
    seed: int = 0


def split_videos(
    prompt: Prompt | Sequence[Prompt] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: torch.Tensor | None = None,
    prompt_embeds: torch.Tensor | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
    image: Any = None,
    last_image: Any = None,
    clip: Any = None,
    num_videos_per_prompt: int | None = 1,
) -> list[VideoInputs]:
    """The inputs of each video, as many as there are prompts (a list, or rows of ``prompt_embeds``) times
    ``num_videos_per_prompt``, those of a prompt one after the other.

    A single value holds for all of them, a list has one for each prompt or for each video. A single seed is that of
    the first: video v takes seed + v, or the v-th seed that the generator draws. The arguments are those of
    ``Engine.stream``.

    Raises:
        ValueError: lists and tensors of different lengths, values of another kind, or both seed and generator.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed and generator were both given; use one of them")
    for name, value in {"latents": latents, _EMBEDS[0]: prompt_embeds, _EMBEDS[1]: negative_prompt_embeds}.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} is {a_(value)}: use a torch tensor")
    each = _count("num_videos_per_prompt", 1 if num_videos_per_prompt is None else num_videos_per_prompt)
    if isinstance(prompt, (list, tuple)):
        prompts = len(prompt)
    else:
        prompts = len(prompt_embeds) if prompt_embeds is not None and prompt_embeds.ndim == 3 else 1
    if prompts == 0:
        raise ValueError("prompt holds no text; give one for each video")
    count = prompts * each

    def rows(name: str, value: Any) -> list[Any]:
        several = list(value.split(1)) if isinstance(value, torch.Tensor) and count > 1 else value
        if not isinstance(several, (list, tuple)):
            return [value] * count
        if len(several) == prompts:
            several = [row for row in several for _ in range(each)]
        if len(several) != count:
            raise ValueError(f"{name} for {len(several)} videos, and prompts for {count}; give one for each")
        return list(several)

    columns = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "latents": latents,
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
        "image": image,
        "last_image": last_image,
    }
    split = {name: rows(name, value) for name, value in columns.items()}
    for text in split["negative_prompt"]:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"negative_prompt is {a_(text)}: use a text, or a list of one for each video")
    split |= {"seed": _seeds(seed, generator, count, rows), "clip": rows("video", clip)}
    return [VideoInputs(**{name: values[v] for name, values in split.items()}) for v in range(count)]


def _seeds(seed: Any, generator: Any, count: int, rows: Callable[[str, Any], list[Any]]) -> list[Any]:
    """The seed of each of ``count`` videos, of any integers as Python's. Raises ValueError."""
    if generator is not None:
        one = isinstance(generator, torch.Generator)
        generators = [generator] * count if one else rows("generator", generator)
        for each in generators:
            if not isinstance(each, torch.Generator):
                raise ValueError(f"generator is {a_(each)}: use a torch.Generator, a list of them, or seed=")
        return [int(torch.randint(2**62, (1,), generator=each, device=each.device)) for each in generators]
    seed = 0 if seed is None else seed
    if isinstance(seed, Integral) and not isinstance(seed, bool):
        return [int(seed) + video for video in range(count)]
    several = rows("seed", seed if isinstance(seed, (list, tuple)) else getattr(seed, "tolist", lambda: seed)())
    return [int(each) if isinstance(each, Integral) and not isinstance(each, bool) else each for each in several]


def _count(name: str, value: Any) -> int:
    """The number of videos of a prompt. Raises ValueError."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= int(value) <= 1024:
        raise ValueError(f"{name}={value!r}: videos of each prompt; use an integer from 1 to 1024")
    return int(value)


def callback_of(callback: Any, tensor_inputs: Sequence[str] | None, engine: Any) -> Callable[..., Any] | None:
    """The caller's callback, bound to the engine, with the tensors it asks for; None: there is none.

    Args:
        callback: called as (engine, step, timestep, values). One of diffusers' ``PipelineCallback`` names its tensors
            itself.
        tensor_inputs: the names of the tensors among the values: "latents", or none of them.

    Raises:
        ValueError: it cannot be called, or asks for what an engine does not hand out.
    """
    names = ["latents"] if tensor_inputs is None else tensor_inputs
    names = getattr(callback, "tensor_inputs", names)
    if isinstance(names, str) or not isinstance(names, Sequence) or set(names) - {"latents"}:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs={names!r}: blocks share their texts, so there is 'latents' alone; "
            "texts change by set_prompt"
        )
    if callback is None:
        return None
    if not callable(callback):
        raise ValueError(f"callback_on_step_end is {a_(callback)}: use a function")
    bound = partial(callback, engine)
    return bound if names else partial(_without_latents, bound)


def _without_latents(callback: Callable[..., Any], step: int, timestep: torch.Tensor, values: dict[str, Any]) -> Any:
    return callback(step, timestep, {name: value for name, value in values.items() if name != "latents"})


def check_unused(attention_kwargs: Mapping[str, Any] | None) -> None:
    """Refuses what ``WanPipeline.__call__`` hands on to its attention. Raises ValueError."""
    if attention_kwargs:
        raise ValueError(
            f"attention_kwargs with {', '.join(map(str, attention_kwargs))}: attention here is the engine's own and "
            "takes none; leave it out (a LoRA's weight is said in loras=)"
        )


def a_(value: object) -> str:
    """The type of a value in words: "an int", "a list"."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"
