"""The job of ``dualparal generate`` as a value: checked, kept in snapshots, made into an engine and a call."""

from __future__ import annotations

import hashlib
import json
import secrets
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dualparal.cli.progress import Display
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.io.receipts import Receipts

if TYPE_CHECKING:
    from dualparal.engine.engine import Engine

_SAMPLERS = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "FlowMatchLCMScheduler",
}


@dataclass(frozen=True)
class Job:
    """Everything that one ``dualparal generate`` was asked for.

    Attributes:
        prompts: for each video, first frame -> text.
        image, last_image: files of the first and the last frame, for models that take them.
        continue_from: a file that the videos go on from.
        video: the request; its seed is the first video's.
        engine: with a device and a number of stages.
        model: a directory in diffusers format, a hub id, or the name of the built-in model.
        sampler, flow_shift: a key of ``_SAMPLERS``, and the shift of noise levels; None: the model's own.
        threads: CPU threads of each process.
        outs: a file or folder for each video; empty: no frames are written.
        fps: frames per second of video files.
        keep_blocks: keep a video's segments after they were joined.
        latents_in, latents_out: files of initial noise and of final latents (``io.latents``).
        timeline: the file of the run's trace.
        overwrite: replace outputs that exist.
        checkpoint, checkpoint_every: the folder of snapshots, and iterations from one to the next.
        resume: go on from ``checkpoint``.
        restartable: the same command may come again: what it left is gone on with, and that it is done stays known.
        texts: a salted checksum of the prompts, by which such a command is known to be the same.
        end, receipts: of the snapshot that is gone on from, see ``Snapshot``; receipts for each video.
    """

    prompts: list[dict[int, str]]
    negative_prompt: str | None
    image: Path | None
    last_image: Path | None
    continue_from: Path | None
    video: VideoConfig
    engine: EngineConfig
    model: str
    sampler: str | None
    flow_shift: float | None
    threads: int
    outs: list[Path]
    fps: float
    keep_blocks: bool
    latents_in: Path | None
    latents_out: Path | None
    timeline: Path | None
    overwrite: bool
    checkpoint: Path | None
    checkpoint_every: int | None
    resume: bool = False
    restartable: bool = False
    texts: str = ""
    end: str = ""
    receipts: tuple[Receipts, ...] = ()

    @property
    def stages(self) -> int:
        """The number of stages."""
        assert self.engine.stages is not None, "a job says how many"
        return self.engine.stages

    @property
    def ranks(self) -> int:
        """The number of processes that do the work: those of the stages, and those that decode."""
        return self.stages * self.engine.sequence_parallel + self.engine.decode_ranks

    @property
    def device(self) -> str:
        """The type of the device, "cuda" or "cpu"."""
        assert self.engine.device is not None, "a job says where"
        return self.engine.device

    def notes(self) -> dict[str, Any]:
        """The job as JSON values, for a snapshot to keep. No prompt is among them."""
        found = asdict(self)
        for name in ("prompts", "negative_prompt", "end", "receipts"):
            del found[name]
        notes: dict[str, Any] = json.loads(json.dumps({**found, "videos": len(self.prompts)}, default=str))
        return notes

    @classmethod
    def of_notes(cls, notes: dict[str, Any]) -> Job:
        """The job that left ``notes`` in a snapshot, to be resumed. Raises KeyError, TypeError, ValueError."""
        found = {**notes}
        paths = {name: found[name] and Path(found[name]) for name in ("latents_out", "timeline", "checkpoint")}
        rest: dict[str, Any] = {
            "prompts": [{}] * found.pop("videos"),
            "negative_prompt": None,
            "video": VideoConfig(**found["video"]),
            "engine": EngineConfig.from_json(found["engine"]),
            "outs": [Path(out) for out in found["outs"]],
            "latents_in": None,
            "image": None,  # what came of it is there
            "last_image": None,
            "continue_from": None,
            "resume": True,
        }
        return cls(**{**found, **paths, **rest})


def make_engine(job: Job, report: Callable[..., None] | None = None) -> Engine:
    """The engine of a job, with its sampler. In a rank of several processes it owns one stage.

    Args:
        report: called before every action, see ``Engine.from_pretrained``.

    Raises:
        ValueError: options, model or sampler that cannot be used.
    """
    from dualparal.engine.engine import Engine

    engine = Engine.from_pretrained(job.model, job.engine, report=report)
    if job.sampler is not None or job.flow_shift is not None:
        engine.scheduler = _sampler(engine.scheduler, job)
    return engine


def check_sampler(name: str | None) -> None:
    """Checks the flag ``--sampler``; None: the model's own. Raises ValueError."""
    if name is not None and name not in _SAMPLERS:
        raise ValueError(f"--sampler {name}: use one of {', '.join(_SAMPLERS)}")


def call_arguments(job: Job) -> dict[str, Any]:
    """The arguments of ``Engine.stream`` for a job. The fields of ``VideoConfig`` have its names."""
    kind = None if job.latents_out is None else "latents"
    found = {name: getattr(job, name) for name in ("negative_prompt", "image", "last_image")} | asdict(job.video)
    del found["continues"]  # which follows from ``video``
    return {**found, "prompt": job.prompts, "video": job.continue_from, "result_kind": kind}


def _sampler(current: Any, job: Job) -> Any:
    """The sampler (diffusers' scheduler) of a job, from the config of the model's own. Raises ValueError."""
    import diffusers

    kind = getattr(diffusers, _SAMPLERS[job.sampler]) if job.sampler else type(current)
    options: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    shift = current.config.get("flow_shift", current.config.get("shift")) if job.flow_shift is None else job.flow_shift
    options["shift" if kind.__name__.startswith("FlowMatch") else "flow_shift"] = shift
    return kind.from_config(current.config, **options)


def salted(prompts: list[dict[int, str]], negative_prompt: str | None, salt: str = "") -> str:
    """A checksum of texts, with its salt: it tells whether they are the same, not what they are."""
    salt = salt or secrets.token_hex(16)
    texts = json.dumps([salt, [sorted(each.items()) for each in prompts], negative_prompt])
    return f"{salt}:{hashlib.sha256(texts.encode()).hexdigest()}"


def checkpoint_of(job: Job, receipts: Callable[[int], Any] | None = None) -> Any:
    """The ``Checkpoint`` of a job; None: it keeps no snapshots. receipts: see there."""
    from dualparal.checkpoint.checkpointer import Checkpoint

    if job.checkpoint is None:
        return None
    # All latents stay: from them the video's segments can be made again.
    return Checkpoint(job.checkpoint, job.checkpoint_every, job.notes(), keep_latents=True, receipts=receipts)


def resume_command(job: Job) -> str | None:
    """The command that goes on from the snapshots of a job; None: there are none."""
    if job.checkpoint is None or not any(job.checkpoint.glob("snapshot-*")):
        return None
    return f"dualparal generate --resume {shlex.quote(str(job.checkpoint))}"


def say_how_to_resume(job: Job) -> None:
    """Prints the command that goes on with a job to stderr, if there is one."""
    command = resume_command(job)
    if command is not None:
        typer.echo(f"resume with: {command}", err=True)


def error_file(job: Job) -> Path:
    """The file beside the first output that tells of a failure in JSON."""
    first = next(path for path in (*job.outs, job.latents_out) if path is not None)
    return first.with_name(first.name + ".error.json")


def display_of(job: Job) -> Display:
    """The progress display for all videos of a job."""
    frames = job.video.num_frames
    return Display(None if frames is None else frames * len(job.prompts))
