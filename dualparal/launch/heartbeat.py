"""A rank's line to the process that started it: heartbeat, progress, errors, and the order to stop or die.

This is the child side; `supervisor` is the parent's. It imports no torch, because the first tick has to leave
before the slow imports begin. It does not know what a phase means, nor who is to blame when something breaks.

Lines are JSON objects over the pipe ``DUALPARAL_STATUS_FD``: ``{"tick": 1}``, a phase (``phase``, and where:
``stage`` or ``decoder``, ``block``, ``step``), free messages, ``signal``, ``error``, ``done``. On
``DUALPARAL_LIFE_FD`` the parent may write ``stop``; the end of that pipe means that the parent is gone, and then the
rank dies too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

STATUS_FD = "DUALPARAL_STATUS_FD"
LIFE_FD = "DUALPARAL_LIFE_FD"
RENDEZVOUS = "DUALPARAL_RENDEZVOUS"
STOP = b"stop\n"
TICK_SECONDS = 0.3
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_TICK = b'{"tick":1}\n'
# A write this small goes into a pipe whole or not at all, so a full pipe never leaves half a line behind.
_LINE_LIMIT = select.PIPE_BUF
# Phases go out at once while credit lasts. A burst matters more than a steady rate: a short wait is followed
# at once by the long run we want to hear about. What exceeds it goes out with the next tick, newest only.
_PHASE_BURST = 64.0
_PHASES_PER_SECOND = 500.0
_PR_SET_PDEATHSIG = 1

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


class Pipes(Protocol):
    """A rank's ends of its two pipes, and the clock of its machine, in seconds."""

    def now(self) -> float:
        """The time."""
        ...

    def sleep(self, seconds: float) -> object:
        """Waits."""
        ...

    def write(self, line: bytes) -> object:
        """Writes a line to the parent. Raises BlockingIOError: the pipe is full; OSError: the parent is gone."""
        ...

    def listen(self, seconds: float) -> bytes | None:
        """Bytes from the parent; none when it is gone. None: it said nothing for ``seconds``."""
        ...

    def beside(self, work: Callable[[], object]) -> object:
        """Runs ``work`` beside the rank's own."""
        ...

    def die(self) -> object:
        """Ends the rank, and what it started. At once: its main thread may be stuck."""
        ...


class _OwnPipes:
    def __init__(self, status_fd: int, life_fd: int) -> None:
        # A rank's own children must hold neither end.
        os.set_inheritable(status_fd, False)
        os.set_inheritable(life_fd, False)
        os.set_blocking(status_fd, False)
        self._status_fd, self._life_fd = status_fd, life_fd
        self._poller = select.poll()
        self._poller.register(life_fd, select.POLLIN)

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def write(self, line: bytes) -> None:
        os.write(self._status_fd, line)

    def listen(self, seconds: float) -> bytes | None:
        return os.read(self._life_fd, 256) if self._poller.poll(seconds * 1000) else None

    def beside(self, work: Callable[[], object]) -> None:
        threading.Thread(target=work, name="dualparal-heartbeat", daemon=True).start()

    def die(self) -> None:
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


