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
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from dualparal.heartbeat import LIFE_FD, RENDEZVOUS, STATUS_FD, STOP, TICK_SECONDS
from dualparal.io.files import whole_file

logger = logging.getLogger("dualparal")

RANK_FAILED = 3
NO_PROGRESS = 4

_POLL_SECONDS = 0.05
_GATHER_SECONDS = 0.01
_TERM_SECONDS = 2.0
# A process in uninterruptible sleep outlives SIGKILL: waiting for ever would hide the message.
_KILL_SECONDS = 5.0
# Silence that makes a rank suspect when others already say that they lost a peer.
_SUSPECT_SECONDS = 5 * TICK_SECONDS
_LINE_LIMIT = 1 << 16

OnMessage = Callable[[int, dict[str, Any]], object]


@dataclass(frozen=True)
class Kept:
    """What of a run outlives its failure.

    last_committed_block: the last block that is safe on disk. resume_command: what goes on from there; without the
    prompt, since it is written to ``error.json``.
    """

    last_committed_block: int | None = None
    resume_command: str | None = None


@dataclass(frozen=True)
class Limits:
    """How long the parent waits, in seconds."""

    heartbeat: float = 10.0  # without a tick: the process is stopped, or holds the GIL
    progress: float = 600.0  # without a message while busy, or while every rank waits
    startup: float = 120.0  # at least this for either while starting: imports hold the GIL for long
    grace: float = 20.0  # from the request to stop until SIGKILL
    error_hold: float = 0.2  # a rank's own error waits this long for a death by signal that explains it
    peer_error_hold: float = 1.0  # "I lost a peer" waits this long for the peer's own story

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if not value >= 0:
                raise ValueError(f"{item.name}={value!r}: a limit is a number of seconds; use 0 or more")


@dataclass(frozen=True)
class Failure:
    """Which rank failed, where it was, and why. `str` gives one message for the user."""

    rank: int
    stage: int | None
    block: int | None
    step: int | None
    phase: str | None
    cause: str
    exit_code: int
    hint: str = ""
    last_committed_block: int | None = None
    resume_command: str | None = None

    def __str__(self) -> str:
        stage = f" (stage {self.stage})" if self.stage is not None else ""
        places = [
            f"{name} {value}" for name, value in (("block", self.block), ("step", self.step)) if value is not None
        ]
        places.append(f"phase '{self.phase}'" if self.phase else "start-up")
        text = f"rank {self.rank}{stage} failed at {', '.join(places)}: {self.cause}"
        more = {
            "hint": self.hint,
            "last block on disk": self.last_committed_block,
            "resume with": self.resume_command,
        }
        return "\n".join([text, *(f"{name}: {value}" for name, value in more.items() if value not in (None, ""))])


@dataclass(frozen=True)
class Result:
    """How a run ended.

    `exit_code` is 0 for done, 3 for a failed rank, 4 for no heartbeat or no progress, 130 or 143 for
    interrupted, or what the failing rank asked for. An interrupted run has a failure too if something broke
    while it was stopping.
    """

    exit_code: int
    failure: Failure | None = None
    interrupted: signal.Signals | None = None


@dataclass(frozen=True)
class Report:
    """An error a rank told us about, and the time of it on the machine's monotonic clock."""

    text: str
    at: float
    exit_code: int


