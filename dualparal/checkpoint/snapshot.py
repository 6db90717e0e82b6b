"""Snapshots of a run on disk: latents, sampler states and prompts at the start of an iteration that can be restarted.

A folder holds the final latents of finished blocks, a file each, and the last snapshots. Every file is written aside,
synced and renamed, and its name ends in a checksum of all its bytes: safetensors loads a flipped bit without a word.
What is read is data from outside: nothing is trusted before the checksum and the shapes fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dualparal.io.files import whole_file
from dualparal.sampling.state import BlockState

logger = logging.getLogger("dualparal")

FORMAT = "dualparal-snapshot"
VERSION = 1
KEEP = 2  # snapshots: one may turn out to be damaged

_HEADER_LIMIT = 1 << 20  # bytes; a legal header of 81 MB takes seconds and gigabytes to parse
_SNAPSHOT = re.compile(r"snapshot-(\d{10})-([0-9a-f]{32})\.safetensors")
_BLOCK = re.compile(r"video-(\d{3,})-block-(\d{6,})-([0-9a-f]{32})\.safetensors")
_NOISE = re.compile(r"noise-([0-9a-f]{32})\.safetensors")
_TENSOR = "tensor:"  # in the JSON tree of a snapshot: the name of a tensor in the file


class SnapshotError(ValueError):
    """A snapshot that cannot be read or does not fit; names the file and what is wrong with it."""


@dataclass(frozen=True)
class Snapshot:
    """A run at the start of an iteration.

    Attributes:
        iteration: the one that a resumed run begins with.
        run: description of the run, JSON values (``engine.identity.snapshot_info``).
        prompts: for each video, first block -> embeddings [branches, tokens, text_dim].
        blocks: for each video, block in flight -> latents [1, C, F, H, W] float32, sampler state and kept velocities.
    """

    iteration: int
    run: dict[str, Any]
    prompts: Sequence[Mapping[int, torch.Tensor]]
    blocks: Sequence[Mapping[int, BlockState]]

    def _state(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "prompts": [{str(block): embeds for block, embeds in video.items()} for video in self.prompts],
            "blocks": [
                {
                    str(block): {
                        "latents": state.latents,
                        "sampler": dict(state.sampler),
                        "velocities": [list(branch) for branch in state.velocities],
                    }
                    for block, state in video.items()
                }
                for video in self.blocks
            ],
        }

    def write(self, folder: Path) -> Path:
        """Writes the snapshot to a folder, syncs it, and only then removes the ones before the last ``KEEP``.

        Returns:
            The path of its file.

        Raises:
            OSError: it cannot be written; nothing of it is left then.
            SnapshotError: latents with NaN or infinity, from which nobody wants to go on.
        """
        tensors: dict[str, torch.Tensor] = {}
        state = _strip(self._state(), tensors, "")
        for name, tensor in tensors.items():
            # Any NaN or infinity shows in the sum, which is read faster than all of it is compared.
            if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
                raise SnapshotError(f"snapshot of iteration {self.iteration}: {name} holds NaN or infinity; not kept")
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "run": json.dumps(self.run),
            "state": json.dumps(state),
        }
        path = _write(folder, f"snapshot-{self.iteration:010d}", tensors, metadata)
        for old in _snapshots(folder)[KEEP:]:
            old.unlink(missing_ok=True)
        return path


@dataclass(frozen=True)
class Resumed:
    """A snapshot that a run goes on from, and the name of its file."""

    snapshot: Snapshot
    name: str


def newest(folder: Path) -> Resumed:
    """The newest whole snapshot of a folder, with its file's name; damaged ones are passed over with a warning.

    Raises:
        SnapshotError: there is none; says what is wrong with each.
    """
    found = _snapshots(folder)
    reasons = []
    for path in found:
        try:
            return Resumed(read(path), path.name)
        except SnapshotError as error:
            reasons.append(str(error))
            logger.warning("%s; trying the one before", error)
    if not reasons:
        raise SnapshotError(f"{folder} holds no snapshot; use a folder that --checkpoint has filled, or start anew")
    raise SnapshotError(f"no snapshot in {folder} can be used: " + "; ".join(reasons))


def read(path: Path) -> Snapshot:
    """Reads a snapshot file.

    Raises:
        SnapshotError: anything but a whole snapshot of this format and version.
    """
    tensors, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise SnapshotError(f"{path} is not a snapshot of dualparal")
    if metadata.get("version") != str(VERSION):
        raise SnapshotError(
            f"{path} has version {metadata.get('version')!r} of the format, and this dualparal reads {VERSION}; "
            "resume with the release that wrote it"
        )
    try:
        run, state = json.loads(metadata["run"]), _fill(json.loads(metadata["state"]), tensors)
        prompts = [{_number(block): _tensor(t, 3) for block, t in video.items()} for video in state["prompts"]]
        blocks = [
            {
                _number(block): BlockState(
                    _tensor(s["latents"], 5),
                    dict(s["sampler"]),
                    [[_tensor(velocity, 5) for velocity in branch] for branch in s["velocities"]],
                )
                for block, s in video.items()
            }
            for video in state["blocks"]
        ]
        if not isinstance(run, dict) or len(prompts) != len(blocks) or not prompts:
            raise ValueError("the run it belongs to is not described")
        iteration = _number(state["iteration"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise SnapshotError(f"{path}: not a snapshot's contents ({type(error).__name__}: {error})") from None
    return Snapshot(iteration, run, prompts, blocks)


def write_block(folder: Path, video: int, block: int, latents: torch.Tensor) -> Path:
    """Writes the final latents [1, C, F, H, W] of a block, and returns the path of the file.

    A file that was there with other contents is replaced, and a warning says so. Raises OSError.
    """
    path = _write(folder, f"video-{video:03d}-block-{block:06d}", {"latents": latents}, {"format": FORMAT})
    for old in _blocks(folder).get((video, block), []):
        if old != path:
            logger.warning(
                "block %d was made again and is not what it was: another card, or another version of torch? "
                "The video is whole, but not the one of an unbroken run",
                block,
            )
            old.unlink()
    return path


def read_blocks(folder: Path, video: int, blocks: range) -> list[torch.Tensor]:
    """Reads the final latents [1, C, F, H, W] of some blocks of a video, in their order.

    Raises:
        SnapshotError: one is missing or damaged.
    """
    files = _blocks(folder)
    result = []
    for block in blocks:
        paths = files.get((video, block), [])
        if not paths:
            raise SnapshotError(f"{folder}: the latents of block {block} are missing; start anew")
        tensors, _ = _read(paths[-1])
        result.append(_tensor(tensors.get("latents"), 5))
    return result


def forget_blocks(folder: Path, video: int, before: int) -> None:
    """Removes the latents of a video's blocks before block ``before``, which no resume will need."""
    for (owner, block), paths in _blocks(folder).items():
        if owner == video and block < before:
            for path in paths:
                path.unlink(missing_ok=True)


