"""Refuses a request that cannot fit, by the numbers of the cost model, before anything of its size is allocated."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from dualparal.config.units import GIB
from dualparal.config.video import OutputType
from dualparal.engine.parts import Parts
from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.models.files import ModelFiles
from dualparal.planning.memory import slice_bytes, stage_memory
from dualparal.planning.workload import Workload

ResultKind = Literal["frames", "latents"]
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class TooLarge(ValueError):
    """A request whose estimate exceeds the memory there is; names both."""


class Loaded(NamedTuple):
    """Bytes of the parts of the model that are in memory already, by the numbers of the cost model.

    Attributes:
        weights: of layers and of what decodes.
        encoder: of the text encoder, which a run drops before it builds anything else.
    """

    weights: int = 0
    encoder: int = 0

    @classmethod
    def of(cls, work: Workload, split: Sequence[int], parts: Parts) -> Loaded:
        """Counts what earlier runs have left in ``parts``, as far as this one needs it."""
        model = work.model
        slices = sum(model.experts * slice_bytes(work, split, stage) for stage in parts.slices)
        decoder = work.decode_itemsize * work.decoder.parameters if parts.has_decoder and work.decode else 0
        return cls(slices + decoder, model.text_encoder * work.itemsize if parts.encoder.loaded else 0)


def check(
    work: Workload,
    split: Sequence[int],
    owned: Sequence[int],
    device: torch.device,
    encodes: bool = True,
    held: int = 0,
    loaded: Loaded | None = None,
) -> None:
    """Compares the need of the stages of this process with the memory there is.

    On a card that is what nobody uses, and what is ``loaded``. On the CPU it is all of the host's, and the stages of
    all processes on this machine count. The estimate leaves out what libraries take, so a request that passes may
    still not fit.

    Args:
        work: the request as the cost model counts it.
        split: number of layers of each stage of the run.
        owned: stages of this process.
        device: this process's.
        encodes: the text encoder is needed; it is gone before the weights are loaded.
        held: bytes of the result besides, where it is kept whole; they count on the CPU.
        loaded: what is on the card from earlier runs; it is part of the need, and counts there.

    Raises:
        TooLarge: it cannot fit.
    """
    schedule = work.schedule(len(split))
    on_host = device.type != "cuda"
    together = range(len(split)) if on_host and _on_one_machine() else owned
    memory = [stage_memory(work, schedule, split, stage) for stage in together]
    need = sum(stage.running for stage in memory) + held * on_host
    here = Loaded() if on_host or loaded is None else loaded
    if encodes:
        need = max(need, *(stage.before + here.weights for stage in memory))
    have = host_memory() if on_host else card_memory(device) + sum(here)
    if need > have and not on_host:
        gc.collect()  # an earlier run's tensors may hang in circles of references
        have = card_memory(device) + sum(here)
    if need > have:
        video, blocks = work.video, work.blocks
        kept = f", {held / GIB:.1f} GiB of them for the result, which is kept whole" if held and on_host else ""
        count = f"{work.num_videos} videos of " if work.num_videos > 1 else ""
        fewer = "fewer prompts at once, " if work.num_videos > 1 else ""
        where, of = "this machine", ""
        if not on_host:
            total = torch.cuda.get_device_properties(device).total_memory
            where, of = "the card", f" free for it, of {total / GIB:.1f} in all"
        raise TooLarge(
            f"{count}{video.num_frames} frames of {video.width}x{video.height} in blocks of "
            f"{blocks.frames_per_block} need about {need / GIB:.1f} GiB ({need} bytes{kept}), and {where} has "
            f"{have / GIB:.1f}{of}: use {fewer}a smaller picture, smaller blocks, fewer blocks in flight or more GPUs; "
            "'dualparal plan' says what fits"
        )


def check_requests(setup: Setup, parts: Parts, requests: Sequence[Request], result_kind: ResultKind | None) -> None:
    """Checks the need of a run here with ``check``. A loaded pipeline passes: it has no config files to count from.

    Args:
        setup, parts: the engine's.
        requests: those of the run, one per video.
        result_kind: the part of all chunks that the caller will have in memory at the end; None: no part.

    Raises:
        TooLarge: it cannot fit.
    """
    if not isinstance(setup.source, ModelFiles):
        return
    video, mesh = requests[0].video, setup.mesh
    work = Workload(setup.source.sizes, video, setup.config, len(requests))
    held = len(requests) * whole_bytes(work, video.output_type, result_kind) if mesh.is_leader else 0
    split = [len(layers) for layers in setup.layers]
    loaded = Loaded.of(work, split, parts)
    check(work, split, mesh.stages, mesh.device, requests[0].embeds is None, held, loaded)


def card_memory(device: torch.device) -> int:
    """Bytes of a card's memory that nobody uses: free ones, and those that torch's allocator here keeps in reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def whole_bytes(work: Workload, output_type: OutputType, result_kind: ResultKind | None) -> int:
    """Bytes of a video that is kept until its end: all of its chunks, and the one array that is made of them.

    They are 0 when nothing is kept (``result_kind`` None) or the video is endless.
    """
    video, latents = work.video, work.layout.num_latents
    if result_kind is None or video.num_frames is None or latents is None:
        return 0
    if result_kind == "latents":
        return 2 * 4 * latents * work.model.in_channels * work.pixels
    picture = 3 * video.height * video.width
    return video.num_frames * picture * {"np": 8, "pt": 8, "uint8": 2, "pil": 1, "latent": 0}[output_type]


def host_memory() -> int:
    """Bytes of memory that processes here may use: the machine's, or the container's if that is less."""
    limits = [psutil.virtual_memory().total]
    for path in map(Path, _CGROUP_LIMITS):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return min(limits)


def _on_one_machine() -> bool:
    """True when all ranks of the run are on this machine."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", ranks) == ranks
