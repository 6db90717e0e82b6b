"""Everything about a job that can be known without torch, before any rank starts; the ranks check the rest."""

from __future__ import annotations

import math
import os
from pathlib import Path

from dualparal.cli.job import Job, check_sampler
from dualparal.config.decoding import row_ranges
from dualparal.config.images import check_images
from dualparal.models.folder import folder_of
from dualparal.models.json_files import ModelError
from dualparal.models.registry import folder_sizes
from dualparal.planning.workload import Workload
from dualparal.schedule.layout import check_heads, split_layers


def check_job(job: Job) -> None:
    """Checks a job before work starts.

    Raises:
        ValueError: a mistake of the user's, in one line.
    """
    from dualparal.io.output import check_file, check_out

    finished = False
    if job.end:
        from dualparal.checkpoint.snapshot import FINISHED, JOINED  # which imports torch

        if job.end == JOINED:
            return
        finished = job.end == FINISHED
    for out in job.outs:
        check_out(out, job.overwrite, job.resume)
    if job.resume:
        _check_kept(job)
    elif job.checkpoint is not None:
        from dualparal.checkpoint.snapshot import check_empty

        check_file(job.checkpoint, "--checkpoint", overwrite=True, folder=True)
        check_empty(job.checkpoint)
    if not job.outs and (job.engine.decode_ranks or job.engine.decode_in_place):
        flag = "--decode-in-place" if job.engine.decode_in_place else f"--decode-gpus {job.engine.decode_ranks}"
        raise ValueError(f"{flag} without --out: latents are all that is made, and nothing is decoded; leave it out")
    if job.checkpoint is None and job.checkpoint_every is not None:
        raise ValueError("--checkpoint-every without --checkpoint: say in which folder")
    if job.latents_out is not None:
        # Where all blocks are finished it may be there already: it is looked at when it is to be written.
        check_file(job.latents_out, "--latents-out", job.overwrite or finished)
        for out in job.outs:
            if out.resolve() in (job.latents_out.resolve(), *job.latents_out.resolve().parents):
                raise ValueError(f"--latents-out {job.latents_out} lies where --out {out} goes; choose another place")
    if job.timeline is not None:
        _check_timeline(job.timeline, job.overwrite or job.restartable)  # an earlier try's
    if not 1 / 1001 <= job.fps <= 1000:
        raise ValueError(f"--fps {job.fps}: use a rate from 1/1001 to 1000; Wan's own is 16")
    for lora in job.engine.loras:
        if not os.path.isfile(lora.file):
            raise ValueError(f"--lora {lora.file}: there is no such file")
    for flag, image in (("--image", job.image), ("--last-image", job.last_image)):
        if image is not None:
            from dualparal.io.images import read_image  # and with it PIL

            read_image(image, flag)
    if job.continue_from is not None:
        from dualparal.io.clips import probe_clip  # and with it numpy

        probe_clip(job.continue_from)
    for file in job.engine.transformers:
        if not os.path.exists(file.file):  # unlike Path's, of names that no file can have, too
            raise ValueError(f"--transformer {file.file}: there is no such file")
    check_sampler(job.sampler)
    if job.latents_in is not None:
        from dualparal.io.latents import check_latents

        check_latents(job.latents_in)
    if job.flow_shift is not None and not 0 < job.flow_shift < math.inf:
        raise ValueError(f"--flow-shift {job.flow_shift}: use a number above 0, such as 3.0 (480p) or 5.0 (720p)")
    if job.device == "cuda":
        import torch

        here = int(os.environ.get("LOCAL_WORLD_SIZE", job.ranks)) if "RANK" in os.environ else job.ranks
        if here > torch.cuda.device_count():
            raise ValueError(f"--gpus {here}: torch sees {torch.cuda.device_count()}; every rank needs its own")
    _check_sizes(job, folder_of(job.model, job.engine.transformers))  # had from the hub before several ranks ask for it


def _check_sizes(job: Job, model: Path) -> None:
    """Checks what the model's configs alone can tell, within a second. Raises ValueError."""
    try:
        sizes = folder_sizes(model)
    except ModelError:
        return  # nothing is known of it here; who loads it says what is wrong
    if job.engine.transformers:
        sizes = folder_sizes(model, job.engine.transformers)
    work = Workload(sizes, job.video, job.engine, len(job.prompts))
    if not job.resume:
        check_images(sizes.image_counts, job.image is not None, job.last_image is not None, job.video.num_frames)
    split_layers(sizes.num_layers, job.stages, job.engine.layers_per_stage)
    check_heads(work.heads, work.places)
    work.layout.check_places(work.tokens, work.places)
    job.engine.attention_8bit.check(sizes.num_layers)
    job.engine.attention_8bit.check_steps(len(work.steps.runs))
    job.engine.linear_8bit.check(sizes.num_layers)
    if job.outs and (job.engine.decode_ranks or job.engine.decode_in_place):
        row_ranges(work.rows, job.engine.decode_ranks or job.stages)
    work.schedule(job.stages)


def _check_kept(job: Job) -> None:
    """Checks what a run that is gone on with has left, before work begins.

    Raises:
        ValueError: a segment is missing or was changed, and so were the latents from which it could be made again;
            ``SnapshotError``: latents that are damaged, or another run's.
    """
    from dualparal.checkpoint.snapshot import SnapshotError, check_blocks, newest, read_blocks
    from dualparal.io.output import missing_blocks

    assert job.checkpoint is not None
    found = newest(job.checkpoint).snapshot
    check_blocks(found, job.checkpoint, len(job.receipts[0]))
    for video, (out, receipts) in enumerate(zip(job.outs, job.receipts, strict=bool(job.outs))):
        missing = missing_blocks(out, receipts)
        try:
            for block in range(max(missing, default=-1) + 1):
                read_blocks(job.checkpoint, found.id, video, range(block, block + 1))
        except SnapshotError as error:
            raise ValueError(
                f"--out {out}: what block {missing[0]} became is missing or was changed, and cannot be made again: "
                f"{error}"
            ) from None


def _check_timeline(path: Path, overwrite: bool) -> None:
    """Checks that the trace, its picture and its parts can be written. Raises ValueError."""
    from dualparal.io.output import check_file
    from dualparal.trace.picture import picture_of
    from dualparal.trace.timeline import check_name, parts_of

    check_name(path)
    for file in (path, picture_of(path), parts_of(path)):
        check_file(file, "--timeline", overwrite, folder=file == parts_of(path))
