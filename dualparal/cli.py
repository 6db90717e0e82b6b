"""The command line: flags to a request, a request to an engine. No decisions of its own.

``dualparal generate --gpus N`` starts N copies of the same command as ranks under the supervisor; a rank finds
itself in the environment (ours or torchrun's) and does its share. torch is imported late, so that ``--help`` is
quick and a rank's heartbeat starts before the slow imports.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from dualparal import __version__
from dualparal.config.blocks import BlockConfig
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.config.video import BUILT_IN, BUILT_IN_SIZE, VideoConfig
from dualparal.heartbeat import Heartbeat
from dualparal.plan_command import command as plan_command
from dualparal.progress import Display
from dualparal.schedule.layout import split_layers
from dualparal.schedule.policies import POLICIES
from dualparal.slow import SlowStages

if TYPE_CHECKING:
    from dualparal.io.output import PictureOutput, VideoOutput

logger = logging.getLogger("dualparal")

# What a rank runs. "python -m" would let modules in the current folder, perhaps a model's, stand in for ours.
RANK_PROGRAM = "import sys; sys.path[:1] = filter(None, sys.path[:1]); from dualparal.cli import main; main()"
_ARGUMENT = "DUALPARAL_ARGUMENT_"
BAD_INPUT, RANK_FAILED, STORAGE, NUMERICS = 2, 3, 5, 6
_SAMPLERS = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Long video from a stock video diffusion transformer, split over GPUs.",
)


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


def _outs(out: Path | None, videos: int) -> list[Path]:
    """A file or folder for each video: video.mp4, or video-0.mp4, video-1.mp4 ..."""
    if out is None:
        return []
    return [out] if videos == 1 else [out.with_name(f"{out.stem}-{video}{out.suffix}") for video in range(videos)]


def _prompts(texts: list[str], later: list[str], num_frames: int) -> list[dict[int, str]]:
    """ValueErrors name a prompt by its frame: the text may be private, and errors end up in logs."""
    if len(texts) > 1 and later:
        raise ValueError(
            f"--prompt-at with {len(texts)} times --prompt: which video it means is not said; run them apart"
        )
    prompts = {0: texts[0]}
    for entry in later:
        frame, colon, text = entry.partition(":")
        if not colon or not frame.strip().isdecimal() or len(frame) > 20:
            raise ValueError(
                f"--prompt-at, number {later.index(entry) + 1}: use FRAME:TEXT, such as --prompt-at '400:a dog runs'"
            )
        if not 0 < int(frame) < num_frames:
            raise ValueError(
                f"--prompt-at {int(frame)}:...: frame 0 has --prompt's text, and the video ends at {num_frames - 1}; "
                "use a frame between"
            )
        if int(frame) in prompts:
            raise ValueError(f"--prompt-at {int(frame)}:...: that frame has a text already; give one per frame")
        prompts[int(frame)] = text.strip()
    return [prompts, *({0: text} for text in texts[1:])]


def _layers_per_stage(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--layers-per-stage {text!r}: use a number of layers for each stage, such as 9,11,10"
        ) from None


def _eight_bit(mode: str | None, keep_layers: str, first: int, last: int) -> EightBitPolicy:
    try:
        layers = tuple(int(layer) for layer in keep_layers.split(",") if keep_layers)
    except ValueError:
        raise ValueError(
            f"--attention-8bit-keep-layers {keep_layers!r}: use numbers of layers from 0 on, such as 0,29"
        ) from None
    return EightBitPolicy(mode or "off", layers, first, last)  # type: ignore[arg-type]


def _count_stages(gpus: int | None, stages: int | None, device: str | None) -> int:
    """From the flags, or from torchrun's environment, which has the last word on the number of processes."""
    if gpus is not None and stages is not None and gpus != stages:
        raise ValueError(f"--gpus {gpus} and --stages {stages}: one stage runs on one GPU; give one of them")
    if gpus is not None and device not in (None, "cuda"):
        raise ValueError(f"--gpus {gpus} with --device {device}: use --stages for the number of {device} processes")
    flag, count = ("--gpus", gpus) if stages is None else ("--stages", stages)
    if count is not None and count < 1:
        raise ValueError(f"{flag} {count}: every layer needs an owner; use 1 or more")
    if "RANK" not in os.environ:
        return count or 1
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if count not in (None, world_size):
        raise ValueError(
            f"{flag} {count} in a run of {world_size} processes: every process is one stage; leave {flag} out, "
            f"or start {count} processes"
        )
    return world_size


