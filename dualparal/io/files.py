"""Files that appear under their name whole and synced, or not at all; a link planted in the way is never followed.

Used for everything this package writes under a name that a user gave. What the bytes mean is left to others.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("dualparal")


class WholeFile(io.FileIO):
    """A new file opened for this process alone, whose `write` writes everything or raises.

    A bare FileIO may write a part and return its length, on a full disk for example, and ffmpeg takes that
    for success. Unbuffered, because ffmpeg reads the file again by its name to put the index first.
    """

    def __init__(self, path: Path, mode: int) -> None:
        # An absolute name, since ffmpeg takes "a:b.mp4" for a protocol.
        name = str(path.absolute())
        self.failure: OSError | None = None
        super().__init__(name, "x+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, mode))

    def write(self, data: object) -> int:
        rest = memoryview(data).cast("B")  # type: ignore[arg-type]
        total = len(rest)
        while rest:
            try:
                rest = rest[super().write(rest) or 0 :]
            except OSError as error:
                # Kept, because what calls us may lose it: PyAV reports only the last one of a container.
                self.failure = self.failure or error
                raise
        return total


@contextmanager
def whole_file(path: Path, *, sync_directory: bool = True, mode: int = 0o666) -> Iterator[WholeFile]:
    """Opens a file that appears under ``path`` complete and synced, or not at all.

    Args:
        path: the final name; an existing file is replaced at the end.
        sync_directory: sync the folder too, without which a power cut may lose the name.
        mode: the permissions of the file, less the umask.

    Raises:
        OSError: the file cannot be written, or another process replaced it (FileExistsError).
    """
    aside = path.with_name(path.name + ".tmp")
    if aside.is_file() and not aside.is_symlink():
        aside.unlink()  # of a run that was killed
    try:
        file = WholeFile(aside, mode)
    except FileNotFoundError:
        raise _folder_gone(path) from None
    except FileExistsError:
        raise FileExistsError(
            errno.EEXIST,
            "a link, or just made by another process: not followed; remove it",
            str(aside),
        ) from None
    with file:
        try:
            yield file
            if file.failure is not None:
                raise file.failure
            os.fsync(file.fileno())
            if not path.parent.is_dir():
                raise _folder_gone(path)
            if not _is_still(file, aside):
                raise FileExistsError(errno.EEXIST, "another process replaced the file", str(aside))
            os.replace(aside, path)
        except BaseException as error:
            if _is_still(file, aside):
                aside.unlink()
            cause = file.failure or error
            if isinstance(cause, OSError) and cause.filename is None:
                cause.filename = str(path)  # "No space left on device" should say where
            if cause is not error and isinstance(error, Exception):
                raise cause from error
            raise
    if sync_directory:
        sync_folder(path.parent)


def _folder_gone(path: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "the folder was removed while the run wrote to it", str(path.parent))


def _is_still(file: io.FileIO, path: Path) -> bool:
    """True when ``path`` names the open file, and not a link or another file that took its place."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def sync_folder(directory: Path) -> None:
    """Syncs a folder: until then a power cut may lose a rename in it. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Makes a folder and those above it that are missing, each synced: what is in it lasts no longer than its name.

    Args:
        folder: where it is to be; it may be there already.
        mode: the permissions of a new one, less the umask; those above it have the usual ones.

    Raises:
        OSError: it cannot be made; FileExistsError: no folder is there.
    """
    missing = [each for each in folder.parents if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)
    new = not folder.exists()
    folder.mkdir(mode, exist_ok=True)
    if new:
        sync_folder(folder.parent)


def remove_leftovers(directory: Path, names: re.Pattern[str]) -> None:
    """Removes what a killed run left unfinished of files whose whole name matches ``names``. Raises OSError."""
    for entry in os.scandir(directory):
        stem, dot, ending = entry.name.rpartition(".")
        ours = dot and ending == "tmp" and names.fullmatch(stem)
        if ours and entry.is_file(follow_symlinks=False):  # a link is refused when its name is needed
            os.unlink(entry.path)
            logger.info("removed %s, left unfinished by an earlier run", entry.path)


def numbered(directory: Path, name: re.Pattern[str]) -> dict[int, Path]:
    """The files whose whole name matches ``name``, by the number in its first group. Raises OSError."""
    matches = ((name.fullmatch(entry.name), Path(entry.path)) for entry in os.scandir(directory))
    return {int(match[1]): path for match, path in matches if match}
