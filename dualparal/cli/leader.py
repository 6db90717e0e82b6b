"""The parent of several ranks: starts them under the supervisor and shows how far they are."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from dualparal.cli.job import Job, display_of, error_file, resume_command, say_how_to_resume
from dualparal.launch.blame import Limits
from dualparal.launch.stragglers import SlowStages

# The program of a rank. "python -m" would let modules in the current folder, perhaps a model's, stand in for ours.
RANK_PROGRAM = "import sys; sys.path[:1] = filter(None, sys.path[:1]); from dualparal.cli.main import main; main()"
_ARGUMENT = "DUALPARAL_ARGUMENT_"


def draw_timeline(path: Path, since: float) -> None:
    """Draws the picture of a timeline, after joining the timeline itself if a run that failed left it in parts.

    Args:
        path: the timeline's file.
        since: start of the run, seconds since the epoch; nothing is drawn of an older file.
    """
    from dualparal.trace.picture import draw
    from dualparal.trace.timeline import TimelineError, merge_left

    merge_left(path)
    if not path.exists() or path.stat().st_mtime < since:
        return  # the run did not get so far
    try:
        typer.echo(f"{path}: open it at ui.perfetto.dev; {draw(path)} is its picture", err=True)
    except (TimelineError, OSError) as error:
        typer.echo(f"{path}: open it at ui.perfetto.dev; no picture: {error}", err=True)


def lead(job: Job, limits: Limits, planned: bool = False) -> int:
    """Starts the ranks of a job, draws their progress, and tells how they ended.

    Args:
        limits: of the patience with them.
        planned: the ranks are told the layers and ranks per stage, blocks in flight and decoders of ``job``.

    Returns:
        The exit code (``launch.supervisor.Result``).
    """
    from dualparal.io.output import remove_unfinished, what_is_left
    from dualparal.launch.supervisor import Kept, supervise

    arguments = sys.argv[1:]
    engine = job.engine
    if planned and engine.layers_per_stage is not None:
        arguments += ["--layers-per-stage", ",".join(map(str, engine.layers_per_stage))]
        arguments += ["--context-version", engine.blocks.context_version, "--decode-gpus", str(engine.decode_ranks)]
        arguments += ["--sequence-parallel", str(engine.sequence_parallel)]
        arguments += ["--decode-in-place"] * engine.decode_in_place
        if engine.blocks.max_blocks_in_flight is not None:
            arguments += ["--max-blocks-in-flight", str(engine.blocks.max_blocks_in_flight)]
    display = display_of(job)
    started = time.time()
    summary: list[str] = []
    slow = SlowStages(job.stages, engine.sequence_parallel)
    kept = Kept()

    def hear(rank: int, message: dict[str, Any]) -> None:
        nonlocal kept
        if "progress" in message:
            display.update(message["progress"])
        if "units" in message:
            display.units(message["units"], message["total_units"])
        if "committed" in message:
            kept = replace(kept, last_committed_block=message["committed"])
        if "busy" in message:
            slow.note(rank, message["iteration"], message["busy"], message.get("decoding", 0.0))
        if "summary" in message:
            summary.append(message["summary"])  # shown when the bar is gone

    with display:
        result = supervise(
            [sys.executable, "-c", RANK_PROGRAM],
            job.ranks,
            on_message=hear,
            limits=limits,
            env={"OMP_NUM_THREADS": str(job.threads), **_loading(), **pack_arguments(arguments)},
            error_path=error_file(job),
            kept=lambda: replace(kept, resume_command=resume_command(job)),
        )
    for out in job.outs if result.exit_code else []:
        remove_unfinished(out)  # by whoever was writing when it was ended
    if job.timeline is not None:
        draw_timeline(job.timeline, started)
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
        say_how_to_resume(job)
    return result.exit_code


def _loading() -> dict[str, str]:
    """Code that CUDA loads at its first use makes the host wait for the device, in the middle of a run."""
    return {"CUDA_MODULE_LOADING": os.environ.get("CUDA_MODULE_LOADING", "EAGER")}


def pack_arguments(arguments: list[str]) -> dict[str, str]:
    """A rank's arguments as environment variables: every user of a machine may read command lines, with prompts."""
    return {f"{_ARGUMENT}{index}": argument for index, argument in enumerate(arguments)}


def unpack_arguments() -> list[str]:
    """Takes the arguments that ``pack_arguments`` packed out of the environment. Empty: the command line has them."""
    count = sum(name.startswith(_ARGUMENT) for name in os.environ)
    return [os.environ.pop(f"{_ARGUMENT}{index}") for index in range(count)]
