"""``dualparal generate``: flags to a job, and the job to whoever does it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer

from dualparal.cli.block_flags import BlockFlags, ReuseFlags
from dualparal.cli.checks import check_job
from dualparal.cli.content import PromptFlags
from dualparal.cli.dry_run import describe
from dualparal.cli.eight_bit_flags import EightBitFlags
from dualparal.cli.flags import (
    LimitFlags,
    ModelFlags,
    OutputFlags,
    PlaceFlags,
    VideoFlags,
    parse_steps,
)
from dualparal.cli.job import Job, error_file, salted, say_how_to_resume
from dualparal.cli.leader import draw_timeline, lead
from dualparal.cli.place import choose_device, choose_threads, count_stages, leads, parse_layers
from dualparal.cli.rank import work
from dualparal.cli.resumed import resumed_job, started_or_resumed
from dualparal.config.blocks import BlockConfig
from dualparal.config.decoding import choose_vae_dtype
from dualparal.config.engine import EngineConfig
from dualparal.config.reuse import Reuse
from dualparal.config.video import VideoConfig
from dualparal.io.locks import Locks
from dualparal.launch.blame import Limits
from dualparal.launch.heartbeat import Heartbeat, on_stop_signals
from dualparal.models.defaults import model_defaults
from dualparal.schedule.policies import with_refreshes

GROUPS = (
    PromptFlags,
    VideoFlags,
    ModelFlags,
    EightBitFlags,
    ReuseFlags,
    BlockFlags,
    PlaceFlags,
    OutputFlags,
    LimitFlags,
)


def generate(
    call: typer.Context,
    prompts: PromptFlags,
    video: VideoFlags,
    model: ModelFlags,
    eight_bit: EightBitFlags,
    reuse: ReuseFlags,
    blocks: BlockFlags,
    place: PlaceFlags,
    output: OutputFlags,
    patience: LimitFlags,
) -> None:
    """Makes a video of any length. Finished blocks can be played while it runs."""
    heartbeat = Heartbeat.from_env()
    on_stop_signals(heartbeat.pass_on if heartbeat.supervised else _leave)  # until there is something to keep
    limits = patience.limits(distributed="RANK" in os.environ)
    with Locks() as locks:
        # Held for the life of the run, by whoever starts it: ranks of ours work for a parent that has them.
        hold = locks.hold if leads() and not heartbeat.supervised and not output.dry_run else None
        if hold is not None:
            _hold_snapshots(output, hold)
        if output.resume is not None:
            job, note = resumed_job(call, output.resume, model, place, output), ""
        else:
            job, note = _asked_for(
                call, heartbeat.supervised, prompts, video, model, eight_bit, reuse, blocks, place, output
            )
        if output.dry_run:
            check_job(job)
            typer.echo(describe(job))
            raise typer.Exit(0)
        if hold is not None:
            _hold_outputs(job, hold)
        code = _run_job(job, heartbeat, limits, place.plan is not None and not job.resume, note)
        if "RANK" in os.environ and job.ranks > 1:
            # Its work is done and on disk: nothing that libraries do while they unload can change that now.
            locks.release()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    raise typer.Exit(code)


def _hold_snapshots(output: OutputFlags, hold: Callable[[Path, str], None]) -> None:
    """Locks the snapshots' folder. Raises OutputError when another run holds it; OSError."""
    for flag, folder in (
        ("--resume", output.resume),
        ("--resume-or-start", output.resume_or_start),
        ("--checkpoint", output.checkpoint),
    ):
        if folder is not None:
            hold(folder, flag)


def _hold_outputs(job: Job, hold: Callable[[Path, str], None]) -> None:
    """Locks all files that a job will write. Raises OutputError when another run holds one; OSError."""
    for out in job.outs:
        hold(out, "--out")
    for path, flag in ((job.latents_out, "--latents-out"), (job.timeline, "--timeline")):
        if path is not None:
            hold(path, flag)


