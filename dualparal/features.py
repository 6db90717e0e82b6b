"""The store of neighbour features: keys and values of context frames, per layer, side, slot and branch.

It knows slots, not blocks: which block's features lie in a slot is the schedule's business. Features are stored
after norm and rotation at absolute positions, ready to be read. Rows are numbered by tensors in device memory, so
that a captured graph can be told another slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dualparal.kernels.qk_norm_rope import Lend


class KeysValues(NamedTuple):
    """Keys and values of a run of tokens in one layer, [tokens, inner] each."""

    keys: torch.Tensor
    values: torch.Tensor

    def rows(self, start: int, count: int) -> KeysValues:
        return KeysValues(self.keys[start : start + count], self.values[start : start + count])


class FeatureStore:
    """Fixed buffers, allocated once: ``layers`` x (``slots`` x ``branches``) rows x ``tokens`` keys and values.

    Args:
        slots: number of slots per side, e.g. {"head": 1, "tail": 9}.
        tokens: context frames times tokens per frame.
    """

    def __init__(
        self,
        layers: int,
        slots: dict[str, int],
        branches: int,
        tokens: int,
        inner: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._branches = branches
        self._buffers = {
            side: [
                KeysValues(*torch.empty(2, count * branches, tokens, inner, dtype=dtype, device=device).unbind())
                for _ in range(layers)
            ]
            for side, count in slots.items()
        }
        numbers = torch.arange(max(slots.values(), default=0) * branches, device=device)
        self._numbers = list(numbers.split(1))  # made once: a view per unit would cost more than its use

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layers in self._buffers.values() for pair in layers for tensor in pair)

    def row(self, side: str, slot: int, branch: int) -> torch.Tensor:
        """int64 [1], the row of a slot and branch."""
        return self._numbers[slot * self._branches + branch]

    def load(self, layer: int, side: str, row: torch.Tensor, out: KeysValues) -> None:
        """Copies a row's keys and values into ``out``, contiguous [tokens, inner] each."""
        for buffer, target in zip(self._buffers[side][layer], out, strict=True):
            torch.index_select(buffer, 0, row, out=target.unsqueeze(0))

    def lend(self, layer: int, side: str, row: torch.Tensor, first: int) -> Lend:
        """Where a layer puts the keys and values it makes from token ``first`` on, as many as a row holds."""
        return Lend(*self._buffers[side][layer], row, first)
