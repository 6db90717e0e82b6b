"""Contents of the messages between a parent and its ranks: arguments, chunks, statistics, samplers and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.checkpoint.sealed import SnapshotError
from dualparal.decoding.chunks import Chunk, Progress
from dualparal.io.images import read_image
from dualparal.models.json_files import ModelError
from dualparal.trace.stats import RankStats, RunStats
from dualparal.workers.line import Message

_IMAGES = "image", "last_image"
_PATHS = *_IMAGES, "video", "timeline"
# What a rank may refuse a request with, the nearest first.
_REFUSALS: tuple[type[Exception], ...] = (SnapshotError, ModelError, ValueError, TypeError, OSError, RuntimeError)


def pack_arguments(arguments: Mapping[str, Any]) -> Message:
    """The arguments of ``Engine.stream`` or ``Engine.resume`` as JSON and tensors; paths become absolute.

    Raises:
        ValueError: a value that does not travel; names the argument.
    """
    tensors: dict[str, torch.Tensor] = {}

    def pack(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [pack(name, each) for each in value]
        if isinstance(value, Mapping):  # JSON's keys are texts
            return {"pairs": [[pack(name, key), pack(name, each)] for key, each in value.items()]}
        if isinstance(value, Path) or (isinstance(value, str) and name in _PATHS):
            return str(Path(value).absolute())
        if name in _IMAGES and value is not None:
            value = torch.from_numpy(np.array(read_image(value, name)))
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, (np.generic, np.ndarray)):
            return value.tolist()
        if value is not None and not isinstance(value, (str, int, float)):
            raise ValueError(f"{name} holds a {type(value).__name__}, which does not travel to ranks with gpus=")
        return value

    fields = {name: pack(name, value) for name, value in arguments.items() if name != "checkpoint"}
    if (checkpoint := arguments.get("checkpoint")) is not None:
        fields["checkpoint"] = _pack_checkpoint(checkpoint)
    return fields, tensors


def unpack_arguments(fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The inverse of ``pack_arguments``."""

    def unpack(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [unpack(name, each) for each in value]
        if isinstance(value, dict) and "pairs" in value:
            return {key: unpack(name, each) for key, each in value["pairs"]}
        if isinstance(value, dict):
            tensor = tensors[value["tensor"]]
            return tensor.numpy() if name in _IMAGES else tensor
        return value

    found = {name: unpack(name, value) for name, value in fields.items() if name != "checkpoint"}
    if "checkpoint" in fields:
        found["checkpoint"] = Checkpoint(**{**fields["checkpoint"], "folder": Path(fields["checkpoint"]["folder"])})
    return found


def _pack_checkpoint(checkpoint: str | Path | Checkpoint) -> dict[str, Any]:
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(Path(checkpoint))
    if checkpoint.receipts is not None:
        raise ValueError("checkpoint: receipts is a function, which does not travel to ranks with gpus=; leave it out")
    fields = {name: getattr(checkpoint, name) for name in ("every", "keep_latents")}
    return {**fields, "folder": str(checkpoint.folder.absolute()), "notes": dict(checkpoint.notes)}


def pack_scheduler(scheduler: Any) -> dict[str, str]:
    """A sampler of diffusers as its name and config. Raises ValueError: it is none of diffusers."""
    import diffusers

    name = type(scheduler).__name__
    if getattr(diffusers, name, None) is not type(scheduler):
        raise ValueError(f"scheduler is a {name}, which is none of diffusers': its code does not travel to ranks")
    return {"name": name, "config": scheduler.to_json_string()}


def unpack_scheduler(found: Mapping[str, str]) -> Any:
    """The inverse of ``pack_scheduler``."""
    import diffusers

    return getattr(diffusers, found["name"]).from_config(json.loads(found["config"]))


def pack_chunk(chunk: Chunk) -> Message:
    """A chunk as JSON and tensors."""
    frames, kind = chunk.frames, "pt"
    if isinstance(frames, list):
        frames, kind = np.stack([np.asarray(image) for image in frames]), "pil"
    if isinstance(frames, np.ndarray):
        frames, kind = torch.from_numpy(frames), "np" if kind == "pt" else kind
    fields = {name: getattr(chunk, name) for name in ("block", "start_frame", "video")}
    tensors = {"latents": chunk.latents} if frames is None else {"latents": chunk.latents, "frames": frames}
    return {**fields, "frames": kind, "progress": asdict(chunk.progress)}, tensors


def unpack_chunk(fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Chunk:
    """The inverse of ``pack_chunk``; tensors are on the CPU."""
    frames: Any = tensors.get("frames")
    if frames is not None and fields["frames"] != "pt":
        frames = frames.numpy()
        if fields["frames"] == "pil":
            from PIL import Image

            frames = [Image.fromarray(frame) for frame in frames]
    progress = Progress(**fields["progress"])
    return Chunk(fields["block"], fields["start_frame"], frames, tensors["latents"], progress, fields["video"])


def pack_stats(stats: RunStats | None) -> dict[str, Any] | None:
    """Statistics as JSON values."""
    if stats is None:
        return None
    rows = {name: [rank.to_list() for rank in getattr(stats, name)] for name in ("ranks", "decoders")}
    return {**asdict(stats), **rows}


def unpack_stats(found: Mapping[str, Any] | None) -> RunStats | None:
    """The inverse of ``pack_stats``."""
    if found is None:
        return None
    rows = {name: tuple(map(RankStats.from_list, found[name])) for name in ("ranks", "decoders")}
    return RunStats(**{**found, **rows})


def pack_refusal(error: Exception) -> dict[str, str]:
    """An error as its kind and its text."""
    kind = next((each for each in _REFUSALS if isinstance(error, each)), RuntimeError)
    return {"error": kind.__name__, "text": str(error)}


def unpack_refusal(found: Mapping[str, str]) -> Exception:
    """The error to raise in the parent."""
    kind = next(each for each in _REFUSALS if each.__name__ == found["error"])
    return kind(found["text"])
