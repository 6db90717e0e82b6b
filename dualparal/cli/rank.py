"""One rank of several, or the only process: runs the engine and writes what comes."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dualparal.cli.job import Job, call_arguments, checkpoint_of, display_of, error_file, make_engine, resume_command
from dualparal.cli.place import leads
from dualparal.cli.refusals import in_flags
from dualparal.launch.blame import Failure, Limits
from dualparal.launch.exit_codes import BAD_INPUT, NUMERICS, RANK_FAILED, STORAGE
from dualparal.launch.heartbeat import Heartbeat, on_stop_signals
from dualparal.launch.supervisor import write_error

if TYPE_CHECKING:
    from dualparal.cli.progress import Display
    from dualparal.cli.results import Results
    from dualparal.decoding.chunks import Chunk
    from dualparal.distributed.watch import StoreWatch
    from dualparal.engine.engine import Engine

logger = logging.getLogger("dualparal")

_LAST_WORDS_SECONDS = 2.0  # in which another rank says who is to blame


def _quiet_libraries() -> None:
    """Turns off the libraries' progress bars, which would run through ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def work(job: Job, heartbeat: Heartbeat, limits: Limits) -> int:
    """Performs the work of one rank of several, or of the only process. Errors are told, not raised.

    Args:
        limits: of the patience with other ranks that torchrun has started.

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
        interrupted = _finish(job, heartbeat) if job.end else _stream(job, heartbeat, limits)
    except Stopped as stopped:
        return int(stopped.code or 0)
    except (PeerLost, TimeoutError) as error:  # another rank is gone, or did not come
        heartbeat.error(error, peer=True, exit_code=RANK_FAILED)
        return _fail(job, str(error), RANK_FAILED, heartbeat)
    except NonFiniteError as error:
        heartbeat.error(error, exit_code=NUMERICS)
        return _fail(job, str(error), NUMERICS, heartbeat)
    except (ModelError, ValueError) as error:
        heartbeat.error(one_line(in_flags(str(error))), exit_code=BAD_INPUT)
        return _fail(job, in_flags(str(error)), BAD_INPUT, heartbeat)
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
        where: dict[str, Any] = {
            name: heartbeat.where.get(name) for name in ("stage", "place", "block", "step", "phase")
        }
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


def _stream(job: Job, heartbeat: Heartbeat, limits: Limits) -> int:
    """Makes the engine, watched by the other ranks and watching them, and runs it.

    Returns:
        The signal that ended it early, or 0.
    """
    from dualparal.distributed.mesh import role_of

    rank = int(os.environ.get("RANK", "0"))
    heartbeat.phase("start", **role_of(rank, job.stages, job.engine.sequence_parallel if job.ranks > 1 else 1))
    display = display_of(job) if leads() and not heartbeat.supervised else None
    engine = make_engine(job, _report(heartbeat, display))
    watch = None if heartbeat.supervised or not engine.mesh.distributed else _watch(job, engine, heartbeat, limits)
    try:
        return _write(job, engine, heartbeat, display)
    finally:
        if watch is not None:
            watch.stop()


def _watch(job: Job, engine: Engine, heartbeat: Heartbeat, limits: Limits) -> StoreWatch:
    """Starts to watch the other ranks of a run that torchrun has started. A silent one ends this process."""
    from dualparal.distributed.mesh import own_store
    from dualparal.distributed.watch import StoreWatch

    mesh = engine.mesh

    def give_up(failure: Failure) -> None:
        first = 1 if failure.rank == 0 else 0
        if mesh.rank == first:
            failure = replace(failure, resume_command=resume_command(job))
            typer.echo(f"error: {failure}", err=True)
            write_error(error_file(job), failure)
        else:
            time.sleep(_LAST_WORDS_SECONDS)  # torchrun ends all of them when one has left
        os._exit(failure.exit_code)

    watch = StoreWatch(own_store(), mesh.rank, mesh.world_size, lambda: heartbeat.where, limits, give_up)
    watch.start()
    return watch


def _write(job: Job, engine: Engine, heartbeat: Heartbeat, display: Display | None) -> int:
    """Runs the engine and writes what comes. Returns the signal that ended it early, or 0."""
    from dualparal.cli.results import Results
    from dualparal.io.latents import read_latents

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
        # The parent of supervised ranks wants to hear of it soon, and ends them then: blocks stay as they are.
        results.close_after_failure(join=not heartbeat.supervised)
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

    def tell(chunk: Chunk) -> None:
        report = asdict(chunk.progress)
        heartbeat.message(progress=report, **({"committed": chunk.block} if results.written else {}))
        if display is not None:
            display.update(report)

    with nullcontext() if display is None else display:
        for chunk in chunks:
            results.take(chunk, partial(tell, chunk))
        results.settle()


def _stop_on_signals(engine: Any, heartbeat: Heartbeat, leading: bool) -> list[int]:
    """Makes the first signal to stop end the engine at the next unit, and the second end the process at once.

    Before the first unit there is nothing to keep, and the first ends the process. Supervised ranks pass signals on.

    Returns:
        The list of signals received, which grows while the run goes on.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received and leading:
            os._exit(128 + number)
        if heartbeat.starting:
            raise Stopped(128 + number)
        if leading:  # the others hear of it from there
            received.append(number)
            engine.interrupt()

    def watch() -> None:
        heartbeat.stop_requested.wait()
        engine.interrupt()

    if not heartbeat.supervised:
        on_stop_signals(note)
    elif leading:
        threading.Thread(target=watch, daemon=True).start()
    return received


class Stopped(SystemExit):
    """The process was asked to end while there is nothing to keep; holds the exit code."""


def one_line(error: object) -> str:
    """The error as one line, whatever names in it hold: line breaks and control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(error))