@app.command()
def generate(
    call: typer.Context,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What the video shows; repeated, so many videos are made at once.", show_default=False),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    prompt_at: Annotated[
        list[str] | None,
        typer.Option(help="FRAME:TEXT, blocks from that frame on take the text; may be repeated."),
    ] = None,
    num_frames: Annotated[
        int, typer.Option(help="Length in frames: 1, 5, 9 ... (4k + 1); exactly so many are made.")
    ] = 81,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .mp4 file, or a folder for PNG files (several videos: NAME-0, NAME-1 ...). Default video.mp4, or "
            "none with --latents-out."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Wan text-to-video pipeline: a directory in diffusers format, a hub id, or the small model of moving "
            "shapes that ships with this package."
        ),
    ] = BUILT_IN,
    gpus: Annotated[int | None, typer.Option(help="Number of GPUs, one stage each.", show_default=False)] = None,
    stages: Annotated[int | None, typer.Option(help="Number of stages (processes). Default: --gpus, or 1.")] = None,
    layers_per_stage: Annotated[
        str | None,
        typer.Option(help="Layers of each stage, such as 9,11,10. Default: an even split.", show_default=False),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise; one more in each further video.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels. Default 480 (64 for the model of the package).")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. Default 832 (64 for the model of the package).")] = None,
    steps: Annotated[
        int, typer.Option("--steps", "--num-inference-steps", help="Denoising steps of every block.")
    ] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1: none, half the work.")] = 5.0,
    guidance_scale_2: Annotated[
        float | None,
        typer.Option(help="The same for the second transformer of Wan2.2. Default: as the first."),
    ] = None,
    frames_per_block: Annotated[int, typer.Option(help="B, latent frames per block (one latent is 4 frames).")] = 8,
    context_frames: Annotated[int, typer.Option(help="C, latent frames lent by each neighbour; 0 to B.")] = 4,
    context: Annotated[str, typer.Option(help="cached, prior or paper: where neighbours' features come from.")] = (
        "cached"
    ),
    max_blocks_in_flight: Annotated[
        int | None,
        typer.Option(
            help="Blocks under way at once: fewer give the first frames earlier. Default: one per step.",
            show_default=False,
        ),
    ] = None,
    context_version: Annotated[
        str,
        typer.Option(
            help="matching or newest: which features of the block before cached reads, with a limit as above."
        ),
    ] = "matching",
    refresh_every: Annotated[
        int | None,
        typer.Option(
            help="Every so many iterations, blocks see their predecessors' latents in place of features. Default: "
            "never; with --checkpoint and --context cached or prior, half the steps.",
            show_default=False,
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="unipc, euler or dpm++. Default: the model's own.")] = None,
    flow_shift: Annotated[
        float | None, typer.Option(help="Shift of the sampler's noise levels. Default: the model's own.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 on cuda, float32 on cpu."),
    ] = None,
    depth: Annotated[int, typer.Option(help="Messages that fit between two stages.")] = 2,
    graphs: Annotated[bool, typer.Option(help="Run every stage step as a CUDA graph (cuda only).")] = False,
    attention_8bit: Annotated[
        str | None,
        typer.Option(help="int8 (queries and keys) or fp8 (values besides): self-attention in 8 bits. Default: off."),
    ] = None,
    attention_8bit_keep_layers: Annotated[
        str, typer.Option(help="Layers that stay in 16 bits, such as 0,29.", show_default=False)
    ] = "",
    attention_8bit_keep_first_steps: Annotated[
        int, typer.Option(help="So many steps at the start stay in 16 bits.")
    ] = 0,
    attention_8bit_keep_last_steps: Annotated[int, typer.Option(help="The same at the end.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads per stage; 0: the cores divided by the stages.")] = 0,
    fps: Annotated[float, typer.Option(help="Frames per second of the video file.")] = 16.0,
    keep_blocks: Annotated[bool, typer.Option(help="Keep the video's segments after they were joined.")] = False,
    latents_in: Annotated[
        Path | None, typer.Option(help="Initial noise: safetensors, one tensor 'latents' [videos, C, L, H, W].")
    ] = None,
    latents_out: Annotated[Path | None, typer.Option(help="Write the final latents there, in the same format.")] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Write a trace of the run there (.json or .json.gz, for ui.perfetto.dev) and its picture beside it "
            "(.png; needs matplotlib)."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="An empty folder for snapshots, from which --resume goes on after whatever happens."),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Iterations between snapshots. Default: 2 % of the time.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on from this folder's last snapshot, on any number of stages; all else is known there."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace outputs that exist.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option(help="Go on when a block holds NaN or infinity, instead of stopping before it.")
    ] = False,
    plan: Annotated[
        str | None,
        typer.Option(help="auto: layers per stage and blocks in flight as 'dualparal plan' would have them here."),
    ] = None,
) -> None:
    """Make a video of any length. Finished blocks can be played while it runs."""
    heartbeat = Heartbeat.from_env()
    if not heartbeat.supervised:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)  # until there is something to keep
    if resume is not None:
        _run_job(_resumed(call, resume, call.params), heartbeat)
    if not prompt:
        raise ValueError("--prompt is missing: say what the video shows, or --resume a folder; see --help")
    default_height, default_width = BUILT_IN_SIZE if model == BUILT_IN else (480, 832)
    split = _layers_per_stage(layers_per_stage)
    if split and gpus is None and stages is None and "RANK" not in os.environ:
        stages = len(split)
    count = _count_stages(gpus, stages, device)
    if out is None and latents_out is None:
        out = Path("video.mp4")
    job = Job(
        prompts=_prompts(prompt, prompt_at or [], num_frames),
        negative_prompt=negative_prompt,
        video=VideoConfig(
            default_height if height is None else height,
            default_width if width is None else width,
            num_frames,
            steps,
            guidance_scale,
            guidance_scale_2,
            seed,
            "latent" if out is None else "uint8",
        ),
        blocks=_with_refreshes(
            BlockConfig(
                frames_per_block,
                context_frames,
                context,  # type: ignore[arg-type]
                max_blocks_in_flight,
                context_version,  # type: ignore[arg-type]
                refresh_every,
            ),
            checkpoint,
            steps,
        ),
        model=model,
        stages=count,
        layers_per_stage=split,
        device=_device(device, gpus),
        dtype=dtype,
        depth=depth,
        graphs=graphs,
        attention_8bit=_eight_bit(
            attention_8bit,
            attention_8bit_keep_layers,
            attention_8bit_keep_first_steps,
            attention_8bit_keep_last_steps,
        ),
        threads=_threads(threads, count),
        sampler=sampler,
        flow_shift=flow_shift,
        outs=_outs(out, len(prompt)),
        fps=fps,
        keep_blocks=keep_blocks,
        latents_in=latents_in,
        latents_out=latents_out,
        timeline=timeline,
        overwrite=overwrite,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        allow_nonfinite=allow_nonfinite,
    )
    if plan is not None and not heartbeat.supervised:
        job = _planned(job, plan, max_blocks_in_flight)
    every, note = job.blocks.refresh_every, ""
    if every != refresh_every:
        note = (
            f"--checkpoint with --context {context}: every {every} iterations are refreshes, so that the run can go on "
            f"from there (--refresh-every {every}); the video is another one than without"
        )
    _run_job(job, heartbeat, plan is not None, note)


