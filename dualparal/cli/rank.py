"""One rank of several, or the only process: runs the engine and writes what comes."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dualparal.cli.job import Job, call_arguments, checkpoint_of, display_of, error_file, make_engine, resume_command
from dualparal.cli.place import leads
from dualparal.launch.exit_codes import BAD_INPUT, NUMERICS, RANK_FAILED, STORAGE
from dualparal.launch.heartbeat import Heartbeat

if TYPE_CHECKING:
    from dualparal.cli.progress import Display
    from dualparal.cli.results import Results
    from dualparal.decoding.chunks import Chunk

logger = logging.getLogger("dualparal")


def _quiet_libraries() -> None:
    """Turns off the libraries' progress bars, which would run through ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def work(job: Job, heartbeat: Heartbeat) -> int:
    """Performs the work of one rank of several, or of the only process. Errors are told, not raised.

    Returns:
        The exit code: 0, one of ``launch.exit_codes``, or 128 and the number of a signal.
    """
    import torch

    from dualparal.decoding.chunks import NonFiniteError
    from dualparal.distributed.messages import PeerLost
    from dualparal.models.json_files import ModelError

    torch.set_num_threads(job.threads)
    if leads():
        _quiet_libraries()
    try:
        interrupted = _finish(job, heartbeat) if job.end else _stream(job, heartbeat)
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
    """Says what went wrong, unless the supervisor will: it has heard of it and names the first cause.

    Returns:
        ``code``.
    """
    if heartbeat.supervised:
        return code
    typer.echo(f"error: {one_line(text)}", err=True)
    if code != BAD_INPUT and "RANK" not in os.environ:
        from dualparal.launch.blame import Failure
        from dualparal.launch.supervisor import write_error

        where: dict[str, Any] = {name: heartbeat.where.get(name) for name in ("stage", "block", "step", "phase")}
        write_error(
            error_file(job), Failure(0, **where, cause=text, exit_code=code, resume_command=resume_command(job))
        )
    return code


def _finish(job: Job, heartbeat: Heartbeat) -> int:
    """Does what is left to do when all blocks are finished. Of several ranks the one that leads does it. Returns 0."""
    from dualparal.checkpoint.snapshot import JOINED
    from dualparal.cli.results import Results, tidy_again

    # Ranks meet when their engines are made; a process alone needs one only if segments are missing.
    engine = make_engine(job) if "RANK" in os.environ and job.end != JOINED else None
    if not leads():
        return 0

    def decode_again(folder: Path, blocks: Sequence[int], video: int) -> Iterator[tuple[int, Any]]:
        return (engine or make_engine(job)).decode_again(folder, blocks, video)

    names = tidy_again(job) if job.end == JOINED else Results(job).close(True, decode_again)
    typer.echo(f"{' and '.join(names)}: all blocks were finished already", err=True)
    return 0


def _stream(job: Job, heartbeat: Heartbeat) -> int:
    """Runs the engine and writes what comes. Returns the signal that ended it early, or 0."""
    from dualparal.cli.results import Results
    from dualparal.io.latents import read_latents

    rank = int(os.environ.get("RANK", "0"))
    heartbeat.phase("start", **({"stage": rank} if rank < job.stages else {"decoder": rank - job.stages}))
    display = display_of(job) if leads() and not heartbeat.supervised else None
    engine = make_engine(job, _report(heartbeat, display))
    leading = engine.mesh.is_leader
    checkpoint = checkpoint_of(job, lambda end: results.receipts(end))
    if job.resume:
        chunks = engine.resume(checkpoint, timeline=job.timeline)
    else:
        latents = None if job.latents_in is None else read_latents(job.latents_in)
        chunks = engine.stream(latents=latents, timeline=job.timeline, checkpoint=checkpoint, **call_arguments(job))
    stopped = _stop_on_signals(engine, heartbeat, leading)
    if not leading:
        for _ in chunks:
            pass
        return 0
    results = Results(job)
    try:
        _take(chunks, results, display, heartbeat)
    except BaseException:
        # The parent of supervised ranks wants to hear of it at once, and ends them then: blocks stay as they are.
        if not heartbeat.supervised:
            results.close_after_failure()
        raise
    if results.written:
        heartbeat.phase("write")

    def decode_again(folder: Path, blocks: Sequence[int], video: int) -> Iterator[tuple[int, Any]]:
        for block, frames in engine.decode_again(folder, blocks, video):
            heartbeat.phase("write", block=block)
            yield block, frames

    names = results.close(not engine.interrupted, decode_again)
    if engine.stats is not None:
        summary = f"{' and '.join(names)}: {engine.stats.summary()}"
        if heartbeat.supervised:
            heartbeat.message(summary=summary)
        else:
            typer.echo(summary, err=True)
    return stopped[0] if stopped else 0


def _report(heartbeat: Heartbeat, display: Display | None) -> Callable[..., None]:
    """The engine's report of every action: it goes to the parent, and moves the bar."""
    if display is None:
        return heartbeat.phase

    def report(name: str, **where: Any) -> None:
        heartbeat.phase(name, **where)
        if "units" in where:
            display.units(where["units"], where["total_units"])

    return report


def _take(chunks: Iterator[Chunk], results: Results, display: Display | None, heartbeat: Heartbeat) -> None:
    """Takes all chunks into the results, and tells how far the run is."""
    with nullcontext() if display is None else display:
        for chunk in chunks:
            results.take(chunk)
            report = asdict(chunk.progress)
            heartbeat.message(progress=report, **({"committed": chunk.block} if results.written else {}))
            if display is not None:
                display.update(report)


def _stop_on_signals(engine: Any, heartbeat: Heartbeat, leading: bool) -> list[int]:
    """Makes the first SIGINT or SIGTERM stop the engine at the next unit, and the second end the process at once.

    Returns:
        The list of signals received, which grows while the run goes on.
    """
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


def one_line(error: object) -> str:
    """The error as one line, whatever names in it hold: line breaks and control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(error))