def _asked_for(
    call: typer.Context,
    supervised: bool,
    prompts: PromptFlags,
    video: VideoFlags,
    model: ModelFlags,
    eight_bit: EightBitFlags,
    reuse: ReuseFlags,
    blocks: BlockFlags,
    place: PlaceFlags,
    output: OutputFlags,
) -> tuple[Job, str]:
    """The job that the flags ask for, be it begun already, and a line for the user. Raises ValueError."""
    if not prompts.prompt:
        raise ValueError("--prompt is missing: say what the video shows, or --resume a folder; see --help")
    if output.resume_or_start is not None:
        if output.checkpoint is not None:
            raise ValueError("--resume-or-start with --checkpoint: it names that folder itself; leave --checkpoint out")
        output = replace(output, checkpoint=output.resume_or_start)
    job = _job(prompts, video, model, eight_bit, reuse, blocks, place, output)
    if output.resume_or_start is not None:
        job = started_or_resumed(call, job, place.plan is not None, model, place, output)
        if job.resume:
            return job, ""
    if place.plan is not None and not supervised:
        if place.layers_per_stage is not None or blocks.max_blocks_in_flight is not None:
            raise ValueError(
                f"--plan {place.plan} with --layers-per-stage or --max-blocks-in-flight: that is what it chooses"
            )
        given = place.stages is not None or place.decode_gpus > 0 or place.decode_in_place
        search = place.gpus is not None and not given
        job = _planned(job, place.plan, search, search_places=search and place.sequence_parallel == 1)
    every, note = job.engine.blocks.refresh_every, ""
    if every != blocks.refresh_every:
        note = (
            f"--checkpoint with --context {blocks.context}: every {every} iterations are refreshes, so that the run "
            f"can go on from there (--refresh-every {every}); the video is another one than without"
        )
    return job, note


def _job(
    prompts: PromptFlags,
    video: VideoFlags,
    model: ModelFlags,
    eight_bit: EightBitFlags,
    reuse: ReuseFlags,
    blocks: BlockFlags,
    place: PlaceFlags,
    output: OutputFlags,
) -> Job:
    """The job that the flags ask for. Raises ValueError for values that cannot be."""
    texts, out = prompts.prompt or [], output.out
    if out is None and output.latents_out is None:
        out = Path("video.mp4")
    split = parse_layers(place.layers_per_stage)
    stages = place.stages
    if split and place.gpus is None and stages is None and "RANK" not in os.environ:
        stages = len(split)
    places = place.sequence_parallel
    own = model_defaults(model.model)
    stages = count_stages(place.gpus, stages, place.device, place.decode_gpus, places)
    request = _video(video, own.video, "latent" if out is None else "uint8", prompts.continue_from)
    skipped = Reuse.of(reuse.reuse)
    cut = BlockConfig.of(own.blocks, **blocks.given())
    if output.checkpoint is not None:
        cut = with_refreshes(cut, len(skipped.runs(request.num_inference_steps)))
    return Job(
        prompts=_prompts(texts, prompts.prompt_at or [], video.num_frames),
        negative_prompt=prompts.negative_prompt,
        image=prompts.image,
        last_image=prompts.last_image,
        continue_from=prompts.continue_from,
        video=request,
        engine=EngineConfig(
            blocks=cut,
            stages=stages,
            layers_per_stage=split,
            transformers=model.transformers,
            loras=model.loras,
            device=choose_device(place.device, place.gpus),
            dtype=model.dtype,
            text_encoder_device=place.text_encoder_device,
            vae_dtype=model.vae_dtype,
            decoder=None if model.decoder is None else str(model.decoder),
            decode_ranks=place.decode_gpus,
            decode_in_place=place.decode_in_place,
            depth=place.depth,
            sequence_parallel=places,
            sequence_parallel_form=place.sequence_parallel_form,
            graphs=place.graphs,
            reuse=skipped,
            allow_nonfinite=model.allow_nonfinite,
            **eight_bit.options(),
        ),
        model=model.model,
        sampler=model.sampler,
        flow_shift=model.flow_shift,
        threads=choose_threads(place.threads, stages * places + place.decode_gpus, model.model, model.transformers),
        outs=_outs(out, len(texts)),
        fps=output.fps,
        keep_blocks=output.keep_blocks,
        latents_in=output.latents_in,
        latents_out=output.latents_out,
        timeline=output.timeline,
        overwrite=output.overwrite,
        checkpoint=output.checkpoint,
        checkpoint_every=output.checkpoint_every,
        restartable=output.resume_or_start is not None,
        texts=salted(_prompts(texts, prompts.prompt_at or [], video.num_frames), prompts.negative_prompt),
    )


def _outs(out: Path | None, videos: int) -> list[Path]:
    """A file or folder for each video: video.mp4, or video-0.mp4, video-1.mp4 ..."""
    if out is None:
        return []
    return [out] if videos == 1 else [out.with_name(f"{out.stem}-{video}{out.suffix}") for video in range(videos)]


