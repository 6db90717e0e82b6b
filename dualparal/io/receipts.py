"""Receipts of what was written for a block: its number of frames and a checksum, which a resumed run compares."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_PIECE = 1 << 20  # bytes read at once


class Receipt(NamedTuple):
    """The number of frames of a block, and the checksum of its files; "" where no files are written."""

    frames: int
    checksum: str


Receipts = Mapping[int, Receipt]  # by block, from 0 on without a gap


def checksum_of(paths: Sequence[Path]) -> str:
    """The checksum of the bytes of regular files, one after the other. Raises OSError, also for a link."""
    digest = hashlib.sha256()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(f"{path} is not a file")
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()[:32]  # half of it: against damage, not against forgers


def is_whole(receipt: Receipt, paths: Sequence[Path]) -> bool:
    """True when the files are those that the receipt was given for."""
    try:
        return checksum_of(paths) == receipt.checksum
    except OSError:
        return False


def read_receipts(values: Any) -> Receipts:
    """The receipts that a snapshot holds as JSON, [frames, checksum] for each block. Raises ValueError, TypeError."""
    found = {block: Receipt(*value) for block, value in enumerate(values)}
    for receipt in found.values():
        if type(receipt.frames) is not int or not 0 < receipt.frames < 10**9 or not isinstance(receipt.checksum, str):
            raise ValueError("not a receipt")
    return found
