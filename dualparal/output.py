"""Where the frames of ``dualparal generate`` go: a video file that grows by closed segments, or PNG files.

While a video is made, its finished blocks lie as playable mp4 files (and a playlist) in ``NAME.mp4.blocks/``; at
the end, also after an interruption, they are joined without encoding again into ``NAME.mp4``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch


class OutputError(ValueError):
    """An output path that cannot be used, found before any work."""


class VideoOutput:
    """``NAME.mp4`` by way of ``NAME.mp4.blocks/``."""

    def __init__(self, path: Path, fps: float, keep_blocks: bool) -> None:
        from dualparal.video import SegmentWriter

        self.path = path
        self.keep_blocks = keep_blocks
        self.folder = path.with_name(path.name + ".blocks")
        self._writer = SegmentWriter(self.folder, fps)

    def write(self, block: int, frames: Any) -> None:
        self._writer.write(block, frames)

    def close(self) -> int:
        """Joins what is there; returns the number of frames."""
        from dualparal.video import join

        segments = self._writer.segments
        frames = join(segments, self.path) if segments else 0
        if not self.keep_blocks:
            shutil.rmtree(self.folder)
        return frames


class PictureOutput:
    """A folder of ``frame-00000001.png`` and so on."""

    def __init__(self, path: Path) -> None:
        from dualparal.video import PngWriter

        self.path = path
        self._writer = PngWriter(path)
        self._frames = 0

    def write(self, block: int, frames: Any) -> None:
        self._frames += len(self._writer.write(block, frames))

    def close(self) -> int:
        return self._frames


def check_out(path: Path, overwrite: bool) -> None:
    """Raises OutputError when ``path`` cannot become the output: a ``.mp4`` file or a folder for PNG files."""
    if path.suffix not in (".mp4", ""):
        raise OutputError(
            f"--out {path}: frames are written to a .mp4 file, or as PNG files to a folder (a name without an ending)"
        )
    if path.suffix == "" and path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"--out {path}: the folder is not empty; choose another one or pass --overwrite")
    if path.suffix == ".mp4" and path.is_dir():
        raise OutputError(f"--out {path} is a folder")
    check_file(path, "--out", overwrite or path.suffix == "")
    blocks = path.with_name(path.name + ".blocks")
    if path.suffix == ".mp4" and blocks.exists() and not overwrite:
        raise OutputError(
            f"--out {path}: {blocks} holds blocks of an earlier run that did not end; play or move "
            "them, choose another name, or pass --overwrite"
        )


def check_file(path: Path, flag: str, overwrite: bool) -> None:
    """Raises OutputError when a file cannot be written there, or is there already."""
    if path.exists() and not overwrite:
        raise OutputError(f"{flag} {path} exists; choose another name or pass --overwrite")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{flag} {path}: {folder} is not a folder that can be written to")


def open_output(path: Path, fps: float, keep_blocks: bool) -> VideoOutput | PictureOutput:
    """Opens a checked output, clearing what an earlier run left there (``check_out`` has refused if unasked)."""
    if path.suffix == ".mp4":
        shutil.rmtree(path.with_name(path.name + ".blocks"), ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return VideoOutput(path, fps, keep_blocks)
    for old in path.glob("frame-*.png"):
        old.unlink()
    return PictureOutput(path)


def read_latents(path: Path) -> torch.Tensor:
    """The tensor ``latents`` of a safetensors file, float32.

    Raises:
        ValueError: no such file, not safetensors, or without that tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            if "latents" not in handle.keys():  # noqa: SIM118 (not a dict)
                raise ValueError(f"--latents-in {path} holds {sorted(handle.keys())}; one tensor 'latents' is needed")
            tensor: torch.Tensor = handle.get_tensor("latents")
    except FileNotFoundError:
        raise ValueError(f"--latents-in {path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--latents-in {path} is not a safetensors file: {error}") from None
    return tensor.float()


def write_latents(path: Path, latents: torch.Tensor) -> None:
    """One tensor ``latents`` [1, C, L, H, W], float32, written aside, synced and renamed."""
    from safetensors.torch import save

    data = save({"latents": latents.float().contiguous().cpu()})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