@dataclass
class RankState:
    """What is known of one rank: where it says it is, when it was last heard, how it ended."""

    rank: int
    heard: float  # any line
    moved: float  # any line but a tick, by the rank's own account
    stage: int | None = None
    block: int | None = None
    step: int | None = None
    phase: str | None = None  # None until the first phase: starting up
    done: bool = False
    error: Report | None = None  # its own
    peer_error: Report | None = None  # a consequence of another rank's end
    exit: int | None = None  # as in subprocess: negative for a signal
    exited_at: float = 0.0

    @property
    def active(self) -> bool:
        """Alive, unfinished, and not yet complaining."""
        return self.exit is None and not (self.done or self.error or self.peer_error)

    @property
    def starting(self) -> bool:
        return self.phase is None or self.phase.startswith("start")

    @property
    def waiting(self) -> bool:
        return self.phase is not None and self.phase.startswith("wait")

    @property
    def unexplained_exit(self) -> int | None:
        """The exit code, if nothing this rank said explains it."""
        if self.error or self.peer_error:
            return None
        # Libraries may crash while they unload, after the work; a code above 0 is somebody's decision.
        return None if self.done and (self.exit or 0) <= 0 else self.exit

    @property
    def finished(self) -> bool:
        """Its work is done, and nothing it did since says otherwise."""
        return self.done and not self.error and self.unexplained_exit is None

    @property
    def told_at(self) -> float:
        return self.error.at if self.error else self.exited_at

    def take(self, message: Mapping[str, Any], now: float) -> None:
        """Updates the state from one line."""
        self.heard = now
        if "tick" in message:
            return
        at = message.get("at")
        self.moved = min(now, at) if isinstance(at, float) else now
        self.stage = _int(message.get("stage"), self.stage)
        if "phase" in message:
            self.phase = str(message["phase"])
            self.block, self.step = _int(message.get("block")), _int(message.get("step"))
        if "error" in message:
            self._take_error(message)
        self.done = self.done or bool(message.get("done"))

    def _take_error(self, message: Mapping[str, Any]) -> None:
        code = _int(message.get("exit_code"))
        code = code if code is not None and 0 < code < 256 else RANK_FAILED
        report = Report(str(message["error"]), self.moved, code)
        # The first word counts: what follows is the clean-up talking.
        if message.get("peer"):
            self.peer_error = self.peer_error or report
        else:
            self.error = self.error or report


def blame(states: Sequence[RankState], limits: Limits, now: float, stopping: bool = False) -> Failure | None:
    """The failure that explains what is known so far, or None: all is well, or it is too early to say.

    A death by signal beats an error a rank reports itself, which beats an early exit, which beats silence,
    which beats no progress, which beats any "I lost a peer". SIGABRT counts as a report: it is how C++ ends
    on an exception that nobody caught, often about a peer. While stopping, ranks may leave early, and grace
    bounds the rest.
    """
    expected = {signal.SIGINT, signal.SIGTERM} if stopping else set()
    exits = [(s, s.unexplained_exit) for s in states]
    killed = [s for s, code in exits if code is not None and code < 0 and -code not in expected | {signal.SIGABRT}]
    if killed:
        return _death(min(killed, key=lambda s: s.exited_at))
    own = [s for s, code in exits if s.error or code == -signal.SIGABRT]
    early = [s for s, code in exits if code is not None and code >= 0 and not stopping]
    if own or early:
        first = min(own or early, key=lambda s: s.told_at)
        return _own_fault(first) if now - first.told_at >= limits.error_hold else None
    if stopping:
        return None
    return (
        _silent(states, limits, limits.heartbeat, now)
        or _stalled(states, limits, limits.progress, now)
        or _peer_lost(states, limits, now)
    )


def _own_fault(state: RankState) -> Failure:
    if state.error:
        return _failure(state, state.error.text, state.error.exit_code, _hint_for(state.error.text))
    if state.exit is not None and state.exit < 0:
        return _death(state)
    when = "after it had reported the end of its work" if state.done else "before its work was done"
    return _failure(state, f"exited with code {state.exit} {when}", RANK_FAILED, "its own output above says more")


def _death(state: RankState) -> Failure:
    assert state.exit is not None
    number = -state.exit
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        hint = "often the system ran out of memory (see dmesg); otherwise somebody killed it"
    elif number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
        hint = "a crash in native code; PYTHONFAULTHANDLER=1 shows where"
    else:
        hint = "somebody sent it that signal"
    return _failure(state, f"killed by {name}", RANK_FAILED, hint)


def _limit(state: RankState, limits: Limits, limit: float) -> float:
    return max(limit, limits.startup) if state.starting else limit