def _prompts(texts: list[str], later: list[str], num_frames: int) -> list[dict[int, str]]:
    """The prompts of each video, first frame -> text.

    Args:
        texts: one for each video, from frame 0 on.
        later: "FRAME:TEXT", for a single video.

    Raises:
        ValueError: no such frame, or a frame twice. It names a prompt by its frame: the text may be private, and
            errors end up in logs.
    """
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


def _video(flags: VideoFlags, own: VideoConfig, output_type: str, clip: Path | None) -> VideoConfig:
    """The request of the flags; the default size is that of the clip that it goes on from, or the model's ``own``.
    Raises ValueError."""
    height, width = flags.height, flags.width
    if clip is not None:
        from dualparal.io.clips import probe_clip  # and with it numpy

        found = probe_clip(clip)
        height = found.height if height is None else height
        width = found.width if width is None else width
    return VideoConfig.of(
        own,
        height=height,
        width=width,
        num_frames=flags.num_frames,
        num_inference_steps=flags.num_inference_steps,
        guidance_scale=flags.guidance_scale,
        guidance_scale_2=flags.guidance_scale_2,
        seed=flags.seed,
        output_type=output_type,
        timesteps=parse_steps("--timesteps", flags.timesteps),
        sigmas=parse_steps("--sigmas", flags.sigmas),
        continues=clip is not None,
    )


def _planned(job: Job, mode: str, search_decoders: bool, search_places: bool) -> Job:
    """The job with the planner's choice of layers per stage, cards per stage, blocks in flight and who decodes. Raises
    ValueError.

    Called once, in the process that starts the ranks, since they must agree.

    Args:
        job: with all of its cards, none of which is kept for decoding unless the user said so.
        mode: the flag's value.
        search_decoders: who decodes is chosen here.
        search_places: the cards of each stage are chosen here.
    """
    from dualparal.models.source import resolve_model
    from dualparal.planning.measured import cards
    from dualparal.planning.planner import plan_for
    from dualparal.planning.workload import Workload

    engine = job.engine
    if mode != "auto":
        raise ValueError(f"--plan {mode}: use auto, or leave it out")
    if "RANK" in os.environ:
        raise ValueError(
            "--plan auto in a run of several processes: it starts its own with --gpus; or give --layers-per-stage and "
            "--max-blocks-in-flight as 'dualparal plan' says"
        )
    dtype = engine.dtype or ("float32" if engine.device == "cpu" else "bfloat16")
    vae_dtype = choose_vae_dtype(engine.vae_dtype, on_card=engine.device != "cpu")
    sizes = resolve_model(job.model, transformers=engine.transformers).sizes
    work = Workload(sizes, job.video, replace(engine, dtype=dtype, vae_dtype=vae_dtype), len(job.prompts))
    found = plan_for(work, [cards(job.device, job.ranks)], search_decoders=search_decoders, search_places=search_places)
    typer.echo(f"plan: {found.describe()}", err=True)
    chosen = found.work.engine
    engine = replace(
        engine,
        blocks=chosen.blocks,
        stages=len(found.split),
        layers_per_stage=tuple(found.split),
        decode_ranks=chosen.decode_ranks,
        decode_in_place=chosen.decode_in_place,
        sequence_parallel=chosen.sequence_parallel,
    )
    return replace(job, engine=engine)


def _run_job(job: Job, heartbeat: Heartbeat, limits: Limits, planned: bool, note: str) -> int:
    """Runs a job as a rank, as the only process or as the parent of ranks, and returns the exit code.

    Args:
        limits: of the patience with ranks.
        planned: layers and cards per stage, blocks in flight and who decodes are the planner's; ranks are told.
        note: a line for the user, once the job is known to be sound.
    """
    is_rank, count = "RANK" in os.environ, job.ranks
    if leads():
        check_job(job)
    if note and not heartbeat.supervised and leads():
        typer.echo(note, err=True)
    if not is_rank:
        error_file(job).unlink(missing_ok=True)  # of an earlier run
    if is_rank or count == 1 or job.end:
        started = time.time()
        code = work(job, heartbeat, limits)
        if not heartbeat.supervised and leads():
            if job.timeline is not None:
                draw_timeline(job.timeline, started)
            if code:
                say_how_to_resume(job)
            else:
                error_file(job).unlink(missing_ok=True)  # of an attempt before, under torchrun
    else:
        code = lead(job, limits, planned)
    return code


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process on a signal, while there is nothing to keep."""
    raise SystemExit(128 + number)
