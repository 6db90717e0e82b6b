"""The store of neighbour features: keys and values of context frames, per layer, side, slot and branch.

It knows slots, not blocks: which block's features lie in a slot is the schedule's business. Features are stored
after norm and rotation at absolute positions, ready to be read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class KeysValues(NamedTuple):
    """Keys and values of a run of tokens in one layer, [tokens, inner] each."""

    keys: torch.Tensor
    values: torch.Tensor

    def rows(self, start: int, count: int) -> KeysValues:
        return KeysValues(self.keys[start : start + count], self.values[start : start + count])

    def copy_(self, other: KeysValues) -> None:
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)


class FeatureStore:
    """Fixed buffers, allocated once: ``layers`` x ``slots`` x ``branches`` x ``tokens`` keys and values.

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
        self._buffers = {
            side: torch.empty(layers, count, branches, 2, tokens, inner, dtype=dtype, device=device)
            for side, count in slots.items()
        }
        # Made once: taking views apart costs more than a small layer.
        self._slots = {
            (layer, side, slot, branch): KeysValues(buffer[layer, slot, branch, 0], buffer[layer, slot, branch, 1])
            for side, buffer in self._buffers.items()
            for layer in range(layers)
            for slot in range(slots[side])
            for branch in range(branches)
        }

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def slot(self, layer: int, side: str, slot: int, branch: int) -> KeysValues:
        """Views of the keys and values in a slot; writing to them is how features are stored."""
        return self._slots[layer, side, slot, branch]