def _silent(states: Sequence[RankState], limits: Limits, limit: float, now: float) -> Failure | None:
    quiet = [s for s in states if s.active and now - s.heard > _limit(s, limits, limit)]
    if not quiet:
        return None
    worst = min(quiet, key=lambda s: s.heard)
    hint = "the process is stopped, swapping, or stuck in native code that holds the GIL"
    return _failure(worst, f"no heartbeat for {now - worst.heard:.1f} s", NO_PROGRESS, hint)


def _stalled(
    states: Sequence[RankState], limits: Limits, limit: float, now: float, busy_only: bool = False
) -> Failure | None:
    active = [s for s in states if s.active]
    late = [s for s in active if now - s.moved > _limit(s, limits, limit)]
    busy = [s for s in late if not s.waiting]
    # One rank at work may keep the others waiting as long as it likes: they are late, but innocent.
    deadlock = len(late) == len(active) and not busy_only
    if not busy and not (late and deadlock):
        return None
    worst = min(busy or late, key=lambda s: s.moved)
    cause = f"no progress for {now - worst.moved:.1f} s"
    if busy:
        return _failure(worst, cause, NO_PROGRESS, "a GPU kernel or an input/output call that never returns")
    hint = "a transfer that nobody answers; this rank waits longest"
    return _failure(worst, f"{cause}, and every other rank waits too", NO_PROGRESS, hint)


def _peer_lost(states: Sequence[RankState], limits: Limits, now: float) -> Failure | None:
    reports = [(s.peer_error, s) for s in states if s.peer_error]
    if not reports:
        return None
    report, state = min(reports, key=lambda item: item[0].at)
    if now - report.at < limits.peer_error_hold:
        return None
    # A transport may give up before our own limits do. Then whoever is quiet, or busy for long, is the peer.
    suspect = _silent(states, limits, min(_SUSPECT_SECONDS, limits.heartbeat), now)
    suspect = suspect or _stalled(states, limits, limits.heartbeat, now, busy_only=True)
    hint = "no rank gave a cause of its own; the output above may"
    return suspect or _failure(state, f"lost a peer: {report.text}", report.exit_code, hint)


def _failure(state: RankState, cause: str, exit_code: int, hint: str) -> Failure:
    return Failure(state.rank, state.stage, state.block, state.step, state.phase, cause, exit_code, hint)


def _hint_for(text: str) -> str:
    if "out of memory" in text.lower():
        return "use smaller blocks, less context, a smaller picture or more GPUs; see `dualparal plan`"
    return ""


