"""Refuses a request that cannot fit, by the numbers of the cost model, before anything of its size is allocated."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch

from dualparal.config.engine import DTYPE_BYTES
from dualparal.config.units import GIB
from dualparal.config.video import OutputType
from dualparal.engine.parts import Parts
from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.engine.texts import texts_of
from dualparal.models.files import ModelFiles
from dualparal.planning.memory import place_memory, slice_bytes
from dualparal.planning.workload import Workload

ResultKind = Literal["frames", "latents"]
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class TooLarge(ValueError):
    """A request whose estimate exceeds the memory there is; names both."""


def loaded_bytes(work: Workload, split: Sequence[int], parts: Parts) -> int:
    """Bytes of layers and VAE that earlier runs have left in ``parts``, as far as a run of ``work`` needs them.

    By the numbers of the cost model.
    """
    model = work.model
    slices = sum(model.experts * slice_bytes(work, split, stage) for stage in parts.slices)
    decoder = work.decode_itemsize * work.decoder.parameters if parts.has_decoder and work.decode else 0
    return slices + decoder


def check(
    work: Workload,
    split: Sequence[int],
    owned: Sequence[int],
    device: torch.device,
    encodes: bool = True,
    held: int = 0,
    loaded: int = 0,
    shared: int = 0,
    leads: bool = True,
    beside: int = 0,
) -> None:
    """Compares the need of the stages and decoders of this process with the memory there is.

    On a card that is what nobody uses, and what is ``loaded``. On the CPU it is all of the host's, and all processes on
    this machine count. The estimate leaves out what libraries take, so a request that passes may
    still not fit.

    Args:
        work: the request as the cost model counts it.
        split: number of layers of each stage of the run.
        owned: places of this process, see ``Schedule.actions``: stages, and those that only decode.
        device: this process's.
        encodes: the text encoder is needed; it is gone before the weights are loaded.
        held: bytes of the result besides, where it is kept whole; they count on the CPU.
        loaded: bytes on the card from earlier runs (``loaded_bytes``), which are part of the need and count there.
        shared: bytes that several places here count and hold once.
        leads: of the ranks of a stage this is the first, or all of them are here.
        beside: others of each stage that are here.

    Raises:
        TooLarge: it cannot fit.
    """
    schedule = work.schedule(len(split))
    on_host = device.type != "cuda"
    together = owned
    if on_host and _on_one_machine():
        together, leads, beside = range(len(split) + schedule.decode_ranks), True, work.places - 1
    memory = [place_memory(work, schedule, split, place, leads) for place in together]
    others = [place for place in together if place < len(split)] * beside
    memory += [place_memory(work, schedule, split, place, leads=False) for place in others]
    need = sum(place.running for place in memory) + held * on_host - shared
    here = 0 if on_host else loaded
    encoding = max(place.before + here for place in memory) if encodes else 0
    encoder = "text_encoder_device='cpu', " if encoding > need and not on_host else ""
    need = max(need, encoding)
    have = host_memory() if on_host else card_memory(device) + here
    if need > have and not on_host:
        gc.collect()  # an earlier run's tensors may hang in circles of references
        have = card_memory(device) + here
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
            f"{have / GIB:.1f}{of}: use {encoder}{fewer}a smaller picture, smaller blocks, fewer blocks in flight or "
            "more GPUs; 'dualparal plan' says what fits"
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
    encodes = parts.texts.new(texts_of(requests))
    if encodes and mesh.is_leader and setup.config.encodes_elsewhere:
        check_text_encoder(setup)
    loaded, place = loaded_bytes(work, split, parts), mesh.schedule_place
    if mesh.distributed:
        own = mesh.stages.start if place is None else place
        check(work, split, [own], mesh.device, encodes, held, loaded, leads=place is not None)
        return
    schedule, beside = work.schedule(mesh.num_stages), mesh.places - 1
    shared = max(0, len(schedule.decoders) - 1) * work.decode_itemsize * work.decoder.parameters
    shared += beside * work.model.experts * sum(slice_bytes(work, split, stage) for stage in mesh.stages)
    places = range(mesh.num_stages + schedule.decode_ranks)
    check(work, split, places, mesh.device, encodes, held, loaded, shared, beside=beside)


def check_text_encoder(setup: Setup) -> None:
    """Checks that the text encoder fits into the host's memory beside all that is there. Loaded pipelines pass.

    Raises:
        TooLarge: it does not.
    """
    if not isinstance(setup.source, ModelFiles) or setup.config.dtype is None:
        return
    need = setup.source.sizes.text_encoder * DTYPE_BYTES[setup.config.dtype]
    have = min(psutil.virtual_memory().available, host_memory() - psutil.Process().memory_info().rss)
    if need > have:
        raise TooLarge(
            f"the text encoder needs about {need / GIB:.1f} GiB on the CPU ({need} bytes), where "
            f"{max(0, have) / GIB:.1f} are free: give all prompts when the video begins, "
            "{first frame: text}, or their embeddings"
        )


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
