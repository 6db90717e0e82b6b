"""Frames as numbered PNG files, each of which appears whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dualparal.io.files import make_folder, numbered, remove_leftovers, sync_folder, whole_file

Frames = npt.NDArray[np.uint8]  # [F, H, W, 3]
_PICTURE_NAME = re.compile(r"frame-(\d{8,})\.png")


class PngWriter:
    """Writes single pictures, `frame-00000001.png` and on, numbered over the whole video."""

    def __init__(self, directory: str | Path, *, resume_at: int | None = None, later: Collection[int] = ()) -> None:
        """Makes ``directory`` if needed and clears what a killed run left half-written.

        Args:
            resume_at: number of the next frame, from 1; frames found from there on are written again.
            later: numbers before it that ``write_again`` will write; they may be missing.

        Raises:
            ValueError: the directory holds frames and ``resume_at`` is not given, or one before it is missing.
        """
        self._directory = Path(directory)
        make_folder(self._directory)
        remove_leftovers(self._directory, _PICTURE_NAME)
        found = numbered(self._directory, _PICTURE_NAME)
        if found and resume_at is None:
            raise ValueError(
                f"{self._directory} holds {len(found)} frames of an earlier run: pass resume_at, or choose "
                "an empty directory"
            )
        self._next = 1 if resume_at is None else resume_at
        missing = next((number for number in range(1, self._next) if number not in found and number not in later), None)
        if self._next < 1 or missing is not None:
            raise ValueError(
                f"resume_at={resume_at}: frames are counted from 1 and all before it must be there"
                + (f", frame {missing} is not" if missing else "")
            )
        self._block = -1

    def write(self, block: int, frames: Frames) -> list[Path]:
        """Writes the frames of the next block, uint8 [F, H, W, 3]; returns their paths.

        Raises:
            ValueError: a wrong array, or a block out of order (a frame's number follows from those before it).
            OSError: a picture cannot be written; those before it are whole, none is half there.
        """
        if block <= self._block:
            raise ValueError(
                f"block={block} after block {self._block}: pictures are numbered as they come; write in order"
            )
        check_frames(frames)
        paths = self._write(self._next, frames)
        self._next += len(paths)
        self._block = block
        return paths

    def write_again(self, first: int, frames: Frames) -> list[Path]:
        """Writes frames under numbers from ``first`` on that came before. Returns and raises as ``write``."""
        check_frames(frames)
        return self._write(first, frames)

    def _write(self, first: int, frames: Frames) -> list[Path]:
        from PIL import Image

        paths = []
        for number, picture in enumerate(frames, first):
            path = self._directory / picture_name(number)
            with whole_file(path, sync_directory=False) as file:  # once below, not for each picture
                Image.fromarray(picture).save(file, format="PNG")
            paths.append(path)
        sync_folder(self._directory)
        return paths


def picture_name(number: int) -> str:
    """The name of a frame's picture."""
    return f"frame-{number:08d}.png"


def pictures_in(directory: Path) -> dict[int, Path]:
    """The files (or links) with names of pictures in a folder, by number. Raises OSError."""
    return numbered(directory, _PICTURE_NAME)


def check_frames(frames: Frames) -> None:
    """Checks that frames are uint8 [F, H, W, 3] with at least one pixel. Raises ValueError."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(
            f"frames of shape {list(frames.shape)} and type {frames.dtype}: a writer takes uint8 [frames, "
            "height, width, 3] with at least one frame; dualparal.decoding.frames.to_uint8 makes them"
        )
