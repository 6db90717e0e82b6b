"""The outputs of ``dualparal generate``: a video file that grows by closed segments, or PNG files.

While a video is made, its finished blocks lie as playable mp4 files (and a playlist) in ``NAME.mp4.blocks/``; at
the end, also after an interruption, they are joined without encoding again into ``NAME.mp4``.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from dualparal.io.receipts import Receipt, Receipts, checksum_of, is_whole

_UNFINISHED = re.compile(r"block-\d{6,}\.mp4\.tmp").fullmatch

logger = logging.getLogger("dualparal")


class OutputError(ValueError):
    """An output path that cannot be used, found before any work."""


class Output(Protocol):
    """The place of a video's frames, as they come.

    Attributes:
        path: the value of --out.
        missing: blocks that an earlier run has written and that are not there, or not what it wrote.
    """

    path: Path
    missing: list[int]

    def write(self, block: int, frames: Any) -> Receipt:
        """Writes the frames of a block, uint8 [F, H, W, 3]. Raises ValueError, OSError."""
        ...

    def close(self) -> int:
        """Makes the video of what is there, up to the first missing block; returns the number of frames.

        Raises ValueError, OSError.
        """
        ...

    def remove_blocks(self) -> None:
        """Removes what nobody will go on with, after ``close``. Raises OSError."""
        ...


class VideoOutput:
    """``NAME.mp4`` by way of ``NAME.mp4.blocks/``."""

    def __init__(self, path: Path, fps: float, receipts: Receipts | None = None) -> None:
        """Opens the folder of segments.

        Args:
            path: the video file, made by ``close``.
            fps: frames per second.
            receipts: of the segments that an earlier run has written; all others are removed. None: it begins.

        Raises:
            ValueError: as ``SegmentWriter`` raises it.
            OSError: a folder or file cannot be made or removed.
        """
        from dualparal.io.video import SegmentWriter, segments_in

        self.path = path
        self.folder = blocks_of(path)
        self.missing = missing_blocks(path, receipts or {})
        if receipts is not None and self.folder.is_dir():
            for block, segment in segments_in(self.folder).items():
                if block not in receipts or block in self.missing:
                    segment.unlink()  # it will be made again
        self._writer = SegmentWriter(self.folder, fps, resume=receipts is not None)

    def write(self, block: int, frames: Any) -> Receipt:
        """Writes the frames of a block, uint8 [F, H, W, 3]. Raises ValueError, OSError."""
        path = self._writer.write(block, frames)
        self.missing = [other for other in self.missing if other != block]
        return Receipt(len(frames), checksum_of([path]))

    def close(self) -> int:
        """Joins the segments before the first missing one; returns the number of frames. Raises ValueError, OSError."""
        from dualparal.io.video import join

        segments = self._writer.segments_before(min(self.missing, default=None))
        return join(segments, self.path) if segments else 0

    def remove_blocks(self) -> None:
        """Removes the segments, after ``close``, when nobody will go on with them. Raises OSError."""
        remove_blocks(self.path)


class PictureOutput:
    """A folder of ``frame-00000001.png`` and so on."""

    def __init__(self, path: Path, receipts: Receipts | None = None) -> None:
        """Opens a folder.

        Args:
            path: the folder.
            receipts: of the blocks that an earlier run has left there; all other pictures are removed. None: it begins.

        Raises OSError.
        """
        from dualparal.io.pictures import PngWriter, pictures_in

        self.path = path
        known = receipts or {}
        self.missing = missing_blocks(path, known)
        self._places = _first_frames(known)  # block -> index of its first frame
        self._frames = sum(receipt.frames for receipt in known.values())
        if receipts is not None and path.is_dir():
            whole = {p.name for block in known if block not in self.missing for p in _files(path, known, block)}
            for picture in pictures_in(path).values():
                if picture.name not in whole:
                    picture.unlink()
        later = {1 + self._places[block] + n for block in self.missing for n in range(known[block].frames)}
        self._writer = PngWriter(path, resume_at=self._frames + 1 if self._frames else None, later=later)

    def write(self, block: int, frames: Any) -> Receipt:
        """Writes the frames of a block, uint8 [F, H, W, 3]. Raises ValueError, OSError."""
        if block in self.missing:
            paths = self._writer.write_again(1 + self._places[block], frames)
            self.missing.remove(block)
        else:
            paths = self._writer.write(block, frames)
            self._frames += len(frames)
        return Receipt(len(frames), checksum_of(paths))

    def close(self) -> int:
        """Returns the number of frames; every picture is closed already."""
        return self._frames

    def remove_blocks(self) -> None:
        """Leaves everything as it is: there are no segments."""


def blocks_of(path: Path) -> Path:
    """The folder of the segments of a video file."""
    return path.with_name(path.name + ".blocks")


def remove_blocks(path: Path) -> None:
    """Removes the segments of a video file that are left, and syncs that; pictures are no segments. Raises OSError."""
    from dualparal.io.files import sync_folder

    if path.suffix == ".mp4" and blocks_of(path).is_dir():
        shutil.rmtree(blocks_of(path))
        sync_folder(path.parent)  # before what says that they are not needed goes


def missing_blocks(path: Path, receipts: Receipts) -> list[int]:
    """The blocks whose files at an output are not those that the receipts were given for."""
    return [block for block, receipt in receipts.items() if not is_whole(receipt, _files(path, receipts, block))]


def _files(path: Path, receipts: Receipts, block: int) -> list[Path]:
    """The files of a block at an output."""
    from dualparal.io.pictures import picture_name
    from dualparal.io.video import segment_name

    if path.suffix == ".mp4":
        return [blocks_of(path) / segment_name(block)]
    first = 1 + _first_frames(receipts)[block]
    return [path / picture_name(number) for number in range(first, first + receipts[block].frames)]


def _first_frames(receipts: Receipts) -> dict[int, int]:
    """The index of the first frame of each block."""
    sizes = [receipts[block].frames for block in range(len(receipts))]
    return dict(enumerate(accumulate(sizes[:-1], initial=0))) if sizes else {}


def check_out(path: Path, overwrite: bool, resume: bool = False) -> None:
    """Checks that ``path`` can become the output: a ``.mp4`` file or a folder for PNG files.

    Args:
        path: the value of --out.
        overwrite: earlier outputs may be there, and are replaced.
        resume: the blocks or pictures of the run that goes on may be there.

    Raises:
        OutputError: it cannot.
    """
    blocks = blocks_of(path)
    overwrite = overwrite or (resume and (path.suffix == "" or blocks.is_dir()))
    _check_name(path, "--out")
    if path.suffix not in (".mp4", ""):
        raise OutputError(
            f"--out {path}: frames are written to a .mp4 file, or as PNG files to a folder (a name without an ending)"
        )
    if path.suffix == "" and path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"--out {path}: the folder is not empty; choose another one or pass --overwrite")
    if path.suffix == "" and path.exists() and not path.is_dir():
        raise OutputError(f"--out {path} is a file: give a .mp4 name, or a folder for PNG files")
    check_file(path, "--out", overwrite or path.suffix == "", folder=path.suffix == "")
    if path.suffix == ".mp4" and blocks.is_symlink():
        raise OutputError(f"--out {path}: {blocks} is a link, which is not followed; remove it")
    # Of a run that was killed before its first block, an empty folder is left.
    if path.suffix == ".mp4" and blocks.exists() and not overwrite and not (blocks.is_dir() and _holds_nothing(blocks)):
        raise OutputError(
            f"--out {path}: {blocks} holds finished blocks of a run that did not end (playlist.m3u plays them); "
            "move them away, choose another name, or pass --overwrite to drop them"
        )


def check_file(path: Path, flag: str, overwrite: bool, folder: bool = False) -> None:
    """Checks that a file (or a folder) can be made there, for the value of ``flag``.

    Raises:
        OutputError: it cannot be made, or is there already and ``overwrite`` is false.
    """
    _check_name(path, flag)
    if path.is_dir() and not folder:
        raise OutputError(f"{flag} {path} is a folder; give the name of a file")
    if os.path.lexists(path) and not overwrite:  # also a link that leads nowhere
        raise OutputError(f"{flag} {path} exists; choose another name or pass --overwrite")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not _can_hold_files(parent):
        raise OutputError(f"{flag} {path}: {parent} is not a folder that can be written to; choose another place")


def _can_hold_files(folder: Path) -> bool:
    """True when a file can be made there: root may write everywhere, but not in /proc, or where the disk is read only.

    Where there is no room it is true: what is written first says so.
    """
    if not os.access(folder, os.W_OK):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM)


def _check_name(path: Path, flag: str) -> None:
    """Refuses a name that no file can have: too long, or by way of a loop of links. Raises OutputError."""
    try:
        path.with_name(path.name + ".blocks").lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OutputError(f"{flag} {path}: {error.strerror}; choose another name") from None
    except ValueError:
        raise OutputError(f"{flag} {str(path)!r} holds a NUL byte; choose another name") from None


def remove_unfinished(path: Path) -> None:
    """Removes files that a run which was ended from outside had begun to write for ``path``. Errors are warnings."""
    from dualparal.io.files import remove_leftovers

    folder = path.with_name(path.name + ".blocks") if path.suffix == ".mp4" else path
    names = re.compile(r"block-\d{6,}\.mp4|playlist\.m3u|frame-\d{8,}\.png")
    try:
        if folder.is_dir() and not folder.is_symlink():
            remove_leftovers(folder, names)
        if path.suffix == ".mp4" and path.parent.is_dir():
            remove_leftovers(path.parent, re.compile(re.escape(path.name)))
    except OSError as error:
        logger.warning("%s: unfinished files were not removed: %s", folder, error)


def _holds_nothing(blocks: Path) -> bool:
    """True when a folder of segments holds none, nor anything that is not ours."""
    from dualparal.io.video import PLAYLIST

    return all(entry.name in (PLAYLIST, PLAYLIST + ".tmp") or _UNFINISHED(entry.name) for entry in os.scandir(blocks))


def what_is_left(path: Path, since: float) -> str:
    """A line on the place of the finished frames of a run that broke; empty: there are none.

    since: start of the run, seconds since the epoch.
    """
    if path.suffix == ".mp4":
        blocks = blocks_of(path)
        count = sum(1 for _ in blocks.glob("block-*.mp4"))
        if count:
            return f"{blocks}: {count} finished block{'s' if count > 1 else ''}; playlist.m3u there plays them"
    return f"{path} has the finished frames" if path.exists() and path.stat().st_mtime >= since else ""


def open_output(path: Path, fps: float, receipts: Receipts | None = None) -> Output:
    """Opens an output that ``check_out`` has passed. A video that begins clears what an earlier run left there.

    Args:
        path: a ``.mp4`` file, or a folder for PNG files.
        fps: frames per second of a video file.
        receipts: of the blocks that a resumed video has; what is not theirs is removed. None: it begins.

    Raises:
        ValueError, OSError: as the writers raise them.
    """
    if path.suffix == ".mp4":
        if receipts is None:
            shutil.rmtree(blocks_of(path), ignore_errors=True)
        return VideoOutput(path, fps, receipts)
    if receipts is None:
        for old in path.glob("frame-*.png"):
            old.unlink()
    return PictureOutput(path, receipts)
