"""The machine that a supervisor runs on: its clock, the signals that come to it, and the processes that it starts."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from dualparal.launch.folder import run_folder, swept
from dualparal.launch.heartbeat import LIFE_FD, STATUS_FD, on_stop_signals


class Child(Protocol):
    """A process that was started, and the parent's ends of its two pipes."""

    @property
    def pid(self) -> int:
        """The process, which leads a group of its own."""
        ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None: it lives."""
        ...

    def read(self, most: int) -> bytes:
        """Up to ``most`` bytes of the status pipe; none at its end. Raises BlockingIOError: there is nothing yet."""
        ...

    def write(self, data: bytes) -> object:
        """Writes into the life pipe. Raises OSError."""
        ...

    def signal_group(self, number: int) -> object:
        """Sends a signal to the process and to all that it started. Raises OSError."""
        ...

    def close(self) -> None:
        """Closes the pipes; a process that still lives dies of it."""
        ...


class Machine(Protocol):
    """The part of a machine that a supervisor asks. Times are seconds on its monotonic clock."""

    def now(self) -> float:
        """The time."""
        ...

    def sleep(self, seconds: float) -> object:
        """Waits."""
        ...

    def wait(self, seconds: float) -> object:
        """Waits until there is something to read from a child, at most ``seconds``; true: there is."""
        ...

    def start(self, argv: Sequence[str], env: Mapping[str, str]) -> Child:
        """Starts a process, with ``env`` added to this one's own. Raises OSError."""
        ...

    def forget(self, child: Child) -> object:
        """Leaves a child, whose pipe has ended, out of ``wait``."""
        ...

    def signals(self, take: Callable[[int], object]) -> contextlib.AbstractContextManager[object]:
        """Gives the signals that end a run to ``take`` meanwhile."""
        ...

    def folder(self) -> contextlib.AbstractContextManager[Path]:
        """A private folder, removed at the end. Raises OSError."""
        ...


class ThisMachine:
    """The one we are on. For one run."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, seconds: float) -> bool:
        return bool(self._selector.select(seconds))

    def start(self, argv: Sequence[str], env: Mapping[str, str]) -> Child:
        child = _Process(argv, env)
        self._selector.register(child.status_fd, selectors.EVENT_READ, child)
        return child

    def forget(self, child: Child) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is child:
                self._selector.unregister(key.fileobj)

    @contextlib.contextmanager
    def signals(self, take: Callable[[int], object]) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            # Python allows handlers in the main thread only; there the owner calls Supervisor.interrupt().
            yield
            return

        def note(number: int, _: FrameType | None) -> None:
            take(number)

        before = on_stop_signals(note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        with self._selector, run_folder() as path, swept(path):
            yield path


class _Process:
    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.status_fd, status_write = os.pipe()
        life_read, self._life_fd = os.pipe()
        try:
            self._process = subprocess.Popen(
                argv,
                env={**os.environ, **env, STATUS_FD: str(status_write), LIFE_FD: str(life_read)},
                stdin=subprocess.DEVNULL,
                pass_fds=(status_write, life_read),
                # A session of its own: ctrl-C in the terminal reaches the parent alone, which decides.
                start_new_session=True,
            )
        except BaseException:
            self.close()
            raise
        finally:
            os.close(status_write)
            os.close(life_read)
        os.set_blocking(self.status_fd, False)
        os.set_blocking(self._life_fd, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def read(self, most: int) -> bytes:
        return os.read(self.status_fd, most)

    def write(self, data: bytes) -> None:
        os.write(self._life_fd, data)

    def signal_group(self, number: int) -> None:
        os.killpg(self.pid, number)

    def close(self) -> None:
        for fd in (self.status_fd, self._life_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