def write_noise(folder: Path, noise: torch.Tensor) -> str:
    """Writes initial noise [videos, C, L, H, W] that was given instead of a seed; returns the name of its file.

    Raises OSError.
    """
    return _write(folder, "noise", {"latents": noise}, {"format": FORMAT}).name


def read_noise(folder: Path, name: str) -> torch.Tensor:
    """Reads the noise [videos, C, L, H, W] that ``write_noise`` wrote under ``name``.

    Raises:
        SnapshotError: not such a name, or the file is missing or damaged.
    """
    if not _NOISE.fullmatch(name):
        raise SnapshotError(f"{name!r} is not the name of a file with noise")
    return _tensor(_read(folder / name)[0].get("latents"), 5)


def prepare(folder: Path) -> None:
    """Makes a folder for the snapshots of a new run. Raises SnapshotError when it holds something, or OSError."""
    check_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def check_empty(folder: Path) -> None:
    """Checks that a folder is absent or empty. Raises SnapshotError when it holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "snapshots of an earlier run: resume it" if folder.is_dir() and _snapshots(folder) else "something else"
        raise SnapshotError(f"checkpoint {folder} holds {what}, or choose an empty folder")


def remove_leftovers(folder: Path, name: str) -> None:
    """Removes what a run that was killed left half-written, and snapshots newer than the one in use.

    Those newer ones were passed over as damaged. ``name`` is the file of the one in use; empty: none is.
    """
    for path in _snapshots(folder):
        if name and path.name > name:
            path.unlink()
    for path in list(folder.iterdir()):
        if path.name.endswith(".tmp") and _is_ours(path.name.removesuffix(".tmp")):
            path.unlink()


def clear(folder: Path) -> None:
    """Removes all files of this module from a folder, and the folder if nothing else is in it."""
    for path in list(folder.iterdir()):
        if _is_ours(path.name.removesuffix(".tmp")):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_ours(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_SNAPSHOT, _BLOCK, _NOISE))


def _snapshots(folder: Path) -> list[Path]:
    """The snapshot files of a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _SNAPSHOT.fullmatch(path.name)), reverse=True)


