"""Locks on what a run writes: a second run to the same place is refused, with the one that holds it.

The kernel frees a lock with the process, however that ends: a file that a killed run left locks nobody out. Where a
file system has no locks, a warning says so and the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from dualparal.io.files import make_folder
from dualparal.io.output import OutputError, check_file

logger = logging.getLogger("dualparal")

_ENDING = ".lock"
_MOST_BYTES = 4096  # of what a holder says of itself
_NOT_SUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def is_lock(path: Path) -> bool:
    """True for the name of a lock file."""
    return path.suffix == _ENDING


class Locks:
    """Locks that this process holds until ``release``. A file ``NAME.lock`` lies beside each place meanwhile."""

    def __init__(self, flock: Callable[[int, int], object] = fcntl.flock) -> None:
        self._flock = flock
        self._held: dict[Path, int] = {}  # lock file -> descriptor, which no child inherits
        self._made: list[Path] = []  # folders

    def __enter__(self) -> Locks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def hold(self, path: Path, flag: str) -> None:
        """Locks a file or folder that need not be there yet; one that is held already stays so.

        Args:
            path: its name, in any spelling: links in it are followed.
            flag: who wants it, for the message.

        Raises:
            OutputError: another run holds it, and it says which; or nothing can be written there.
            OSError: the lock file cannot be made.
        """
        check_file(path, flag, overwrite=True, folder=True)
        place = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
        file = place.with_name(place.name + _ENDING)
        if file in self._held:
            return
        self._make(file.parent)
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
            try:
                if self._lock(descriptor, file, path, flag):
                    self._held[file] = descriptor
                    return
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its holder has just removed it

    def _make(self, folder: Path) -> None:
        """Makes a folder, and notes what was not there. Raises OSError."""
        new = [each for each in (folder, *folder.parents) if not each.exists()]
        if new:
            make_folder(folder)
        self._made += reversed(new)

    def _lock(self, descriptor: int, file: Path, path: Path, flag: str) -> bool:
        """Locks an open file and writes down who we are. False: it is no longer the one under that name."""
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a file of ours", str(file))
        try:
            self._flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{flag} {path} is in use by {_holder(descriptor)}; wait for its end, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            logger.warning("%s: no locks on this file system; nothing keeps another run from writing there", path)
        try:
            if not os.path.samestat(os.fstat(descriptor), os.lstat(file)):
                return False
        except FileNotFoundError:
            return False
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        told = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(told).encode(), 0)
        return True

    def release(self) -> None:
        """Removes the lock files and frees the locks."""
        while self._held:
            file, descriptor = self._held.popitem()
            with contextlib.suppress(OSError):  # left behind it locks nobody out
                file.unlink()  # before it is freed: nobody else has it
            os.close(descriptor)
        while self._made:
            with contextlib.suppress(OSError):  # it is not empty: something was written
                self._made.pop().rmdir()


def _holder(descriptor: int) -> str:
    """The holder of a lock in words, as far as the file tells."""
    try:
        told = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        pid, host, since = int(told["pid"]), str(told["host"])[:64], str(told["since"])[:32]
    except (ValueError, LookupError, TypeError):
        return "another run"
    return f"another run (process {pid} on {host}, begun {since})"
