"""Everything about a job that can be known without torch, before any rank starts; the ranks check the rest."""

from __future__ import annotations

import math
import os
from pathlib import Path

from dualparal.cli.job import Job, check_sampler
from dualparal.config.decoding import row_ranges
from dualparal.models.folder import folder_of
from dualparal.models.json_files import ModelError
from dualparal.models.registry import family_in
from dualparal.planning.workload import Workload
from dualparal.schedule.layout import split_layers


def check_job(job: Job) -> None:
    """Checks a job before work starts.

    Raises:
        ValueError: a mistake of the user's, in one line.
    """
    from dualparal.io.output import check_file, check_out

    for out in job.outs:
        check_out(out, job.overwrite, job.resume)
    if job.checkpoint is not None and not job.resume:
        from dualparal.checkpoint.snapshot import check_empty  # which imports torch

        check_file(job.checkpoint, "--checkpoint", overwrite=True, folder=True)
        check_empty(job.checkpoint)
    if not job.outs and (job.engine.decode_ranks or job.engine.decode_in_place):
        flag = "--decode-in-place" if job.engine.decode_in_place else f"--decode-gpus {job.engine.decode_ranks}"
        raise ValueError(f"{flag} without --out: latents are all that is made, and nothing is decoded; leave it out")
    if job.checkpoint is None and job.checkpoint_every is not None:
        raise ValueError("--checkpoint-every without --checkpoint: say in which folder")
    if job.latents_out is not None:
        check_file(job.latents_out, "--latents-out", job.overwrite)
        for out in job.outs:
            if out.resolve() in (job.latents_out.resolve(), *job.latents_out.resolve().parents):
                raise ValueError(f"--latents-out {job.latents_out} lies where --out {out} goes; choose another place")
    if job.timeline is not None:
        _check_timeline(job.timeline, job.overwrite)
    if not 1 / 1001 <= job.fps <= 1000:
        raise ValueError(f"--fps {job.fps}: use a rate from 1/1001 to 1000; Wan's own is 16")
    for lora in job.engine.loras:
        if not Path(lora.file).is_file():
            raise ValueError(f"--lora {lora.file}: there is no such file")
    check_sampler(job.sampler)
    if job.flow_shift is not None and not 0 < job.flow_shift < math.inf:
        raise ValueError(f"--flow-shift {job.flow_shift}: use a number above 0, such as 3.0 (480p) or 5.0 (720p)")
    if job.device == "cuda":
        import torch

        here = int(os.environ.get("LOCAL_WORLD_SIZE", job.ranks)) if "RANK" in os.environ else job.ranks
        if here > torch.cuda.device_count():
            raise ValueError(f"--gpus {here}: torch sees {torch.cuda.device_count()}; every rank needs its own")
    _check_sizes(job, folder_of(job.model))  # had from the hub before several ranks ask for it


def _check_sizes(job: Job, model: Path) -> None:
    """Checks what the model's configs alone can tell, within a second. Raises ValueError."""
    try:
        sizes = family_in(model).sizes(model)
    except ModelError:
        return  # nothing is known of it here; who loads it says what is wrong
    work = Workload(sizes, job.video, job.engine, len(job.prompts))
    split_layers(sizes.num_layers, job.stages, job.engine.layers_per_stage)
    job.engine.attention_8bit.check(sizes.num_layers)
    job.engine.attention_8bit.check_steps(job.video.num_inference_steps)
    job.engine.linear_8bit.check(sizes.num_layers)
    if job.outs and (job.engine.decode_ranks or job.engine.decode_in_place):
        row_ranges(work.rows, job.engine.decode_ranks or job.stages)
    work.schedule(job.stages)


def _check_timeline(path: Path, overwrite: bool) -> None:
    """Checks that the trace, its picture and its parts can be written. Raises ValueError."""
    from dualparal.io.output import check_file
    from dualparal.trace.picture import check_matplotlib, picture_of
    from dualparal.trace.timeline import check_name, parts_of

    check_matplotlib()
    check_name(path)
    for file in (path, picture_of(path), parts_of(path)):
        check_file(file, "--timeline", overwrite, folder=file == parts_of(path))
