"""``--resume``: the job that a folder's last snapshot was written by, on the machine that is there now."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import typer

from dualparal.cli.flags import ModelFlags, OutputFlags, PlaceFlags
from dualparal.cli.job import Job
from dualparal.cli.place import choose_device, choose_threads, count_stages, parse_layers

logger = logging.getLogger("dualparal")

# All other flags decide latents, or where frames go: the snapshot has them, and fingerprints of decoder and LoRAs.
_MAY_CHANGE = {
    "resume", "timeline", "overwrite", "gpus", "stages", "layers_per_stage", "device", "threads", "depth", "graphs",
    "checkpoint_every", "decoder", "vae_dtype", "decode_gpus", "decode_in_place",
    "lora",
}  # fmt: skip


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
    from dualparal.checkpoint.snapshot import SnapshotError, newest
    from dualparal.io.output import check_file

    check_file(folder, "--resume", overwrite=True, folder=True)
    sources = {name: call.get_parameter_source(name) for name in call.params}
    # By name: typer may have its own copy of click.
    asked = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    fixed = [parameter.opts[0] for parameter in call.command.params if parameter.name in asked - _MAY_CHANGE]
    if fixed:
        flags = ", ".join(fixed)
        raise ValueError(f"--resume {folder} with {flags}: the snapshot says that already; leave it out")
    notes = newest(folder).snapshot.run.get("notes")
    if not isinstance(notes, dict) or not notes:
        raise SnapshotError(f"--resume {folder}: the run was not one of 'dualparal generate'; use Engine.resume")
    try:
        return _elsewhere(Job.of_notes(notes), asked, folder, model, place, output)
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
    decoders, in_place = job.engine.decode_ranks, job.engine.decode_in_place
    if asked & {"decode_gpus", "decode_in_place"}:
        decoders, in_place = place.decode_gpus, place.decode_in_place
    elif place.gpus is not None and place.gpus <= decoders:
        logger.warning("--gpus %d: too few for the %d that only decoded; all of them have stages", place.gpus, decoders)
        decoders = 0
    if "decode_gpus" in asked and not asked & {"gpus", "stages", "layers_per_stage"} and job.device == "cuda":
        stages = max(1, job.ranks - decoders)  # the cards stay as many
    if asked & {"gpus", "stages"} or "RANK" in os.environ:
        stages = count_stages(place.gpus, place.stages, place.device, decoders)
    same = stages == job.stages
    engine = replace(
        job.engine,
        stages=stages,
        loras=model.loras if "lora" in asked else job.engine.loras,
        layers_per_stage=job.engine.layers_per_stage if split is None and same else split,
        device=choose_device(place.device or job.device, place.gpus),
        decoder=job.engine.decoder if model.decoder is None else str(model.decoder),
        vae_dtype=model.vae_dtype if "vae_dtype" in asked else job.engine.vae_dtype,
        decode_ranks=decoders,
        decode_in_place=in_place,
        **{name: getattr(place, name) for name in asked & {"depth", "graphs"}},
    )
    return replace(
        job,
        engine=engine,
        threads=choose_threads(place.threads or (job.threads if same else 0), stages + decoders),
        checkpoint=folder,
        checkpoint_every=output.checkpoint_every if "checkpoint_every" in asked else job.checkpoint_every,
        timeline=output.timeline,
        overwrite=output.overwrite,
    )
