"""``dualparal generate``: flags to a job, and the job to whoever does it."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from dualparal.cli.job import Job, check, error_file, say_how_to_resume
from dualparal.cli.leader import draw_timeline, lead
from dualparal.cli.rank import work
from dualparal.config.blocks import BlockConfig
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.config.video import VideoConfig
from dualparal.launch.heartbeat import Heartbeat
from dualparal.models.registry import BUILT_IN, BUILT_IN_SIZE


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
        blocks=BlockConfig(
            frames_per_block,
            context_frames,
            context,  # type: ignore[arg-type]
            max_blocks_in_flight,
            context_version,  # type: ignore[arg-type]
            _refreshes(refresh_every, checkpoint, context, context_frames, steps),
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
        check(job)
    if note and not heartbeat.supervised and os.environ.get("RANK", "0") == "0":
        typer.echo(note, err=True)
    if not is_rank:
        error_file(job).unlink(missing_ok=True)  # of an earlier run
    if is_rank or count == 1:
        started = time.time()
        code = work(job, heartbeat)
        if not heartbeat.supervised and os.environ.get("RANK", "0") == "0":
            if job.timeline is not None:
                draw_timeline(job.timeline, started)
            if code:
                say_how_to_resume(job)
    else:
        code = lead(job, planned)
    if is_rank and count > 1:
        # Its work is done and on disk: nothing that libraries do while they unload can change that now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


_MAY_CHANGE = ("gpus", "stages", "layers_per_stage", "device", "threads", "depth", "graphs", "checkpoint_every")


def _resumed(call: typer.Context, folder: Path, given: dict[str, Any]) -> Job:
    """The job of a folder's last snapshot. What decides frames or where they go cannot be changed; machines can."""
    from dualparal.checkpoint.snapshot import SnapshotError, newest
    from dualparal.io.output import check_file

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


def _refreshes(every: int | None, checkpoint: Path | None, context: str, context_frames: int, steps: int) -> int | None:
    """``--refresh-every``, which snapshots need where features outlive an iteration."""
    if every is not None or checkpoint is None or context == "paper" or context_frames == 0:
        return every
    return max(1, steps // 2)


def _planned(job: Job, mode: str, max_blocks_in_flight: int | None) -> Job:
    """The job with what the planner chooses. Only once, in the process that starts the ranks: they must agree."""
    from dualparal.models.source import resolve_model
    from dualparal.planning.measured import cards
    from dualparal.planning.planner import plan_for
    from dualparal.planning.workload import Workload

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
    sizes = resolve_model(job.model).sizes
    decodes = job.video.output_type != "latent"
    work = Workload(sizes, job.video, job.blocks, itemsize=size, decode=decodes, depth=job.depth)
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
