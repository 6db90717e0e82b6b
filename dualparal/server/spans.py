"""Spans of a run while it lasts: the ranks append theirs to parts of a timeline, and here these are read on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from dualparal.trace.timeline import parts_of, place

_KEPT = 4000  # spans in memory
_EVERY = 0.1  # seconds between two looks
_BYTES = 1 << 20  # of a part at one look: what is left comes with the next
_LONGEST_LINE = 1 << 16


class Spans:
    """The newest spans of a run. Any thread may ask.

    Args:
        timeline: the path that the run was given.
    """

    def __init__(self, timeline: Path) -> None:
        self._folder = parts_of(timeline)
        self._lock = threading.Lock()
        self._parts: dict[str, tuple[BinaryIO, bytes]] = {}
        self._spans: deque[list[Any]] = deque(maxlen=_KEPT)
        self._count = 0
        self._next = 0.0
        self.updates: dict[int, int] = {}  # steps that are done, by the index of the video

    def after(self, seen: int) -> tuple[int, list[list[Any]]]:
        """The number of spans so far, and those after the first ``seen``, as far as they are kept.

        Each is [stage, row, kind, name, begin, duration, block], in seconds; rows are ``trace.timeline``'s.
        """
        self.look()
        with self._lock:
            fresh = min(self._count - seen, len(self._spans))
            return self._count, list(self._spans)[len(self._spans) - fresh :] if fresh > 0 else []

    def look(self) -> None:
        """Reads what the ranks have written since."""
        with self._lock:
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _EVERY
            try:
                names = sorted(path.name for path in self._folder.iterdir())
            except OSError:
                names = []  # not begun, or joined by now: what is open is read on
            for name in names:
                if name not in self._parts and name.startswith("rank-"):
                    with contextlib.suppress(OSError):
                        self._parts[name] = (self._folder / name).open("rb"), b""
            for name, (file, rest) in self._parts.items():
                *lines, rest = (rest + file.read(_BYTES)).split(b"\n")
                self._parts[name] = file, rest[:_LONGEST_LINE]
                for line in lines:
                    self._take(line)

    def close(self) -> None:
        """Closes the parts."""
        with self._lock:
            for file, _ in self._parts.values():
                file.close()
            self._parts.clear()
            self._next = float("inf")

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line.rstrip(b",\r"))
            if event["ph"] != "X":
                return
            stage, row = place(event)
            args, kind = event["args"], str(event["cat"])
            span = [stage, row, kind, str(event["name"]), event["ts"] / 1e6, event["dur"] / 1e6, args.get("block")]
        except (ValueError, LookupError, TypeError):
            return  # the bracket at the beginning, or a line that a killed rank left half written
        if kind == "update":
            video = int(args.get("video", 0))
            self.updates[video] = self.updates.get(video, 0) + 1
        self._spans.append(span)
        self._count += 1
