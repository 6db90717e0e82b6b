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
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_PREFIX = "dualparal-run-"
# Waits for the end of its input, and removes a folder; a second time where somebody still wrote into it.
_SWEEP = 'read -r _; rm -rf -- "$1" 2>/dev/null || { sleep 1; rm -rf -- "$1"; }'
_Flock = Callable[[int, int], object]


@contextlib.contextmanager
def run_folder(base: Path | None = None, flock: _Flock = fcntl.flock) -> Iterator[Path]:
    """A new folder for this user alone (mode 0700), removed at the end if it is still there.

    Args:
        base: where to make it. Default: the system's folder of temporary files.
        flock: locks a descriptor.

    Raises:
        OSError: it cannot be made.
    """
    base = base or Path(tempfile.gettempdir())
    remove_abandoned(base, flock)
    path, lock = _make(base, flock)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Meanwhile a process waits that removes the folder should this one be killed, which could not do it itself.

    Where it cannot be started the folder stays for the next run, see ``remove_abandoned``.
    """
    try:
        sweeper = subprocess.Popen(
            ["/bin/sh", "-c", _SWEEP, "sh", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": os.defpath},
            start_new_session=True,  # ctrl-C in the terminal is not for it
        )
    except OSError:
        yield
        return
    try:
        yield
    finally:
        sweeper.kill()
        sweeper.communicate()


def remove_abandoned(base: Path, flock: _Flock = fcntl.flock) -> None:
    """Removes this user's run folders in ``base`` that no living run holds. Never raises: they are in nobody's way."""
    with contextlib.suppress(OSError):
        for path in base.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                _remove_if_abandoned(path, flock)


def _remove_if_abandoned(path: Path, flock: _Flock) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o700:
            return
        flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _make(base: Path, flock: _Flock) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            return path, descriptor
        os.close(descriptor)  # another run took it for an abandoned one, in the moment before it was locked
