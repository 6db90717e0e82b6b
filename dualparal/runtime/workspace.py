"""Memory that the layers of a stage read and write in place: rows [own | next | previous | anchor], in 16 or in 8 bits.

Layers share it one after the other. A ``View`` of it is made once per unit: the rows that attention reads, the places
of the neighbours' features before, and the rows that are lent afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from dualparal.kernels.attention_8bit import TILE, KeysValues8, lent, place, tiles_of
from dualparal.models.keys_values import Context8, Features8, Format, KeysValues

Read = tuple[str, bool]  # a side of the features; True if they were made at a step with 8-bit attention


class View(NamedTuple):
    """The parts of a workspace that one unit uses.

    Attributes:
        context: the rows that self-attention reads and whose own part it writes.
        places: tensors for the neighbours' features, in the order of the reads.
        lends: tensors to save for neighbours, by side.
    """

    context: KeysValues | Context8
    places: list[Format]  # of the neighbours' features, in the order of the reads
    lends: dict[str, Format]  # by side


class Workspace:
    """Workspace in 16 bits.

    Args:
        tokens: own tokens of the largest window.
        lent: number of rows that are lent, by side; only of sides that there are features of.
        inner: width of keys and values.
    """

    def __init__(
        self, tokens: int, lent: Mapping[str, int], inner: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._lent = lent
        self._memory = KeysValues(
            *(torch.empty(tokens + sum(lent.values()), inner, dtype=dtype, device=device) for _ in range(2))
        )

    def fresh(self, side: str, device: str | None = None) -> KeysValues:
        """New memory for the rows that one side lends, [lent, inner] each."""
        return KeysValues(*(torch.empty_like(tensor[: self._lent[side]], device=device) for tensor in self._memory))

    def view(self, own: int, reads: Sequence[Read], starts: Mapping[str, int]) -> View:
        """The view of a unit.

        Args:
            own: tokens of the unit.
            reads: features that it reads; their formats play no part here.
            starts: the first row that is lent, by side.
        """
        ends = list(accumulate((self._lent[side] for side, _ in reads), initial=own))
        rows = self._memory.rows(0, ends[-1])
        places: list[Format] = [rows.rows(start, end - start) for start, end in pairwise(ends)]
        return View(rows, places, {side: rows.rows(start, self._lent[side]) for side, start in starts.items()})


class Workspace8:
    """Workspace in 8 bits: every part begins at a multiple of TILE, and lent rows begin with a whole tile.

    Args:
        tokens: own tokens of the largest window.
        starts: the first row that a block lends, by side.
        lent_rows: number of rows that a block lends to each.
        inner: width of keys and values.
        heads: of self-attention.
        values: dtype of the values, FP8 or one of 16 bits.
    """

    def __init__(
        self,
        tokens: int,
        starts: Mapping[str, int],
        lent_rows: int,
        inner: int,
        heads: int,
        values: torch.dtype,
        device: torch.device,
    ) -> None:
        self._lent = lent_rows
        self._shares = {side: lent(start, lent_rows) for side, start in starts.items()}
        self._sizes = inner, heads, values
        self._device = device
        tiles = tiles_of(tokens) + sum(tiles_of(share.rows) for share in self._shares.values())
        self._memory = KeysValues8.empty(tiles * TILE, *self._sizes, device)
        self._means = torch.empty(1 + len(starts), inner, dtype=torch.float32, device=device)
        self._k_sums = torch.empty(tiles_of(tokens), inner, dtype=torch.float32, device=device)

    def fresh(self, side: str, device: str | None = None) -> Features8:
        """New memory for the rows that one side lends."""
        share = self._shares[side]
        keys_values = KeysValues8.empty(share.rows, *self._sizes, device or self._device)
        return Features8(keys_values, torch.empty_like(self._means[0], device=device), share.skip)

    def view(self, own: int, reads: Sequence[Read], writes: Sequence[str], first: bool) -> View:
        """The view of a unit.

        Args:
            own: tokens of the unit.
            reads: features that it reads, in the order of their keys.
            writes: sides that it lends.
            first: the unit is the block's first in 8 bits (``Context8.first``).
        """
        # What was made in 16 bits, and is converted, has no rows in front
        shares = [self._shares[side] if made_8bit else lent(0, self._lent) for side, made_8bit in reads]
        parts = [(share.rows, share.skip) for share in shares]
        at = tiles_of(own) * TILE
        places: list[Format] = []
        for number, (rows, skip) in enumerate(parts, 1):
            places.append(Features8(self._memory.rows(at, rows), self._means[number], skip).tensors)
            at += tiles_of(rows) * TILE
        context = Context8(
            self._memory.rows(0, at),
            place([(own, 0), *parts]),
            self._means[: 1 + len(reads)],
            self._k_sums[: tiles_of(own)],
            first,
        )
        lends: dict[str, Format] = {}
        for side in writes:
            share = self._shares[side]
            lends[side] = Features8(self._memory.rows(share.first, share.rows), self._means[0], share.skip).tensors
        return View(context, places, lends)
