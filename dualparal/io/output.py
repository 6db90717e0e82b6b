"""The outputs of ``dualparal generate``: a video file that grows by closed segments, or PNG files.

While a video is made, its finished blocks lie as playable mp4 files (and a playlist) in ``NAME.mp4.blocks/``; at
the end, also after an interruption, they are joined without encoding again into ``NAME.mp4``.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger("dualparal")


class OutputError(ValueError):
    """An output path that cannot be used, found before any work."""


class VideoOutput:
    """``NAME.mp4`` by way of ``NAME.mp4.blocks/``."""

    def __init__(self, path: Path, fps: float, resume_at: int = 0) -> None:
        """Opens the folder of segments.

        Args:
            path: the video file, made by ``close``.
            fps: frames per second.
            resume_at: the block to go on with; segments before it must be there.

        Raises:
            OutputError: finished blocks before it are missing.
            ValueError: as ``SegmentWriter`` raises it.
        """
        from dualparal.io.video import SegmentWriter

        self.path = path
        self.folder = path.with_name(path.name + ".blocks")
        self._writer = SegmentWriter(self.folder, fps, resume=resume_at > 0)
        missing = set(range(resume_at)) - self._writer.blocks
        if missing:
            raise OutputError(f"{self.folder}: the segment of block {min(missing)} is missing; start anew")

    def write(self, block: int, frames: Any) -> None:
        """Writes the frames of a block, uint8 [F, H, W, 3]. Raises ValueError, OSError."""
        self._writer.write(block, frames)

    def close(self) -> int:
        """Joins the segments that are there; returns the number of frames. Raises ValueError, OSError."""
        from dualparal.io.video import join

        segments = self._writer.segments
        return join(segments, self.path) if segments else 0

    def remove_blocks(self) -> None:
        """Removes the segments, after ``close``, when nobody will go on with them."""
        shutil.rmtree(self.folder)


class PictureOutput:
    """A folder of ``frame-00000001.png`` and so on."""

    def __init__(self, path: Path, frames: int = 0) -> None:
        """Opens a folder. frames: number of pictures that an earlier run left there, to go on after."""
        from dualparal.io.pictures import PngWriter

        self.path = path
        self._writer = PngWriter(path, resume_at=frames + 1 if frames else None)
        self._frames = frames

    def write(self, block: int, frames: Any) -> None:
        """Writes the frames of a block, uint8 [F, H, W, 3]. Raises ValueError, OSError."""
        self._frames += len(self._writer.write(block, frames))

    def close(self) -> int:
        """Returns the number of frames; every picture is closed already."""
        return self._frames

    def remove_blocks(self) -> None:
        """Leaves everything as it is: there are no segments."""


def check_out(path: Path, overwrite: bool, resume: bool = False) -> None:
    """Checks that ``path`` can become the output: a ``.mp4`` file or a folder for PNG files.

    Args:
        path: the value of --out.
        overwrite: earlier outputs may be there, and are replaced.
        resume: the blocks or pictures of the run that goes on may be there.

    Raises:
        OutputError: it cannot.
    """
    blocks = path.with_name(path.name + ".blocks")
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
    if path.suffix == ".mp4" and blocks.exists() and not overwrite:
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
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{flag} {path}: {parent} is not a folder that can be written to; choose another place")


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


def what_is_left(path: Path, since: float) -> str:
    """A line on the place of the finished frames of a run that broke; empty: there are none.

    since: start of the run, seconds since the epoch.
    """
    if path.suffix == ".mp4":
        blocks = path.with_name(path.name + ".blocks")
        count = sum(1 for _ in blocks.glob("block-*.mp4"))
        if count:
            return f"{blocks}: {count} finished block{'s' if count > 1 else ''}; playlist.m3u there plays them"
    return f"{path} has the finished frames" if path.exists() and path.stat().st_mtime >= since else ""


def open_output(path: Path, fps: float, block: int = 0, frames: int = 0) -> VideoOutput | PictureOutput:
    """Opens an output that ``check_out`` has passed. A video that begins clears what an earlier run left there.

    Args:
        path: a ``.mp4`` file, or a folder for PNG files.
        fps: frames per second of a video file.
        block, frames: the block that a resumed video goes on with, and the number of frames before it.

    Raises:
        OutputError: segments before the block are missing.
        ValueError, OSError: as the writers raise them.
    """
    if path.suffix == ".mp4":
        if block == 0:
            shutil.rmtree(path.with_name(path.name + ".blocks"), ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return VideoOutput(path, fps, block)
    if block == 0:
        for old in path.glob("frame-*.png"):
            old.unlink()
    return PictureOutput(path, frames)
