"""``--resume``: the job that a folder's last snapshot was written by, on the machine that is there now."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dualparal.cli.flags import ModelFlags, OutputFlags, PlaceFlags
from dualparal.cli.job import Job, salted
from dualparal.cli.place import choose_device, choose_threads, count_stages, parse_layers
from dualparal.io.receipts import read_receipts

if TYPE_CHECKING:
    from dualparal.checkpoint.snapshot import Snapshot

logger = logging.getLogger("dualparal")

# All other flags decide latents, or where frames go: the snapshot has them, and fingerprints of files.
_MAY_CHANGE = {
    "resume", "timeline", "overwrite", "gpus", "stages", "layers_per_stage", "device", "threads", "depth", "graphs",
    "checkpoint_every", "decoder", "vae_dtype", "decode_gpus", "decode_in_place",
    "heartbeat_limit", "progress_limit", "startup_limit", "grace",
    "sequence_parallel", "sequence_parallel_form",
    "lora", "transformer",
}  # fmt: skip
# Fields of a job that follow from these flags, from the machine, or from where the command is called.
_MAY_DIFFER = {
    "resume", "restartable", "checkpoint", "timeline", "overwrite", "threads", "checkpoint_every", "stages", "device",
    "layers_per_stage", "text_encoder_device", "depth", "graphs", "decoder", "vae_dtype", "decode_ranks",
    "decode_in_place", "sequence_parallel", "sequence_parallel_form",
}  # fmt: skip
# Fields of a job whose flag has another name.
_FLAGS = {"texts": "prompt", "videos": "prompt", "outs": "out", "num_inference_steps": "steps"}
_PLANNED = {"max_blocks_in_flight", "context_version"}


def resumed_job(call: typer.Context, folder: Path, model: ModelFlags, place: PlaceFlags, output: OutputFlags) -> Job:
    """The job of a folder's last snapshot.

    Args:
        call: typer's context, which knows the flags that were typed.
        folder: the snapshots' folder.
        model, place, output: of these flags, those in ``_MAY_CHANGE`` are heeded.

    Raises:
        ValueError: flags that cannot be changed.
        SnapshotError: a folder that cannot be used.
    """
    from dualparal.checkpoint.snapshot import newest
    from dualparal.io.output import check_file

    check_file(folder, "--resume", overwrite=True, folder=True)
    asked = _typed(call)
    fixed = [parameter.opts[0] for parameter in call.command.params if parameter.name in asked - _MAY_CHANGE]
    if fixed:
        flags = ", ".join(fixed)
        raise ValueError(f"--resume {folder} with {flags}: the snapshot says that already; leave it out")
    return _going_on(newest(folder).snapshot, asked, folder, model, place, output)


def started_or_resumed(
    call: typer.Context, job: Job, planned: bool, model: ModelFlags, place: PlaceFlags, output: OutputFlags
) -> Job:
    """The job of ``--resume-or-start``: as it is where its folder has no snapshot, else that of the last snapshot.

    Args:
        call: typer's context.
        job: of the flags.
        planned: layers, blocks in flight and who decodes are the planner's choice.
        model, place, output: the flags.

    Raises:
        ValueError: flags that are not those of the run in the folder.
        SnapshotError: a folder that cannot be used.
    """
    from dualparal.checkpoint.snapshot import has_snapshots, newest

    folder = job.checkpoint
    assert folder is not None
    if not has_snapshots(folder):
        return job
    found, typed = newest(folder).snapshot, _typed(call)
    kept = _going_on(found, typed & _MAY_CHANGE, folder, model, place, output)
    texts = salted(job.prompts, job.negative_prompt, kept.texts.partition(":")[0])
    begun, now = _decisive(kept), _decisive(replace(job, texts=texts))
    for name in ("latents_in", "image", "last_image", "continue_from"):  # which are not read again
        begun[name] = found.run["notes"].get(name)
    different = {name for name in now if now[name] != begun.get(name) and not (planned and name in _PLANNED)}
    if len(different) > 1 and "refresh_every" not in typed:
        different.discard("refresh_every")  # it follows from others
    if different:
        flags = sorted({"--" + _FLAGS.get(name, name).replace("_", "-") for name in different})
        raise ValueError(
            f"--resume-or-start {folder}: the run there was begun with other values of {', '.join(flags)}; use "
            "another folder for another run"
        )
    return kept


def _decisive(job: Job) -> dict[str, Any]:
    """The values of a job that must be the same in a command that comes again, by name."""
    notes = job.notes()
    engine, video = notes.pop("engine"), notes.pop("video")
    blocks = engine.pop("blocks")
    return {name: value for name, value in {**notes, **engine, **video, **blocks}.items() if name not in _MAY_DIFFER}


def _typed(call: typer.Context) -> set[str]:
    """Names of the flags that were typed."""
    sources = {name: call.get_parameter_source(name) for name in call.params}
    # By name: typer may have its own copy of click.
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _going_on(
    found: Snapshot, asked: set[str], folder: Path, model: ModelFlags, place: PlaceFlags, output: OutputFlags
) -> Job:
    """The job of a snapshot, on the machine that is there now. Raises ValueError, SnapshotError."""
    from dualparal.checkpoint.snapshot import SnapshotError

    notes = found.run.get("notes")
    if not isinstance(notes, dict) or not notes:
        raise SnapshotError(f"--resume {folder}: the run was not one of 'dualparal generate'; use Engine.resume")
    try:
        receipts = tuple(read_receipts(video) for video in found.receipts or [[]] * len(found.prompts))
        if len(receipts) != len(found.prompts) or len({len(each) for each in receipts}) != 1:
            raise TypeError("receipts of other videos")
        job = _elsewhere(Job.of_notes(notes), asked, folder, model, place, output)
        return replace(job, end=found.end, receipts=receipts, restartable=output.resume_or_start is not None)
    except (KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"--resume {folder}: the snapshot does not describe a run ({error!r})") from None


def _elsewhere(
    job: Job, asked: set[str], folder: Path, model: ModelFlags, place: PlaceFlags, output: OutputFlags
) -> Job:
    """The job of a snapshot, with what the flags say of the machine. Raises ValueError.

    Args:
        asked: names of the flags that were typed.
        folder: the snapshots' folder, which may have been moved since.
    """
    split = parse_layers(place.layers_per_stage)
    stages = len(split) if split else job.stages
    places = place.sequence_parallel if "sequence_parallel" in asked else job.engine.sequence_parallel
    form = place.sequence_parallel_form if "sequence_parallel_form" in asked else job.engine.sequence_parallel_form
    decoders, in_place = job.engine.decode_ranks, job.engine.decode_in_place
    if asked & {"decode_gpus", "decode_in_place"}:
        decoders, in_place = place.decode_gpus, place.decode_in_place
    elif place.gpus is not None and place.gpus <= decoders:
        logger.warning("--gpus %d: too few for the %d that only decoded; all of them have stages", place.gpus, decoders)
        decoders = 0
    count = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else place.gpus
    if count is not None and "sequence_parallel" not in asked and (count - decoders) % places:
        logger.warning("%d processes for stages: stages of %d are not shared any more", count - decoders, places)
        places = 1
    if "decode_gpus" in asked and not asked & {"gpus", "stages", "layers_per_stage"} and job.device == "cuda":
        stages = max(1, (job.ranks - decoders) // places)  # the cards stay as many
    if asked & {"gpus", "stages"} or "RANK" in os.environ:
        stages = count_stages(place.gpus, place.stages, place.device, decoders, places)
    same = stages == job.stages and places == job.engine.sequence_parallel
    engine = replace(
        job.engine,
        stages=stages,
        transformers=model.transformers if "transformer" in asked else job.engine.transformers,
        loras=model.loras if "lora" in asked else job.engine.loras,
        layers_per_stage=job.engine.layers_per_stage if split is None and stages == job.stages else split,
        device=choose_device(place.device or job.device, place.gpus),
        decoder=job.engine.decoder if model.decoder is None else str(model.decoder),
        vae_dtype=model.vae_dtype if "vae_dtype" in asked else job.engine.vae_dtype,
        decode_ranks=decoders,
        decode_in_place=in_place,
        sequence_parallel=places,
        sequence_parallel_form=form,
        **{name: getattr(place, name) for name in asked & {"depth", "graphs"}},
    )
    return replace(
        job,
        engine=engine,
        threads=choose_threads(
            place.threads or (job.threads if same else 0), stages * places + decoders, job.model, engine.transformers
        ),
        checkpoint=folder,
        checkpoint_every=output.checkpoint_every if "checkpoint_every" in asked else job.checkpoint_every,
        timeline=output.timeline,
        overwrite=output.overwrite,
    )