def _int(value: object, default: int | None = None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


@dataclass
class _Rank:
    """One child process, the parent's ends of its two pipes, and what is known of it."""

    process: subprocess.Popen[bytes]
    status_fd: int
    life_fd: int
    state: RankState
    open: bool = True
    buffer: bytearray = field(default_factory=bytearray)

    def reap(self) -> bool:
        """Collects the exit code if there is one; true when the process is gone."""
        if self.state.exit is None:
            code = self.process.poll()
            if code is not None:
                self.state.exit, self.state.exited_at = code, time.monotonic()
                # What the rank started goes with it. At once: its group's number could be given out again.
                self.signal_group(signal.SIGKILL)
        return self.state.exit is not None

    def signal_group(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, number)

    def terminate(self) -> None:
        self.process.terminate()
        # A stopped process gets to its SIGTERM only when it runs.
        self.signal_group(signal.SIGCONT)

    def ask_to_stop(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self.life_fd, STOP)

    def read(self) -> list[dict[str, Any]]:
        """All complete lines in the pipe; `open` turns false at its end."""
        data = b"more"
        while data and len(self.buffer) < 16 * _LINE_LIMIT:  # a rank that floods us must not hold up the others
            try:
                data = os.read(self.status_fd, _LINE_LIMIT)
            except BlockingIOError:
                break
            self.buffer += data
            self.open = bool(data)
        *lines, rest = self.buffer.split(b"\n")
        self.buffer = rest if len(rest) < _LINE_LIMIT else bytearray()
        return [message for message in map(_parse, lines) if message is not None]

    def close(self) -> None:
        for fd in (self.status_fd, self.life_fd):
            with contextlib.suppress(OSError):
                os.close(fd)


def _parse(line: bytearray) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        logger.debug("a rank sent a line of %d bytes that is not a message", len(line))
        return None
    return message


def write_error(path: Path, failure: Failure) -> None:
    """Writes a failure as JSON, whole or not at all. What hinders that is a warning."""
    record = {**dataclasses.asdict(failure), "message": str(failure)}
    try:
        with whole_file(path) as file:
            file.write(json.dumps(record, indent=2).encode() + b"\n")
    except OSError as error:
        # A full disk may be the very failure we report: it must not hide it.
        logger.warning("could not write %s: %s", path, error)


class Supervisor:
    """Runs one command as `world_size` ranks and waits for all of them; see `supervise`."""

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
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._signals: list[signal.Signals] = []
        self._stop_by: float | None = None
        self._listened_at = time.monotonic()

    def interrupt(self, signum: int = signal.SIGINT) -> None:
        """What a signal does: the first asks the ranks to stop at a block boundary, the second kills them."""
        self._signals.append(signal.Signals(signum))

    def run(self) -> Result:
        """Starts the ranks and stays until all are gone. Once only."""
        if self._error_path is not None:
            # One from an earlier run would speak for this one.
            self._error_path.unlink(missing_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="dualparal-", ignore_cleanup_errors=True)
        with self._handlers(), self._selector, folder as rendezvous:
            try:
                for rank in range(self._world_size):
                    self._start(rank, rendezvous)
                return self._supervise()
            finally:
                # Also when on_message raised or a process could not be started.
                self._end(patience=0.0)
                for each in self._ranks:
                    each.close()

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            # Python allows handlers in the main thread only; there the owner calls interrupt().
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)

        def note(number: int, _: FrameType | None) -> None:
            self.interrupt(number)

        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _start(self, rank: int, rendezvous: str) -> None:
        status_read, status_write = os.pipe()
        life_read, life_write = os.pipe()
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._world_size),
            "LOCAL_WORLD_SIZE": str(self._world_size),
            STATUS_FD: str(status_write),
            LIFE_FD: str(life_read),
            RENDEZVOUS: os.path.join(rendezvous, "store"),
        }
        try:
            process = subprocess.Popen(
                self._argv,
                env={**os.environ, **self._env, **own},
                stdin=subprocess.DEVNULL,
                pass_fds=(status_write, life_read),
                # A session of its own: ctrl-C in the terminal reaches the parent alone, which decides.
                start_new_session=True,
            )
        except BaseException:
            os.close(status_read)
            os.close(life_write)
            raise
        finally:
            os.close(status_write)
            os.close(life_read)
        os.set_blocking(status_read, False)
        os.set_blocking(life_write, False)
        now = time.monotonic()
        self._ranks.append(_Rank(process, status_read, life_write, RankState(rank, heard=now, moved=now)))
        self._selector.register(status_read, selectors.EVENT_READ)

    def _supervise(self) -> Result:
        self._listened_at = time.monotonic()
        while True:
            self._listen()
            result = self._while_stopping() if self._signals else self._while_running()
            if result is not None:
                return result

    def _listen(self) -> None:
        """Waits a moment for news, then takes exits first and messages second.

        In that order, since a rank's last words are in its pipe before its exit can be seen.
        """
        if self._selector.select(_POLL_SECONDS):
            # One round for all that many busy ranks have to say: the parent must not cost a core.
            time.sleep(_GATHER_SECONDS)
        now = time.monotonic()
        away = now - self._listened_at
        if away > 1.0:
            # The parent itself was stopped, or its terminal was: that time is not the ranks' fault.
            for rank in self._ranks:
                rank.state.heard += away
                rank.state.moved += away
        for rank in self._ranks:
            rank.reap()
        for rank in self._ranks:
            if rank.open:
                self._hear(rank, now)
        self._listened_at = now

    def _hear(self, rank: _Rank, now: float) -> None:
        messages = rank.read()
        if not rank.open:
            self._selector.unregister(rank.status_fd)
        for message in messages:
            rank.state.take(message, now)
            if self._on_message is not None and "tick" not in message:
                self._on_message(rank.state.rank, message)

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
        self._end(patience=0.0)
        for state in self._states():
            if state.exit != 0:
                # Libraries crash or hang while they unload; the video is finished all the same.
                logger.warning("rank %d did not exit cleanly (%s) after its work was done", state.rank, state.exit)
        return Result(0)

    def _while_stopping(self) -> Result | None:
        now = self._listened_at
        cause = self._signals[0]
        if self._stop_by is None:
            self._stop_by = now + self._limits.grace
            logger.warning("%s: stopping at the next block boundary; once more to stop at once", cause.name)
            for rank in self._ranks:
                rank.ask_to_stop()
        result = Result(128 + cause, interrupted=cause)
        failure = blame(self._states(), self._limits, now, stopping=True)
        if failure is not None:
            return dataclasses.replace(result, failure=self._fail(failure))
        alive = [state.rank for state in self._states() if state.exit is None]
        if alive and len(self._signals) == 1 and now < self._stop_by:
            return None
        if alive:
            logger.warning("rank(s) %s had not stopped yet and were killed", alive)
            self._end(patience=0.0)
        return result

    def _fail(self, failure: Failure) -> Failure:
        """Tells the failure, with what outlives it, and ends the ranks."""
        failure = dataclasses.replace(failure, **dataclasses.asdict(self._kept()))
        # Now, not after the clean-up. The caller shows it again at the end, below the ranks' own output.
        logger.error("%s", failure)
        if self._error_path is not None:
            write_error(self._error_path, failure)
        self._end(patience=_TERM_SECONDS)
        return failure

    def _end(self, patience: float) -> None:
        """Ends every rank: SIGTERM, then SIGKILL when patience is over or another signal comes."""
        alive = [rank for rank in self._ranks if not rank.reap()]
        signals = len(self._signals)
        if patience > 0:
            for rank in alive:
                rank.terminate()
            alive = self._wait(alive, patience, lambda: len(self._signals) > signals)
        for rank in alive:
            rank.signal_group(signal.SIGKILL)
        alive = self._wait(alive, _KILL_SECONDS)
        if alive:
            pids = [rank.process.pid for rank in alive]
            logger.error("processes %s are still there %.0f s after SIGKILL", pids, _KILL_SECONDS)

    @staticmethod
    def _wait(ranks: list[_Rank], seconds: float, hurry: Callable[[], bool] = lambda: False) -> list[_Rank]:
        """Waits for ranks to exit; returns those that did not."""
        deadline = time.monotonic() + seconds
        alive = [rank for rank in ranks if not rank.reap()]
        while alive and time.monotonic() < deadline and not hurry():
            time.sleep(0.01)
            alive = [rank for rank in alive if not rank.reap()]
        return alive


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

    SIGINT or SIGTERM asks the ranks to stop at a block boundary; a second one, or the end of `limits.grace`,
    kills them. The ranks' own output passes through.

    Args:
        argv: the command every rank runs, program first.
        world_size: the number of ranks.
        env: variables added to this process's own.
        limits: how long to wait for what.
        on_message: called with the rank and the message for everything a rank sends except ticks.
        error_path: where to write the failure as JSON; a file left there by an earlier run is removed first.
            It holds the fields of `Failure`, never the command line.
        kept: asked when a rank fails, for what the message says of blocks on disk and of resuming.
    """
    run = Supervisor(argv, world_size, env=env, limits=limits, on_message=on_message, error_path=error_path, kept=kept)
    return run.run()