def _blocks(folder: Path) -> dict[tuple[int, int], list[Path]]:
    """The files of final latents in a folder, by video and block."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if match := _BLOCK.fullmatch(path.name):
            found.setdefault((int(match[1]), int(match[2])), []).append(path)
    return found


def _write(folder: Path, stem: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    path = folder / f"{stem}-{_checksum(data)}.safetensors"
    with whole_file(path, mode=0o600) as file:  # embeddings tell of the prompt
        file.write(data)
    return path


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]  # half of it: against damage, not against forgers


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads tensors and metadata of a file of ours, after its checksum. Raises SnapshotError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SnapshotError(f"{path} is not a file")
            data = file.read()
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}") from None
    if not path.stem.endswith("-" + _checksum(data)):
        raise SnapshotError(f"{path} is damaged: its checksum is not the one in its name")
    if len(data) < 8 or not 2 <= int.from_bytes(data[:8], "little") <= min(_HEADER_LIMIT, len(data) - 8):
        raise SnapshotError(f"{path} has no header, or one of more than {_HEADER_LIMIT} bytes")
    try:
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        # Copies, since those of safetensors lie in its bytes, and where a tensor lies may decide its rounding.
        tensors = {name: tensor.clone() for name, tensor in load(data).items()}
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise SnapshotError(f"{path} is not a safetensors file: {error}") from None
    if not isinstance(metadata, dict):
        raise SnapshotError(f"{path} has no metadata")
    return tensors, metadata


def _strip(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """The value as a tree of JSON values; its tensors are put into ``tensors``, named by their paths in the tree."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return _TENSOR + name
    if isinstance(value, dict):
        return {key: _strip(item, tensors, f"{name}/{key}" if name else key) for key, item in value.items()}
    if isinstance(value, list):
        return [_strip(item, tensors, f"{name}/{number}") for number, item in enumerate(value)]
    return value


def _fill(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of ``_strip``. Raises KeyError for a tensor that is not there."""
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {key: _fill(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, tensors) for item in value]
    return value


def _number(value: Any) -> int:
    """An index from JSON, where keys are text, as an int. Raises ValueError."""
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 16 else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 10**15:
        raise ValueError(f"{value!r} is not a number of something")
    return number


def _tensor(value: Any, dimensions: int) -> torch.Tensor:
    """The value itself, a floating-point tensor of so many dimensions. Raises SnapshotError for anything else."""
    if not isinstance(value, torch.Tensor) or value.ndim != dimensions or not value.is_floating_point():
        raise SnapshotError(f"a tensor of {dimensions} dimensions is missing")
    return value
