"""Files of tensors that a checksum in their name guards: written whole and synced, read with distrust.

safetensors loads a flipped bit without a word, so a name ends in a checksum of all bytes. What is read is data from
outside: nothing is trusted before the checksum fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dualparal.io.files import whole_file

_HEADER_LIMIT = 1 << 20  # bytes; a legal header of 81 MB takes seconds and gigabytes to parse


class SnapshotError(ValueError):
    """A snapshot that cannot be read or does not fit; names the file and what is wrong with it."""


def write(folder: Path, stem: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Writes a file of tensors and returns its path, ``stem`` and the checksum. Raises OSError."""
    data = save(_apart(tensors), metadata)
    path = folder / f"{stem}-{checksum(data)}.safetensors"
    with whole_file(path, mode=0o600) as file:  # embeddings tell of the prompt
        file.write(data)
    return path


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the CPU, none of which shares its memory: two videos of one prompt have the same embeddings."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def checksum(data: bytes) -> str:
    """The checksum of all bytes of a file."""
    return hashlib.sha256(data).hexdigest()[:32]  # half of it: against damage, not against forgers


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads tensors and metadata of a file of ours, after its checksum. Raises SnapshotError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise SnapshotError(f"{path} is not a file")
            data = file.read()
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror}") from None
    if not path.stem.endswith("-" + checksum(data)):
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


def told(path: Path) -> dict[str, Any]:
    """The metadata of a file as its header has them, before any check; empty where there are none."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(size)).get("__metadata__") if size <= _HEADER_LIMIT else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
