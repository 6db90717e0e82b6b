"""Keys and values of a run of tokens in one layer, in 16 or in 8 bits, and the way from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dualparal.kernels.attention_8bit import KeysValues8, quantise_features, restore_features


class KeysValues(NamedTuple):
    """Keys and values of a run of tokens in one layer, [tokens, inner] each."""

    keys: torch.Tensor
    values: torch.Tensor

    def rows(self, start: int, count: int) -> KeysValues:
        return KeysValues(self.keys[start : start + count], self.values[start : start + count])


class Features8(NamedTuple):
    """Features in 8 bits: whole rows of an arena from the start of a tile on, and what was taken from the keys.

    mean: float32 [inner]. skip: so many rows in front were not lent, they are there for their tile.
    """

    keys_values: KeysValues8
    mean: torch.Tensor
    skip: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What a slot holds, keys and values first as in 16 bits. All features of a side have the same skip."""
        k, k_scale, v, v_scale = self.keys_values
        return [tensor for tensor in (k, v, k_scale, v_scale, self.mean) if tensor is not None]


class Context8(NamedTuple):
    """What self-attention in 8 bits reads and writes, in place of ``KeysValues``.

    arena: [own | neighbours], each from a multiple of TILE on; the neighbours' rows are there, the own are written.
    spans: which rows of it count.
    means: float32 [segments, inner], the own and then the neighbours'; the own one is written when ``first``.
    k_sums: float32 [tiles_of(own), inner], written: what the mean of the own keys is made from.
    first: is it the block's first step in 8 bits? Nothing is known of its keys then, and they are looked at twice.
    """

    arena: KeysValues8
    spans: list[int]
    means: torch.Tensor
    k_sums: torch.Tensor
    first: bool


def to_8bit(features: KeysValues, heads: int, fp8: bool) -> Features8:
    """Features kept in 16 bits for a reader in 8 bits: less their own mean; fp8: values, too."""
    mean = features.keys.float().mean(0)
    return Features8(quantise_features(*features, mean, heads=heads, fp8=fp8), mean, 0)


def to_16bit(features: Features8, dtype: torch.dtype) -> KeysValues:
    """Features kept in 8 bits for a reader in 16 bits."""
    restored = restore_features(features.keys_values, features.mean, dtype)
    return KeysValues(*(tensor[features.skip :] for tensor in restored))


Format = Sequence[torch.Tensor]  # shapes and dtypes of what a slot holds; tensors on "meta" will do
