"""Snapshots of a run on disk: latents, sampler states and prompts at the start of an iteration that can be restarted.

A folder holds the final latents of finished blocks, a file each, and the last snapshots, all of them sealed by a
checksum and with the id of their run. What is read is data from outside: nothing is trusted before the contents fit.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dualparal.checkpoint import sealed
from dualparal.checkpoint.given import FORMAT, NAMES, floats
from dualparal.checkpoint.sealed import SnapshotError
from dualparal.io.files import make_folder, sync_folder
from dualparal.io.locks import is_lock
from dualparal.sampling.state import BlockState

logger = logging.getLogger("dualparal")

VERSION = 2
KEEP = 2  # snapshots: one may turn out to be damaged

UNDER_WAY, FINISHED, JOINED = ENDS = "", "finished", "joined"

_SNAPSHOT = re.compile(r"snapshot-(\d{10})-([0-9a-f]{32})\.safetensors")
_BLOCK = re.compile(r"video-(\d{3,})-block-(\d{6,})-([0-9a-f]{32})\.safetensors")
_TENSOR = "tensor:"  # in the JSON tree of a snapshot: the name of a tensor in the file


@dataclass(frozen=True)
class Snapshot:
    """A run at the start of an iteration.

    Attributes:
        iteration: the one that a resumed run begins with.
        run: description of the run, JSON values (``engine.identity.snapshot_info``); "id" is in all of its files.
        prompts: for each video, first block -> embeddings [branches, tokens, text_dim].
        blocks: for each video, block in flight -> latents [1, C, F, H, W] float32, sampler state and kept velocities.
        end: one of ``ENDS``: blocks are in flight, all are finished, or what was to be made of them is there, too.
        receipts: JSON values of the consumer on the blocks that are finished (``Checkpoint.receipts``).
    """

    iteration: int
    run: dict[str, Any]
    prompts: Sequence[Mapping[int, torch.Tensor]]
    blocks: Sequence[Mapping[int, BlockState]]
    end: str = UNDER_WAY
    receipts: Any = None

    @property
    def id(self) -> str:
        """The id of the run."""
        return str(self.run.get("id"))

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
            "end": self.end,
            # Bytes of a tensor: of long videos they would be too much for a header.
            "receipts": torch.frombuffer(bytearray(json.dumps(self.receipts).encode()), dtype=torch.uint8),
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
            "id": self.id,
            "run": json.dumps(self.run),
            "state": json.dumps(state),
        }
        path = sealed.write(folder, f"snapshot-{self.iteration:010d}", tensors, metadata)
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
    runs = {path: told["id"] for path in found if "id" in (told := sealed.told(path))}
    if len(set(runs.values())) > 1:
        names = " and ".join(path.name for path in list(runs)[:3])
        raise SnapshotError(f"{folder} holds snapshots of several runs ({names}): remove those that do not belong here")
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


def has_snapshots(folder: Path) -> bool:
    """True when there is a snapshot in a folder, be it damaged."""
    return bool(_snapshots(folder))


def read(path: Path) -> Snapshot:
    """Reads a snapshot file.

    Raises:
        SnapshotError: anything but a whole snapshot of this format and version.
    """
    tensors, metadata = sealed.read(path)
    if metadata.get("format") != FORMAT:
        raise SnapshotError(f"{path} is not a snapshot of dualparal")
    if metadata.get("version") != str(VERSION):
        raise SnapshotError(
            f"{path} has version {metadata.get('version')!r} of the format, and this dualparal reads {VERSION}; "
            "resume with the release that wrote it"
        )
    try:
        run, state = json.loads(metadata["run"]), _fill(json.loads(metadata["state"]), tensors)
        prompts = [{_number(block): floats(t, 3) for block, t in video.items()} for video in state["prompts"]]
        blocks = [
            {
                _number(block): BlockState(
                    floats(s["latents"], 5),
                    dict(s["sampler"]),
                    [[floats(velocity, 5) for velocity in branch] for branch in s["velocities"]],
                )
                for block, s in video.items()
            }
            for video in state["blocks"]
        ]
        if not isinstance(run, dict) or len(prompts) != len(blocks) or not prompts:
            raise ValueError("the run it belongs to is not described")
        iteration, end = _number(state["iteration"]), state["end"]
        if end not in ENDS or (end != UNDER_WAY and any(blocks)):
            raise ValueError(f"an end {str(end)[:20]!r}")
        receipts = json.loads(bytes(state["receipts"].numpy()))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise SnapshotError(f"{path}: not a snapshot's contents ({type(error).__name__}: {error})") from None
    return Snapshot(iteration, run, prompts, blocks, end, receipts)


def write_block(folder: Path, run: str, video: int, block: int, latents: torch.Tensor) -> Path:
    """Writes the final latents [1, C, F, H, W] of a block, and returns the path of the file.

    A file that was there with other contents is replaced, and a warning says so. Raises OSError.
    """
    path = sealed.write(
        folder, f"video-{video:03d}-block-{block:06d}", {"latents": latents}, _block_metadata(run, video, block)
    )
    for old in _blocks(folder).get((video, block), []):
        if old != path:
            logger.warning(
                "block %d was made again and is not what it was: another card, or another version of torch? "
                "The video is whole, but not the one of an unbroken run",
                block,
            )
            old.unlink()
    return path


def _block_metadata(run: str, video: int, block: int) -> dict[str, str]:
    # In one entry: safetensors writes several in any order, and the same latents would be another file.
    return {"block": json.dumps([FORMAT, run, video, block])}


def read_blocks(folder: Path, run: str, video: int, blocks: range) -> list[torch.Tensor]:
    """Reads the final latents [1, C, F, H, W] of some blocks of a run's video, in their order.

    Raises:
        SnapshotError: one is missing, damaged, or another block's or run's.
    """
    files = _blocks(folder)
    result = []
    for block in blocks:
        paths = files.get((video, block), [])
        if not paths:
            raise SnapshotError(f"{folder}: the latents of block {block} are missing; start anew")
        result.append(_read_block(paths[-1], run, video, block))
    return result


def _read_block(path: Path, run: str, video: int, block: int) -> torch.Tensor:
    tensors, metadata = sealed.read(path)
    if metadata != _block_metadata(run, video, block):
        what = "another block or video" if _run_of(metadata) == run else "another run"
        raise SnapshotError(f"{path} is of {what}; put back the file that belongs there, or start anew")
    return floats(tensors.get("latents"), 5)


def _run_of(metadata: dict[str, Any]) -> Any:
    """The id of the run that a file of latents says it belongs to; None: it says none."""
    try:
        return json.loads(metadata["block"])[1]
    except (ValueError, LookupError, TypeError):
        return None


def check_blocks(found: Snapshot, folder: Path, first: int) -> None:
    """Checks the final latents in a folder: all of them are the run's, and those before block ``first`` are whole.

    Raises:
        SnapshotError: one is not.
    """
    for (video, block), paths in _blocks(folder).items():
        for path in paths:
            if block < first:
                _read_block(path, found.id, video, block)
            elif _run_of(sealed.told(path)) not in (found.id, None):  # a damaged one will be made again
                raise SnapshotError(f"{path} is of another run; remove it, or start anew")


def forget_blocks(folder: Path, video: int, done: range) -> None:
    """Removes the latents of a video's blocks that no resume will need."""
    for (owner, block), paths in _blocks(folder).items():
        if owner == video and block in done:
            for path in paths:
                path.unlink(missing_ok=True)


