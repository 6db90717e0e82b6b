"""Latents as safetensors files of one tensor, [videos, C, L, H, W] float32."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from dualparal.io.files import make_folder, whole_file

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 1 << 20  # of a file with one tensor; the library takes 100 MB, parsed to gigabytes of objects
_FLOATING = ("F", "BF")  # as safetensors names the dtypes


def check_latents(path: Path) -> None:
    """Checks for a safetensors file with a floating-point tensor ``latents``, by its header. No torch.

    Raises:
        ValueError: no such file, not safetensors, or without that tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _check_header(path)
        with safe_open(path, framework="np") as handle:
            names = sorted(handle.keys())
            if "latents" not in names:
                several = ", ..." if len(names) > 3 else ""
                raise ValueError(f"--latents-in {path} holds {names[:3]}{several}; one tensor 'latents' is needed")
            dtype = handle.get_slice("latents").get_dtype()
    except FileNotFoundError:
        raise ValueError(f"--latents-in {path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--latents-in {path} is not a safetensors file: {error}") from None
    if not dtype.startswith(_FLOATING):
        raise ValueError(f"--latents-in {path} holds {dtype}; latents are floating-point numbers")


def read_latents(path: Path) -> torch.Tensor:
    """The tensor ``latents`` of a safetensors file, float32. Raises ValueError as ``check_latents`` does."""
    from safetensors import safe_open

    check_latents(path)
    with safe_open(path, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor("latents")
    return tensor.float()


def _check_header(path: Path) -> None:
    """Checks for a file (a pipe would be waited for) whose header is small enough to be ours. Raises OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("no regular file")
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _MAX_HEADER_BYTES:
        raise OSError(f"a header of {size} bytes, at most {_MAX_HEADER_BYTES} expected")


def write_latents(path: Path, latents: torch.Tensor, replace: bool = True) -> None:
    """Writes one tensor ``latents`` [videos, C, L, H, W] as float32, aside, synced and renamed.

    Args:
        path: the file.
        latents: the tensor.
        replace: the file may be another one's; False: it may be there already, but with these bytes only.

    Raises:
        FileExistsError: another file is there.
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    data = save({"latents": latents.float().contiguous().cpu()})
    make_folder(path.parent)
    if not replace and os.path.lexists(path):
        if path.is_symlink() or not path.is_file() or path.read_bytes() != data:
            raise FileExistsError(errno.EEXIST, "another file is there; move it away or pass --overwrite", str(path))
        return
    with whole_file(path) as file:
        file.write(data)