def _run_job(job: Job, heartbeat: Heartbeat, planned: bool = False, note: str = "") -> NoReturn:
    """As a rank, as the only process, or as the parent of ranks. note: for the user, when all is well."""
    is_rank, count = "RANK" in os.environ, job.stages
    if not is_rank or os.environ["RANK"] == "0":
        _check(job)
    if note and not heartbeat.supervised and os.environ.get("RANK", "0") == "0":
        typer.echo(note, err=True)
    if not is_rank:
        _error_file(job).unlink(missing_ok=True)  # of an earlier run
    if is_rank or count == 1:
        started = time.time()
        code = _work(job, heartbeat)
        if not heartbeat.supervised and os.environ.get("RANK", "0") == "0":
            if job.timeline is not None:
                _draw(job.timeline, started)
            if code:
                _say_how_to_resume(job)
    else:
        code = _lead(job, planned)
    if is_rank and count > 1:
        # Its work is done and on disk: nothing that libraries do while they unload can change that now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


_MAY_CHANGE = ("gpus", "stages", "layers_per_stage", "device", "threads", "depth", "graphs", "checkpoint_every")


def _resumed(call: typer.Context, folder: Path, given: dict[str, Any]) -> Job:
    """The job of a folder's last snapshot. What decides frames or where they go cannot be changed; machines can."""
    from dualparal.io.output import check_file
    from dualparal.snapshot import SnapshotError, newest

    check_file(folder, "--resume", overwrite=True, folder=True)
    sources = {name: call.get_parameter_source(name) for name in given}
    # By name: typer may have its own copy of click.
    asked = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    fixed = sorted(asked - {*_MAY_CHANGE, "resume", "timeline", "overwrite"})
    if fixed:
        flags = ", ".join("--" + name.replace("_", "-") for name in fixed)
        raise ValueError(f"--resume {folder} with {flags}: the snapshot says that already; leave it out")
    found, _ = newest(folder)
    notes = found.run.get("notes")
    if not isinstance(notes, dict) or not notes:
        raise SnapshotError(f"--resume {folder}: the run was not one of 'dualparal generate'; use Engine.resume")
    changes: dict[str, Any] = {name: given[name] for name in asked & set(_MAY_CHANGE) - {"gpus", "stages"}}
    changes |= {"checkpoint": folder, "timeline": given["timeline"], "overwrite": given["overwrite"]}
    try:
        split = _layers_per_stage(given["layers_per_stage"])
        stages = len(split) if split else notes["stages"]
        if asked & {"gpus", "stages"} or "RANK" in os.environ:
            stages = _count_stages(given["gpus"], given["stages"], given["device"])
        changes |= {"stages": stages, "layers_per_stage": split}
        if split is None and stages == notes["stages"]:
            changes["layers_per_stage"] = notes["layers_per_stage"]
        changes["device"] = _device(given["device"] or notes["device"], given["gpus"])
        before = notes["threads"] if stages == notes["stages"] else 0
        changes["threads"] = _threads(given["threads"] or before, stages)
        return Job.resumed(notes, changes)
    except (KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"--resume {folder}: the snapshot does not describe a run ({error!r})") from None


