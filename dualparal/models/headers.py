"""Headers of safetensors files: name, dtype, shape and place of every tensor. No torch, and no file is mapped to write.

The library validates a header. Its own reader maps the whole file into private memory, of which Linux wants to be able
to hold a copy: a file larger than the machine's memory cannot be opened so, however few of its tensors are read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from dualparal.models.json_files import ModelError, read_json, shorten

_FLOATS = ("F32", "BF16", "F16", "F64")
_SAMPLES, _SAMPLE_BYTES = 64, 4096
FP8 = "F8_E4M3"  # the one format of 8 bits that is read


class Entry(NamedTuple):
    """A tensor in a file.

    Attributes:
        path: the file.
        key: its name there.
        dtype: as safetensors names it.
        begin, end: of its bytes in the file.
    """

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def weight_paths(place: Path) -> list[Path]:
    """The safetensors files of one component: ``place`` itself, or those in that folder, single or by its index.

    Raises:
        ModelError: none, or several of which nothing says which to read.
    """
    if place.is_file():
        return [place]
    indices = sorted(place.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ModelError(
            f"{place}: {' and '.join(p.name for p in indices)}: which to read? Keep the index of one variant"
        )
    if indices:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{indices[0]}: no weight_map in it; download the model again")
        names = sorted(set(weight_map.values()))
    else:
        names = sorted(p.name for p in place.glob("*.safetensors"))
        if len(names) > 1:
            raise ModelError(
                f"{place}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} and no index file says "
                "which to read; keep one variant, or download the index too"
            )
    if not names:
        other = sorted(p.name for p in place.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only {', '.join(other)}, which are pickles and never read" if other else "no weight file"
        raise ModelError(
            f"{place}: {found}; a .safetensors file is needed (convert with "
            "pipe.save_pretrained(..., safe_serialization=True))"
        )
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{indices[0]}: names the file {shorten(name)} outside its folder")
        if not name.endswith(".safetensors") or "\0" in name or len(name) > 255:
            raise ModelError(f"{indices[0]}: names {shorten(name)}, which is no .safetensors file")
    return [place / name for name in names]


def read_entries(place: Path) -> dict[str, Entry]:
    """The tensors of one component by name, from headers alone; ``place`` as in ``weight_paths``. Raises ModelError."""
    return {entry.key: entry for path in weight_paths(place) for entry in _read_header(path)}


def _read_header(path: Path) -> list[Entry]:
    """The tensors of a file, its header validated by the library. Raises ModelError."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ModelError(f"{path} is no file; download it again")
        if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise ModelError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull'")
        with safe_open(path, framework="np"):  # maps it for reading only
            pass
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing, though the index names it; download the model again") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); download it again") from None
    header.pop("__metadata__", None)
    return [
        Entry(path, key, part["dtype"], tuple(part["shape"]), *(start + offset for offset in part["data_offsets"]))
        for key, part in header.items()
    ]


def sampled(path: Path) -> hashlib._Hash:
    """A SHA-256 of a file's size, header and 64 samples of 4 KiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(header))
        begin, room = 8 + header, max(0, size - 8 - header - _SAMPLE_BYTES)
        for offset in sorted({begin + room * index // (_SAMPLES - 1) for index in range(_SAMPLES)}):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest


def check_dtypes(place: Path, entries: Iterable[Entry], also: tuple[str, ...] = ()) -> None:
    """Refuses numbers that are none without a scale of their own, such as int8, which nothing here speaks of.

    Args:
        place: of the tensors, for the message.
        also: a dtype besides those of floats that is read.

    Raises:
        ModelError: one of these tensors is quantized.
    """
    odd = sorted((entry for entry in entries if entry.dtype not in (*_FLOATS, *also)), key=lambda entry: entry.key)
    if odd:
        names = ", ".join(entry.key for entry in odd[:3])
        raise ModelError(
            f"{place}: {len(odd)} tensors are {odd[0].dtype} ({names}): quantized weights of this kind are not "
            f"supported; use those in {', '.join((*_FLOATS, *also))} (--linear-8bit makes 8 bits of them)"
        )


def elements(entries: Iterable[Entry]) -> int:
    """The number of elements of these tensors."""
    return sum(math.prod(entry.shape) for entry in entries)


def shapes_of(entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by name."""
    return {name: entry.shape for name, entry in entries.items()}
