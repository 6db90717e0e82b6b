"""Starts the ranks of one run, hears them, names the culprit when one fails, and leaves no process behind.

This is the parent side of `heartbeat`. It knows processes, signals and the words "phase", "stage", "block"
and "step"; it knows nothing of tensors and imports no torch, so that it starts at once and survives what
kills a rank. `blame` is a pure function of what was heard, apart from the processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualparal.io.files import whole_file
from dualparal.launch.blame import Failure, Limits, RankState, blame
from dualparal.launch.exit_codes import BAD_INPUT
from dualparal.launch.heartbeat import RENDEZVOUS
from dualparal.launch.machine import Machine, ThisMachine
from dualparal.launch.process import Rank

logger = logging.getLogger("dualparal")

_POLL_SECONDS = 0.05
_GATHER_SECONDS = 0.01
# A process in uninterruptible sleep outlives SIGKILL: waiting for ever would hide the message.
_KILL_SECONDS = 5.0

OnMessage = Callable[[int, dict[str, Any]], object]


@dataclass(frozen=True)
class Kept:
    """The parts of a run that outlive its failure.

    Attributes:
        last_committed_block: the last block that is safe on disk.
        resume_command: the command that goes on from there; without the prompt, since it is written to
            ``error.json``.
    """

    last_committed_block: int | None = None
    resume_command: str | None = None


@dataclass(frozen=True)
class Result:
    """The end of a run.

    Attributes:
        exit_code: 0 for done, 3 for a failed rank, 4 for no heartbeat or no progress, the one that a failing rank
            asked for, or, for an interrupted run, 128 and the number of the signal (129, 130, 143).
        failure: the failure, also of an interrupted run in which something broke while it was stopping.
        interrupted: the first signal, if one came.
    """

    exit_code: int
    failure: Failure | None = None
    interrupted: signal.Signals | None = None


def write_error(path: Path, failure: Failure) -> None:
    """Writes a failure as JSON, whole or not at all. An error in that is a warning, and not raised."""
    record = {**dataclasses.asdict(failure), "message": str(failure)}
    try:
        with whole_file(path) as file:
            file.write(json.dumps(record, indent=2).encode() + b"\n")
    except OSError as error:
        # A full disk may be the very failure we report: it must not hide it.
        logger.warning("could not write %s: %s", path, error)


class Supervisor:
    """Runs one command as ``world_size`` ranks and waits for all of them; arguments as in ``supervise``.

    Args:
        machine: the one that it runs on.

    Raises:
        ValueError: no rank, or no command.
    """

    def __init__(
        self,
        argv: Sequence[str],
        world_size: int,
        *,
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        on_message: OnMessage | None = None,
        error_path: str | os.PathLike[str] | None = None,
        kept: Callable[[], Kept] | None = None,
        machine: Machine | None = None,
    ) -> None:
        if world_size < 1:
            raise ValueError(f"world_size={world_size}: a run has at least one rank; use 1 or more")
        if not argv:
            raise ValueError("argv is empty: name the command that every rank runs")
        self._argv = list(argv)
        self._world_size = world_size
        self._env = dict(env or {})
        self._limits = limits or Limits()
        self._on_message = on_message
        self._error_path = Path(error_path) if error_path is not None else None
        self._kept = kept or Kept
        self._ranks: list[Rank] = []
        self._machine = machine or ThisMachine()
        self._signals: list[signal.Signals] = []
        self._told: signal.Signals | None = None  # by a rank that received it
        self._stop_by: float | None = None
        self._listened_at = self._machine.now()

    def interrupt(self, signum: int = signal.SIGINT) -> None:
        """Acts as a signal does: the first asks the ranks to stop at a block boundary, the second kills them."""
        self._signals.append(signal.Signals(signum))

    def run(self) -> Result:
        """Starts the ranks and returns when all are gone. Once only. Raises what ``on_message`` raises, or OSError."""
        if self._error_path is not None:
            # One from an earlier run would speak for this one.
            self._error_path.unlink(missing_ok=True)
        with self._machine.signals(self.interrupt), self._machine.folder() as rendezvous:
            try:
                for rank in range(self._world_size):
                    self._start(rank, rendezvous)
                return self._supervise()
            finally:
                # Also when on_message raised or a process could not be started.
                self._end()
                for each in self._ranks:
                    each.close()

    def _start(self, rank: int, rendezvous: Path) -> None:
        env = {
            **self._env,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._world_size),
            "LOCAL_WORLD_SIZE": str(self._world_size),
            RENDEZVOUS: str(rendezvous / "store"),
        }
        child = self._machine.start(self._argv, env)
        now = self._machine.now()
        self._ranks.append(Rank(child, RankState(rank, heard=now, moved=now), self._machine.now))

    def _supervise(self) -> Result:
        self._listened_at = self._machine.now()
        while True:
            self._listen()
            result = self._while_stopping() if self._signals or self._told else self._while_running()
            if result is not None:
                return result

    def _listen(self) -> None:
        """Waits a moment for news, then takes exits first and messages second.

        In that order, since a rank's last words are in its pipe before its exit can be seen.
        """
        if self._machine.wait(_POLL_SECONDS):
            # One round for all that many busy ranks have to say: the parent must not cost a core.
            self._machine.sleep(_GATHER_SECONDS)
        now = self._machine.now()
        away = now - self._listened_at
        away_since = self._listened_at if away > 1.0 else None
        if away_since is not None:
            # The parent itself was stopped, or its terminal was: that time is not the ranks' fault.
            for rank in self._ranks:
                rank.state.heard += away
                rank.state.moved += away
        for rank in self._ranks:
            rank.reap()
        for rank in self._ranks:
            if rank.open:
                self._hear(rank, now, away_since)
        self._listened_at = now

    def _hear(self, rank: Rank, now: float, away_since: float | None) -> None:
        messages = rank.read()
        if not rank.open:
            self._machine.forget(rank.child)
        for message in messages:
            rank.state.take(message, now, away_since)
            if "signal" in message:
                self._hear_of_signal(message["signal"])
            if self._on_message is not None and "tick" not in message:
                self._on_message(rank.state.rank, message)

    def _hear_of_signal(self, number: Any) -> None:
        """A scheduler may signal every process, or only the ranks: it is meant for the run."""
        with contextlib.suppress(ValueError):
            self._told = self._told or signal.Signals(number)

    def _states(self) -> list[RankState]:
        return [rank.state for rank in self._ranks]

    def _while_running(self) -> Result | None:
        now = self._listened_at
        failure = blame(self._states(), self._limits, now)
        if failure is not None:
            failure = self._fail(failure)
            return Result(failure.exit_code, failure)
        if not all(state.finished for state in self._states()):
            return None
        lingering = [state.rank for state in self._states() if state.exit is None]
        if lingering and now - max(state.moved for state in self._states()) < self._limits.grace:
            return None
        self._end()
        for state in self._states():
            if state.exit != 0:
                # Libraries crash or hang while they unload; the video is finished all the same.
                logger.warning("rank %d did not exit cleanly (%s) after its work was done", state.rank, state.exit)
        return Result(0)

    def _while_stopping(self) -> Result | None:
        now = self._listened_at
        cause = self._signals[0] if self._signals else self._told
        assert cause is not None
        if self._stop_by is None:
            self._stop_by = now + self._limits.grace
            logger.warning("%s: stopping at the next block boundary; once more to stop at once", cause.name)
            for rank in self._ranks:
                rank.ask_to_stop()
        result = Result(128 + cause, interrupted=cause)
        failure = blame(self._states(), self._limits, now, stopping=True)
        if failure is not None:
            return dataclasses.replace(result, failure=self._fail(failure))
        alive = [state for state in self._states() if state.exit is None]
        # Imports and loading hear nothing, and while a rank is at that no block can have been begun.
        starting = any(state.starting for state in alive)
        if alive and not starting and len(self._signals) < 2 and now < self._stop_by:
            return None
        if alive:
            if not starting:
                logger.warning("rank(s) %s had not stopped yet and were killed", [state.rank for state in alive])
            self._end()
        return result

    def _fail(self, failure: Failure) -> Failure:
        """Tells the failure, with what outlives it, and ends the ranks."""
        failure = dataclasses.replace(failure, **dataclasses.asdict(self._kept()))
        if failure.exit_code != BAD_INPUT:  # of which one line at the end is enough
            # Now, not after the clean-up. The caller shows it again at the end, below the ranks' own output.
            logger.error("%s", failure)
            if self._error_path is not None:
                write_error(self._error_path, failure)
        self._end()
        return failure

    def _end(self) -> None:
        """Ends every rank. By SIGKILL: they take SIGTERM for the wish to stop at a block boundary."""
        alive = [rank for rank in self._ranks if not rank.reap()]
        for rank in alive:
            rank.signal_group(signal.SIGKILL)
        deadline = self._machine.now() + _KILL_SECONDS
        while alive and self._machine.now() < deadline:
            self._machine.sleep(0.01)
            alive = [rank for rank in alive if not rank.reap()]
        if alive:
            pids = [rank.child.pid for rank in alive]
            logger.error("processes %s are still there %.0f s after SIGKILL", pids, _KILL_SECONDS)


def supervise(
    argv: Sequence[str],
    world_size: int,
    *,
    env: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    on_message: OnMessage | None = None,
    error_path: str | os.PathLike[str] | None = None,
    kept: Callable[[], Kept] | None = None,
) -> Result:
    """Runs `argv` as `world_size` ranks and returns when every one of them is gone.

    SIGINT, SIGTERM or SIGHUP, here or at a rank that passes it on, asks the ranks to stop at a block boundary; a second
    one here, the end of `limits.grace`, or a rank that is still starting, kills them. The ranks' own output passes
    through.

    Args:
        argv: the command every rank runs, program first.
        world_size: the number of ranks.
        env: variables added to this process's own.
        limits: the longest waits.
        on_message: called with the rank and the message for everything a rank sends except ticks.
        error_path: where to write the failure as JSON; a file left there by an earlier run is removed first.
            It holds the fields of `Failure`, never the command line.
        kept: asked when a rank fails, for what the message says of blocks on disk and of resuming.

    Raises:
        ValueError: no rank, or no command.
        OSError: a rank cannot be started.
    """
    run = Supervisor(argv, world_size, env=env, limits=limits, on_message=on_message, error_path=error_path, kept=kept)
    return run.run()