def prepare(folder: Path) -> None:
    """Makes a folder for the snapshots of a new run. Raises SnapshotError when it holds something, or OSError."""
    check_empty(folder)
    make_folder(folder, mode=0o700)
    for path in list(folder.iterdir()):
        if not is_lock(path):  # of this run's own outputs
            path.unlink()  # see there


def check_empty(folder: Path) -> None:
    """Checks that a folder is absent or empty, but for what a run left that was killed before its first snapshot.

    Raises SnapshotError when it holds something else.
    """
    there = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() else []
    others = sorted(path for path in there if not _is_before_the_first(path) and not is_lock(path))
    if others:
        earlier = folder.is_dir() and _snapshots(folder)
        what = "snapshots of an earlier run: resume it, or" if earlier else f"something else ({others[0].name}):"
        raise SnapshotError(f"checkpoint {folder} holds {what} choose an empty folder")


def _is_before_the_first(path: Path) -> bool:
    """True for what was given to a run, and for a file that was not finished: without a snapshot they serve nothing."""
    name = path.name.removesuffix(".tmp")
    return _is_ours(name) and (name != path.name or bool(NAMES.fullmatch(name)))


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


def close(folder: Path, keep: bool = False) -> None:
    """Removes all files of this module from a folder, the last snapshot last, and the folder if it is empty then.

    Args:
        keep: the last snapshot stays, which says that the run is done.
    """
    if not folder.is_dir():
        return
    last = _snapshots(folder)[:1]
    for path in list(folder.iterdir()):
        if path not in last and _is_ours(path.name.removesuffix(".tmp")):
            path.unlink()
    sync_folder(folder)  # or a power cut may bring back an older one in place of the last
    for path in [] if keep else last:
        path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_ours(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_SNAPSHOT, _BLOCK, NAMES))


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