class Heartbeat:
    """Tells the parent that this rank lives, where it is, and how it ended.

    With no parent (`status_fd` None: torchrun, a notebook, one process) every method is there and does
    nothing. Methods may be called from any thread.

    Attributes:
        stop_requested: set when the parent asks the rank to stop at the next block boundary.
    """

    def __init__(
        self,
        status_fd: int | None = None,
        life_fd: int | None = None,
        pipes: Callable[[int, int], Pipes] = _OwnPipes,
    ) -> None:
        self.stop_requested = threading.Event()
        self._pipes: Pipes | None = None
        # Re-entrant: a signal handler may report an error while the same thread is inside phase().
        self._lock = threading.RLock()
        self._where: dict[str, Any] = {}
        self._unsent = False
        self._credit = _PHASE_BURST
        self._credit_at = 0.0
        self._heard = b""
        if status_fd is None or life_fd is None:
            return
        self._pipes = found = pipes(status_fd, life_fd)
        self._credit_at = found.now()
        self._write(_TICK)
        found.beside(lambda: self._watch(found))

    @classmethod
    def from_env(cls) -> Heartbeat:
        """The line to the parent named by the environment, or one that does nothing.

        Call it once, first thing, and pass the object on: it takes the two variables out of the environment,
        so that a program started by this rank does not mistake its own descriptors for ours.
        """
        status, life = os.environ.pop(STATUS_FD, None), os.environ.pop(LIFE_FD, None)
        if status is None or life is None:
            return cls()
        _die_with_parent()
        return cls(int(status), int(life))

    @property
    def supervised(self) -> bool:
        """True when a parent listens."""
        return self._pipes is not None

    @property
    def where(self) -> dict[str, Any]:
        """The phase said last, and where it is."""
        return self._where

    @property
    def starting(self) -> bool:
        """True until the first phase of work: there is nothing to keep."""
        return str(self._where.get("phase", "start")).startswith("start")

    def pass_on(self, number: int, frame: object = None) -> None:
        """Tells the parent of a signal, which then stops the run as if it had come there. A signal handler."""
        self.message(signal=number)

    def phase(self, name: str, **where: Any) -> None:
        """Says what the rank does from now on, and where: ``stage`` or ``decoder``, ``block``, ``step``.

        Cheap enough for every unit. A name that starts with "wait" means waiting for another rank: the parent
        does not count that time against this one. A name that starts with "start" means imports and loading, which
        may hold the GIL for long: the parent is patient then, as it is before the first phase.
        """
        where["phase"] = name
        if self._pipes is None:
            self._where = where
            return
        now = self._pipes.now()
        # The machine's clock: it orders what several ranks say, whatever order that is read in.
        where["at"] = now
        with self._lock:
            self._where = where
            earned = (now - self._credit_at) * _PHASES_PER_SECOND
            self._credit = min(_PHASE_BURST, self._credit + earned)
            self._credit_at = now
            self._unsent = self._credit < 1.0 or not self._write(_line(where))
            if not self._unsent:
                self._credit -= 1.0

    def message(self, **fields: Any) -> None:
        """Passes fields on to the parent's ``on_message``. Dropped when the pipe is full: send totals."""
        if self._pipes is not None:
            self._write(_line(fields))

    def error(self, error: BaseException | str, peer: bool = False, exit_code: int | None = None) -> None:
        """Reports why this rank ends. Never dropped.

        Args:
            error: the exception, or a text. Long texts are cut. Keep prompts out: it ends in ``error.json``.
            peer: true if another rank went away, so that this is a consequence and not the cause.
            exit_code: the exit code for the whole run; None: the usual one, ``RANK_FAILED``.
        """
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        if self._pipes is None:
            return
        fields = {**self._where, "error": text, "peer": peer, "at": self._pipes.now()}
        if exit_code is not None:
            fields["exit_code"] = exit_code
        self._write_surely(_line(fields))

    def done(self) -> None:
        """Reports that this rank's work is finished and on disk. Never dropped; a good run's last call."""
        self._write_surely(_line({"done": True}))

    def _write(self, line: bytes) -> bool:
        """Writes one line or nothing; false if the pipe is full."""
        if self._pipes is None:
            return True
        try:
            self._pipes.write(line)
        except BlockingIOError:
            return False
        except OSError:
            # The parent is gone; the watching thread knows what to do about that.
            self._pipes = None
        return True

    def _write_surely(self, line: bytes) -> None:
        while (pipes := self._pipes) is not None and not self._write(line):
            pipes.sleep(0.01)

    def _watch(self, pipes: Pipes) -> None:
        while True:
            self._take(pipes, pipes.listen(TICK_SECONDS))

    def _take(self, pipes: Pipes, data: bytes | None) -> None:
        """Ticks, and listens on the life pipe between two ticks."""
        if data is None:
            self._write(_TICK)
            self._send_late_phase()
        elif not data:
            pipes.die()
        else:
            self._heard = (self._heard + data)[-256:]
            if STOP in self._heard:
                self.stop_requested.set()
                self._heard = b""

    def _send_late_phase(self) -> None:
        # Not waiting for the lock keeps the tick honest: this thread must never hang on the rank's own work.
        if self._unsent and self._lock.acquire(blocking=False):
            try:
                self._unsent = not self._write(_line(self._where))
            finally:
                self._lock.release()


def on_stop_signals(handler: Any) -> dict[int, Any]:
    """Gives the signals that end a run a handler, but SIGHUP where it is ignored (nohup). Main thread only.

    Returns:
        The handlers before, by signal.
    """
    numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    return {int(number): signal.signal(number, handler) for number in numbers}


def _line(fields: dict[str, Any]) -> bytes:
    """One JSON line of less than `_LINE_LIMIT` bytes; the longest texts are cut until it fits."""
    line = _to_json(fields).encode("utf-8", "replace") + b"\n"
    while len(line) >= _LINE_LIMIT:
        key = max(fields, key=lambda name: len(fields[name]) if isinstance(fields[name], str) else 0)
        text = fields[key]
        if not isinstance(text, str) or len(text) < 16:
            names = sorted(fields)
            raise ValueError(f"a message of {len(line)} bytes, fields {names}: use less than {_LINE_LIMIT} bytes")
        fields = {**fields, key: text[: len(text) * 3 // 4 - 3] + "..."}
        line = _to_json(fields).encode("utf-8", "replace") + b"\n"
    return line


def _die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, also while it is stopped or holds the GIL.

    The signal follows the parent's thread, not its process. That is safe here, since the thread that starts
    the ranks stays in the supervisor until they are gone. Elsewhere the life pipe does the work alone.
    """
    if sys.platform != "linux":
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
