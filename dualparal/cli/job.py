"""What ``dualparal generate`` was asked for, as a value: checked, kept in snapshots, made into an engine and a call."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from dualparal.cli.progress import Display
from dualparal.config.blocks import BlockConfig
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.config.video import VideoConfig
from dualparal.schedule.layout import split_layers

_SAMPLERS = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}


@dataclass(frozen=True)
class Job:
    """What ``generate`` was asked for."""

    prompts: list[dict[int, str]]  # of each video
    negative_prompt: str | None
    video: VideoConfig
    blocks: BlockConfig
    model: str
    stages: int
    layers_per_stage: list[int] | None
    device: str
    dtype: str | None
    depth: int
    graphs: bool
    attention_8bit: EightBitPolicy
    threads: int
    sampler: str | None
    flow_shift: float | None
    outs: list[Path]  # of each video; empty: no frames are written
    fps: float
    keep_blocks: bool
    latents_in: Path | None
    latents_out: Path | None
    timeline: Path | None
    overwrite: bool
    checkpoint: Path | None
    checkpoint_every: int | None
    resume: bool = False  # from ``checkpoint``
    allow_nonfinite: bool = False

    def notes(self) -> dict[str, Any]:
        """What a snapshot keeps of it: JSON values, and no prompt."""
        found = asdict(self)
        del found["prompts"], found["negative_prompt"]
        notes: dict[str, Any] = json.loads(json.dumps({**found, "videos": len(self.prompts)}, default=str))
        return notes

    @classmethod
    def resumed(cls, notes: dict[str, Any], changes: dict[str, Any]) -> Job:
        """The job that left ``notes`` in a snapshot, with changes."""
        found = {**notes, **changes}
        eight_bit = found["attention_8bit"]
        paths = {name: found[name] and Path(found[name]) for name in ("latents_out", "timeline", "checkpoint")}
        rest: dict[str, Any] = {
            "prompts": [{}] * found.pop("videos"),
            "negative_prompt": None,
            "video": VideoConfig(**found["video"]),
            "blocks": BlockConfig(**found["blocks"]),
            "attention_8bit": EightBitPolicy(**{**eight_bit, "keep_layers": tuple(eight_bit["keep_layers"])}),
            "outs": [Path(out) for out in found["outs"]],
            "latents_in": None,
            "resume": True,
        }
        return cls(**{**found, **paths, **rest})


def make_engine(job: Job, stages: int | None, report: Callable[..., None] | None = None) -> Any:
    from dualparal.engine.engine import Engine

    engine = Engine.from_pretrained(
        job.model,
        frames_per_block=job.blocks.frames_per_block,
        context_frames=job.blocks.context_frames,
        context=job.blocks.context,
        max_blocks_in_flight=job.blocks.max_blocks_in_flight,
        context_version=job.blocks.context_version,
        refresh_every=job.blocks.refresh_every,
        stages=stages,
        layers_per_stage=job.layers_per_stage,
        device=job.device,
        dtype=job.dtype,
        depth=job.depth,
        graphs=job.graphs,
        attention_8bit=job.attention_8bit,
        report=report,
        allow_nonfinite=job.allow_nonfinite,
    )
    if job.sampler is not None or job.flow_shift is not None:
        engine.scheduler = _sampler(engine.scheduler, job)
    return engine


def _sampler(current: Any, job: Job) -> Any:
    import diffusers

    if job.sampler is not None and job.sampler not in _SAMPLERS:
        raise ValueError(f"--sampler {job.sampler}: use one of {', '.join(_SAMPLERS)}")
    kind = getattr(diffusers, _SAMPLERS[job.sampler]) if job.sampler else type(current)
    options: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    shift = current.config.get("flow_shift", current.config.get("shift")) if job.flow_shift is None else job.flow_shift
    options["shift" if kind.__name__.startswith("FlowMatch") else "flow_shift"] = shift
    return kind.from_config(current.config, **options)


def check(job: Job) -> None:
    """Everything that can be known before work starts; ValueError for the user's mistakes."""
    from dualparal.checkpoint.snapshot import check_empty
    from dualparal.io.latents import read_latents
    from dualparal.io.output import check_file, check_out
    from dualparal.models.source import resolve_model

    for out in job.outs:
        check_out(out, job.overwrite, job.resume)
    if job.checkpoint is not None and not job.resume:
        check_file(job.checkpoint, "--checkpoint", overwrite=True, folder=True)
        check_empty(job.checkpoint)
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
    if job.flow_shift is not None and not 0 < job.flow_shift < math.inf:
        raise ValueError(f"--flow-shift {job.flow_shift}: use a number above 0, such as 3.0 (480p) or 5.0 (720p)")
    if job.device == "cuda":
        import torch

        if job.stages > torch.cuda.device_count():
            raise ValueError(f"--gpus {job.stages}: torch sees {torch.cuda.device_count()}; every stage needs its own")
    files = resolve_model(job.model)
    job.video.num_latents(files.spec.temporal_factor)
    split_layers(files.spec.num_layers, job.stages, job.layers_per_stage)
    files.check_weights()
    if "RANK" not in os.environ and job.stages > 1:
        # The ranks check again, each for itself; here the user hears of it once, before any of them starts.
        engine = make_engine(job, job.stages)
        if job.resume:
            engine.resume(checkpoint_of(job))
            return
        latents = None if job.latents_in is None else read_latents(job.latents_in)
        engine.stream(prompt=job.prompts, latents=latents, **call_arguments(job))


def _check_timeline(path: Path, overwrite: bool) -> None:
    from dualparal.io.output import check_file
    from dualparal.trace.picture import check_matplotlib, picture_of
    from dualparal.trace.timeline import check_name, parts_of

    check_matplotlib()
    check_name(path)
    for file in (path, picture_of(path), parts_of(path)):
        check_file(file, "--timeline", overwrite, folder=file == parts_of(path))


def checkpoint_of(job: Job) -> Any:
    from dualparal.checkpoint.checkpointer import Checkpoint

    if job.checkpoint is None:
        return None
    return Checkpoint(job.checkpoint, job.checkpoint_every, job.notes(), keep_latents=job.latents_out is not None)


def call_arguments(job: Job) -> dict[str, Any]:
    video = job.video
    return {
        "negative_prompt": job.negative_prompt,
        "height": video.height,
        "width": video.width,
        "num_frames": video.num_frames,
        "num_inference_steps": video.num_inference_steps,
        "guidance_scale": video.guidance_scale,
        "guidance_scale_2": video.guidance_scale_2,
        "seed": video.seed,
        "output_type": video.output_type,
        "keeps": None if job.latents_out is None else "latents",
    }


def resume_command(job: Job) -> str | None:
    """What goes on from the snapshots of a job, if there are any."""
    if job.checkpoint is None or not any(job.checkpoint.glob("snapshot-*")):
        return None
    return f"dualparal generate --resume {shlex.quote(str(job.checkpoint))}"


def say_how_to_resume(job: Job) -> None:
    command = resume_command(job)
    if command is not None:
        typer.echo(f"resume with: {command}", err=True)


def error_file(job: Job) -> Path:
    """Where a failure is told in JSON: beside the first output."""
    first = next(path for path in (*job.outs, job.latents_out) if path is not None)
    return first.with_name(first.name + ".error.json")


def display_of(job: Job) -> Display:
    frames = job.video.num_frames
    return Display(None if frames is None else frames * len(job.prompts))