def _with_refreshes(blocks: BlockConfig, checkpoint: Path | None, steps: int) -> BlockConfig:
    """``blocks`` with the refreshes that snapshots need where features outlive an iteration; as given if asked for."""
    stateless = POLICIES[blocks.context].is_stateless or blocks.context_frames == 0
    if blocks.refresh_every is not None or checkpoint is None or stateless:
        return blocks
    return replace(blocks, refresh_every=max(1, steps // 2))


def _planned(job: Job, mode: str, max_blocks_in_flight: int | None) -> Job:
    """The job with what the planner chooses. Only once, in the process that starts the ranks: they must agree."""
    from dualparal.cost import Workload
    from dualparal.loading import resolve_model
    from dualparal.model_shape import model_shape
    from dualparal.planner import plan_for
    from dualparal.this_machine import cards

    if mode != "auto":
        raise ValueError(f"--plan {mode}: use auto, or leave it out")
    if "RANK" in os.environ:
        raise ValueError(
            "--plan auto in a run of several processes: it starts its own with --gpus; or give --layers-per-stage and "
            "--max-blocks-in-flight as 'dualparal plan' says"
        )
    if job.layers_per_stage is not None or max_blocks_in_flight is not None:
        raise ValueError("--plan auto with --layers-per-stage or --max-blocks-in-flight: that is what it chooses")
    size = {"float32": 4, None: 4 if job.device == "cpu" else 2}.get(job.dtype, 2)
    shape = model_shape(str(resolve_model(job.model).path))
    decodes = job.video.output_type != "latent"
    work = Workload(shape, job.video, job.blocks, itemsize=size, decode=decodes, depth=job.depth)
    found = plan_for(work, [cards(job.device, job.stages)])
    typer.echo(f"plan: {found.describe()}", err=True)
    return replace(job, blocks=found.work.blocks, layers_per_stage=list(found.split))


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _device(name: str | None, gpus: int | None) -> str:
    import torch

    if name not in (None, "cuda", "cpu"):
        raise ValueError(f"--device {name}: use cuda or cpu")
    if torch.cuda.is_available():
        return name or "cuda"
    if gpus is not None or name == "cuda":
        asked = "--device cuda" if gpus is None else f"--gpus {gpus}"
        raise ValueError(
            f"{asked}: torch sees no GPU; use --device cpu, with --stages for several processes, or install a CUDA "
            "build of torch ('dualparal doctor' says what is there)"
        )
    return "cpu"


def _threads(asked: int, stages: int) -> int:
    if not 0 <= asked <= 4096:
        raise ValueError(f"--threads {asked}: use a number from 1, or 0 for the cores divided by the stages")
    return asked or max(1, (os.cpu_count() or 1) // stages)


def _quiet_libraries() -> None:
    """Their progress bars would run through ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _engine(job: Job, stages: int | None, report: Callable[..., None] | None = None) -> Any:
    from dualparal.engine import Engine

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


def _check(job: Job) -> None:
    """Everything that can be known before work starts; ValueError for the user's mistakes."""
    from dualparal.io.latents import read_latents
    from dualparal.io.output import check_file, check_out
    from dualparal.loading import resolve_model
    from dualparal.snapshot import check_empty

    job.video.num_latents()
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
    split_layers(files.spec.num_layers, job.stages, job.layers_per_stage)
    files.check_weights()
    if "RANK" not in os.environ and job.stages > 1:
        # The ranks check again, each for itself; here the user hears of it once, before any of them starts.
        engine = _engine(job, job.stages)
        if job.resume:
            engine.resume(_checkpoint(job))
            return
        latents = None if job.latents_in is None else read_latents(job.latents_in)
        engine.stream(prompt=job.prompts, latents=latents, **_call(job))


def _check_timeline(path: Path, overwrite: bool) -> None:
    from dualparal.gantt import check_matplotlib, picture_of
    from dualparal.io.output import check_file
    from dualparal.timeline import check_name, parts_of

    check_matplotlib()
    check_name(path)
    for file in (path, picture_of(path), parts_of(path)):
        check_file(file, "--timeline", overwrite, folder=file == parts_of(path))


def _draw(path: Path, since: float) -> None:
    """The picture of a timeline, and first of all the timeline, if a run that failed left it in parts."""
    from dualparal.gantt import draw
    from dualparal.timeline import TimelineError, merge_left

    merge_left(path)
    if not path.exists() or path.stat().st_mtime < since:
        return  # the run did not get so far
    try:
        typer.echo(f"{path}: open it at ui.perfetto.dev; {draw(path)} is its picture", err=True)
    except (TimelineError, OSError) as error:
        typer.echo(f"{path}: open it at ui.perfetto.dev; no picture: {error}", err=True)


def _checkpoint(job: Job) -> Any:
    from dualparal.checkpoint import Checkpoint

    if job.checkpoint is None:
        return None
    return Checkpoint(job.checkpoint, job.checkpoint_every, job.notes(), keep_latents=job.latents_out is not None)


def _call(job: Job) -> dict[str, Any]:
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


def _lead(job: Job, planned: bool = False) -> int:
    """Starts the ranks and draws their progress; the parent of ``--gpus N``."""
    from dualparal.io.output import what_is_left
    from dualparal.supervisor import Kept, supervise

    arguments = sys.argv[1:]
    if planned and job.layers_per_stage is not None:
        arguments += ["--layers-per-stage", ",".join(map(str, job.layers_per_stage))]
        arguments += ["--context-version", job.blocks.context_version]
        if job.blocks.max_blocks_in_flight is not None:
            arguments += ["--max-blocks-in-flight", str(job.blocks.max_blocks_in_flight)]
    display = _display(job)
    started = time.time()
    summary: list[str] = []
    slow = SlowStages(job.stages)
    kept = Kept()

    def hear(rank: int, message: dict[str, Any]) -> None:
        nonlocal kept
        if "progress" in message:
            display.update(message["progress"])
        if "committed" in message:
            kept = replace(kept, last_committed_block=message["committed"])
        if "busy" in message:
            slow.note(rank, message["iteration"], message["busy"])
        if "summary" in message:
            summary.append(message["summary"])  # shown when the bar is gone

    with display:
        result = supervise(
            [sys.executable, "-c", RANK_PROGRAM],
            job.stages,
            on_message=hear,
            env={"OMP_NUM_THREADS": str(job.threads), **_pack(arguments)},
            error_path=_error_file(job),
            kept=lambda: replace(kept, resume_command=_resume_command(job)),
        )
    if job.timeline is not None:
        _draw(job.timeline, started)
    if result.failure is not None:
        typer.echo(f"error: {result.failure}", err=True)
    elif result.interrupted is not None:
        typer.echo(f"interrupted by {result.interrupted.name}", err=True)
    for text in summary:
        typer.echo(text, err=True)
    for out in [] if summary else job.outs:
        left = what_is_left(out, started)
        if left:
            typer.echo(left, err=True)
    if result.exit_code and result.failure is None:  # which says it
        _say_how_to_resume(job)
    return result.exit_code


def _resume_command(job: Job) -> str | None:
    """What goes on from the snapshots of a job, if there are any."""
    if job.checkpoint is None or not any(job.checkpoint.glob("snapshot-*")):
        return None
    return f"dualparal generate --resume {shlex.quote(str(job.checkpoint))}"


def _say_how_to_resume(job: Job) -> None:
    command = _resume_command(job)
    if command is not None:
        typer.echo(f"resume with: {command}", err=True)


def _pack(arguments: list[str]) -> dict[str, str]:
    """A rank's arguments as environment variables: every user of a machine may read command lines, with prompts."""
    return {f"{_ARGUMENT}{index}": argument for index, argument in enumerate(arguments)}


def _unpack() -> list[str]:
    """The inverse, which takes them out of the environment. Empty: the arguments are in the command line."""
    count = sum(name.startswith(_ARGUMENT) for name in os.environ)
    return [os.environ.pop(f"{_ARGUMENT}{index}") for index in range(count)]


def _error_file(job: Job) -> Path:
    """Where a failure is told in JSON: beside the first output."""
    first = next(path for path in (*job.outs, job.latents_out) if path is not None)
    return first.with_name(first.name + ".error.json")


def _display(job: Job) -> Display:
    frames = job.video.num_frames
    return Display(None if frames is None else frames * len(job.prompts))


def _work(job: Job, heartbeat: Heartbeat) -> int:
    """One rank of several, or the only process."""
    import torch

    from dualparal.executor import NonFiniteError
    from dualparal.loading import ModelError
    from dualparal.transport import PeerLost

    torch.set_num_threads(job.threads)
    _quiet_libraries()
    try:
        interrupted = _stream(job, heartbeat)
    except (PeerLost, TimeoutError) as error:  # another rank is gone, or did not come
        heartbeat.error(error, peer=True, exit_code=RANK_FAILED)
        return _fail(job, str(error), RANK_FAILED, heartbeat)
    except NonFiniteError as error:
        heartbeat.error(error, exit_code=NUMERICS)
        return _fail(job, str(error), NUMERICS, heartbeat)
    except (ModelError, ValueError) as error:
        heartbeat.error(error, exit_code=BAD_INPUT)
        return _fail(job, str(error), BAD_INPUT, heartbeat)
    except OSError as error:
        heartbeat.error(error, exit_code=STORAGE)
        return _fail(job, f"cannot read or write: {error}", STORAGE, heartbeat)
    except Exception as error:
        heartbeat.error(error, exit_code=RANK_FAILED)
        logger.exception("this rank failed")
        return _fail(job, f"{type(error).__name__}: {error}", RANK_FAILED, heartbeat)
    heartbeat.done()
    return 128 + interrupted if interrupted and not heartbeat.supervised else 0


def _fail(job: Job, text: str, code: int, heartbeat: Heartbeat) -> int:
    """Says what went wrong, unless the supervisor will: it has heard of it and names the first cause."""
    if heartbeat.supervised:
        return code
    typer.echo(f"error: {_line(text)}", err=True)
    if code != BAD_INPUT and "RANK" not in os.environ:
        from dualparal.supervisor import Failure, write_error

        where: dict[str, Any] = {name: heartbeat.where.get(name) for name in ("stage", "block", "step", "phase")}
        write_error(
            _error_file(job), Failure(0, **where, cause=text, exit_code=code, resume_command=_resume_command(job))
        )
    return code


def _stream(job: Job, heartbeat: Heartbeat) -> int:
    """Runs the engine and writes what comes. Returns the signal that ended it early, or 0."""
    import torch

    from dualparal.io.latents import read_latents, write_latents
    from dualparal.io.output import open_output
    from dualparal.snapshot import clear

    heartbeat.phase("start", stage=int(os.environ.get("RANK", "0")))
    engine = _engine(job, None if "RANK" in os.environ else job.stages, heartbeat.phase)
    leading = engine.mesh.rank == 0
    latents = None if job.latents_in is None else read_latents(job.latents_in)
    checkpoint = _checkpoint(job)
    if job.resume:
        chunks = engine.resume(checkpoint, timeline=job.timeline)
    else:
        chunks = engine.stream(
            prompt=job.prompts, latents=latents, timeline=job.timeline, checkpoint=checkpoint, **_call(job)
        )
    stopped = _stop_on_signals(engine, heartbeat, leading)
    outputs: list[VideoOutput | PictureOutput] = []
    if leading and not job.resume:
        outputs = [open_output(out, job.fps) for out in job.outs]
    final: list[list[torch.Tensor]] = [[] for _ in job.prompts]
    display = _display(job) if leading and not heartbeat.supervised else None
    complete = False
    try:
        if display is not None:
            display.start()
        for chunk in chunks:
            if not outputs:  # resumed
                outputs = [open_output(out, job.fps, chunk.block, chunk.start_frame) for out in job.outs]
            if outputs:
                outputs[chunk.video].write(chunk.block, chunk.frames)
            if job.latents_out is not None:
                if job.resume and not final[chunk.video]:
                    final[chunk.video] += _finished_before(job, chunk)
                final[chunk.video].append(chunk.latents.cpu())
            report = asdict(chunk.progress)
            heartbeat.message(progress=report, **({"committed": chunk.block} if outputs else {}))
            if display is not None:
                display.update(report)
        complete = not engine.interrupted
    except BaseException:
        # The parent of supervised ranks wants to hear of it at once, and ends them then: blocks stay as they are.
        for output in [] if heartbeat.supervised else outputs:
            _close_after(output)
        raise
    finally:
        if display is not None:
            display.stop()
    if outputs:
        heartbeat.phase("write")
    for output in outputs:
        output.close()
    if not job.keep_blocks and (job.checkpoint is None or complete):
        for output in outputs:
            output.remove_blocks()
    if leading and job.latents_out is not None and all(final) and (job.checkpoint is None or complete):
        whole = [torch.cat(parts, dim=2) for parts in final]
        shortest = min(part.shape[2] for part in whole)  # after an interruption they are not all as long
        write_latents(job.latents_out, torch.cat([part[:, :, :shortest] for part in whole]))
    if leading and job.checkpoint is not None and complete:
        clear(job.checkpoint)
    if leading and engine.stats is not None:
        latents_out = job.latents_out if job.checkpoint is None or complete else None
        places = [str(p) for p in (*job.outs, latents_out) if p is not None]
        summary = f"{' and '.join(places)}: {engine.stats.summary()}"
        if heartbeat.supervised:
            heartbeat.message(summary=summary)
        else:
            typer.echo(summary, err=True)
    return stopped[0] if stopped else 0


def _finished_before(job: Job, chunk: Any) -> list[Any]:
    """Latents of the blocks before a video's first chunk, which an earlier run has finished."""
    from dualparal.snapshot import read_blocks

    if job.checkpoint is None or chunk.block == 0:
        return []
    return read_blocks(job.checkpoint, chunk.video, range(chunk.block))


def _close_after(output: Any) -> None:
    """Joins what is finished after a failure, which must not be hidden by another one."""
    try:
        output.close()
    except (OSError, ValueError) as error:
        logger.warning("%s: finished blocks were not joined: %s", output.path, error)


def _stop_on_signals(engine: Any, heartbeat: Heartbeat, leading: bool) -> list[int]:
    """First SIGINT or SIGTERM: stop at the next unit and keep what is finished; second: at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        engine.interrupt()

    def watch() -> None:
        heartbeat.stop_requested.wait()
        engine.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM):
        if leading and not heartbeat.supervised:
            signal.signal(number, note)
        elif number == signal.SIGINT or not heartbeat.supervised:
            # The terminal sends ctrl-C to every process; only the leader (or the supervisor) acts on it.
            signal.signal(number, signal.SIG_IGN)
    if leading and heartbeat.supervised:
        threading.Thread(target=watch, daemon=True).start()
    return received


@app.command()
def doctor() -> None:
    """Say what is installed, what was built, and what is missing."""
    from dualparal.doctor import report

    typer.echo(report())


@app.command()
def calibrate() -> None:
    """Measure the attention backends on this GPU once, and use the fastest from then on."""
    from dualparal.calibrate import calibrate as measure

    path = measure(report=typer.echo)
    typer.echo(f"kept in {path}; remove it to go back to the built-in table")


app.command("plan")(plan_command)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Long video from a stock video diffusion transformer, split over GPUs."""
    level = os.environ.get("DUALPARAL_LOG_LEVEL", "WARNING").upper()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "WARNING")
    if version:
        typer.echo(f"dualparal {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: one line on stderr and exit code 2 for the user's mistakes."""
    sys.argv[1:] = _unpack() or sys.argv[1:]
    try:
        app()
    except ValueError as error:
        typer.echo(f"error: {_line(error)}", err=True)
        sys.exit(BAD_INPUT)
    except OSError as error:
        typer.echo(f"error: cannot read or write: {_line(error)}", err=True)
        sys.exit(STORAGE)


def _line(error: object) -> str:
    """One line, whatever a name in it holds: line breaks and a terminal's control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(error))


if __name__ == "__main__":
    main()
