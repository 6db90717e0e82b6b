"""The private folder in which the ranks of a run meet, and the removal of those that killed runs have left.

A run holds a lock on its folder, which ends with its process however that ends: whoever gets the lock of another
folder knows that nobody uses it any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "dualparal-run-"


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A new folder for this user alone (mode 0700), removed at the end if it is still there. Raises OSError."""
    base = Path(tempfile.gettempdir())
    remove_abandoned(base)
    path, lock = _make(base)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_abandoned(base: Path) -> None:
    """Removes this user's run folders in ``base`` that no living run holds. Never raises: they are in nobody's way."""
    with contextlib.suppress(OSError):
        for path in base.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o700:
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _make(base: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return path, descriptor
        os.close(descriptor)  # another run took it for an abandoned one, in the moment before it was locked
