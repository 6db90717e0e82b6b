"""Keys and values of a run of tokens in one layer, in 16 or in 8 bits, and the way from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dualparal.kernels.attention_8bit import FP8, KeysValues8, quantise_features, restore_features
from dualparal.kernels.linear_8bit import Rows8, quantise_rows, restore_rows


class KeysValues(NamedTuple):
    """Keys and values of a run of tokens in one layer, [tokens, inner] each."""

    keys: torch.Tensor
    values: torch.Tensor

    def rows(self, start: int, count: int) -> KeysValues:
        """Views of ``count`` rows from ``start`` on."""
        return KeysValues(self.keys[start : start + count], self.values[start : start + count])


class Features8(NamedTuple):
    """Features in 8 bits: whole rows of an arena from the start of a tile on, and the mean taken away from the keys.

    Attributes:
        keys_values: the rows.
        mean: float32 [inner].
        skip: number of rows in front that were not lent; they are there for their tile.
    """

    keys_values: KeysValues8
    mean: torch.Tensor
    skip: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors of a slot, keys and values first as in 16 bits. All features of a side have the same skip."""
        k, k_scale, v, v_scale = self.keys_values
        return [tensor for tensor in (k, v, k_scale, v_scale, self.mean) if tensor is not None]


class Packed(NamedTuple):
    """Features of attention in 16 bits, kept in fp8 with a scale per token: half of the memory, converted when read."""

    keys: Rows8
    values: Rows8

    @classmethod
    def of(cls, features: KeysValues) -> Packed:
        """Rounds features."""
        return cls(*(quantise_rows(tensor) for tensor in features))

    @classmethod
    def fresh(cls, features: Sequence[torch.Tensor]) -> Packed:
        """New memory for such keys and values, on their device."""
        parts = [
            Rows8(torch.empty_like(x, dtype=FP8), torch.empty(len(x), 1, dtype=torch.float32, device=x.device))
            for x in features
        ]
        return cls(*parts)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors of a slot, keys and values first as in the other formats."""
        return [self.keys.values, self.values.values, self.keys.scale, self.values.scale]

    def restore(self, out: Sequence[torch.Tensor]) -> None:
        """Writes keys and values to ``out``, [tokens, inner] each, in its dtype."""
        for rows, tensor in zip(self, out, strict=True):
            restore_rows(rows, tensor)


class Context8(NamedTuple):
    """Keys and values of self-attention in 8 bits, in place of ``KeysValues``; the own ones are written by the layer.

    Attributes:
        arena: [own | neighbours], each from a multiple of TILE on; the neighbours' rows are there, the own are written.
        spans: first row that counts and the one behind the last, of each segment (``attention_8bit.place``).
        means: float32 [segments, inner], the own and then the neighbours'; the own one is written when ``first``.
        k_sums: float32 [tiles_of(own), inner], written: sums of the own keys, from which ``key_mean`` makes their mean.
        first: the unit is the block's first in 8 bits. Nothing is known of its keys then, and they are looked at twice.
    """

    arena: KeysValues8
    spans: list[int]
    means: torch.Tensor
    k_sums: torch.Tensor
    first: bool


def to_8bit(features: KeysValues, heads: int, fp8: bool) -> Features8:
    """Converts features kept in 16 bits for a reader in 8 bits.

    Keys are taken less their own mean; with ``fp8`` values are converted, too.
    """
    mean = features.keys.float().mean(0)
    return Features8(quantise_features(*features, mean, heads=heads, fp8=fp8), mean, 0)


def to_16bit(features: Features8, dtype: torch.dtype) -> KeysValues:
    """Converts features kept in 8 bits for a reader in 16 bits of ``dtype``."""
    restored = restore_features(features.keys_values, features.mean, dtype)
    return KeysValues(*(tensor[features.skip :] for tensor in restored))


Format = Sequence[torch.Tensor]  # shapes and dtypes of what a slot holds; tensors on "meta" will do
