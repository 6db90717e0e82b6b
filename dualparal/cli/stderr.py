"""A stderr whose loss ends nothing: progress, warnings and errors go nowhere when nobody reads them any more."""

from __future__ import annotations

import io
import sys
from typing import Any

_STDERR = 2


class _Patient(io.FileIO):
    """A descriptor to which everything can be written: what it does not take is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:  # a closed pipe (`2>&1 | head`), a full disk, a terminal that is gone
            return memoryview(data).nbytes


def keep_stderr() -> None:
    """Makes ``sys.stderr`` one that does not raise, if it is the process's own. Threads and libraries use it too."""
    try:
        if sys.stderr is None or sys.stderr.fileno() != _STDERR:
            return
        raw = _Patient(_STDERR, "w", closefd=False)
    except (OSError, ValueError):  # closed, or replaced by what has no descriptor
        return
    encoding = sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", write_through=True)
