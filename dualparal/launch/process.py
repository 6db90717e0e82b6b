"""A rank as the parent sees it: its process, two pipes, and the state that its words gave."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dualparal.launch.blame import RankState
from dualparal.launch.heartbeat import STOP
from dualparal.launch.machine import Child

logger = logging.getLogger("dualparal")

_LINE_LIMIT = 1 << 16


@dataclass
class Rank:
    """One child process with the parent's ends of its two pipes, and the state that its words gave.

    Attributes:
        now: the machine's clock.
        open: the rank's end of the status pipe is not closed yet.
        buffer: the beginning of a line that is not complete.
    """

    child: Child
    state: RankState
    now: Callable[[], float]
    open: bool = True
    buffer: bytearray = field(default_factory=bytearray)

    def reap(self) -> bool:
        """Collects the exit code if there is one; true when the process is gone."""
        if self.state.exit is None:
            code = self.child.poll()
            if code is not None:
                self.state.exit, self.state.exited_at = code, self.now()
                # What the rank started goes with it. At once: its group's number could be given out again.
                self.signal_group(signal.SIGKILL)
        return self.state.exit is not None

    def signal_group(self, number: int) -> None:
        """Sends a signal to the rank and to all that it started."""
        with contextlib.suppress(OSError):
            self.child.signal_group(number)

    def ask_to_stop(self) -> None:
        """Asks the rank to stop at the next block boundary, over the life pipe."""
        with contextlib.suppress(OSError):
            self.child.write(STOP)

    def read(self) -> list[dict[str, Any]]:
        """Takes all complete messages from the pipe; ``open`` turns false at its end."""
        data = b"more"
        while data and len(self.buffer) < 16 * _LINE_LIMIT:  # a rank that floods us must not hold up the others
            try:
                data = self.child.read(_LINE_LIMIT)
            except BlockingIOError:
                break
            self.buffer += data
            self.open = bool(data)
        *lines, rest = self.buffer.split(b"\n")
        self.buffer = rest if len(rest) < _LINE_LIMIT else bytearray()
        return [message for message in map(_parse, lines) if message is not None]

    def close(self) -> None:
        """Closes the pipes; a rank that still lives dies of it."""
        self.child.close()


def _parse(line: bytearray) -> dict[str, Any] | None:
    """A line as a message; None: it is not one."""
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        logger.debug("a rank sent a line of %d bytes that is not a message", len(line))
        return None
    return message
