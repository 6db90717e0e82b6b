"""8-bit attention in plain PyTorch: smoothing, quantising, and attention over quantised keys.

Everything is computed in float32 (float64 stays float64), and rounded where the contract of the package says so:
queries, keys and values when they are quantised, weights before they meet the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..qk_norm_rope.reference import rms_norm, rotate

TILE = 128  # keys that share one scale per head; a segment of an arena starts at a multiple of it
FP8 = torch.float8_e4m3fn
LIMITS = {torch.int8: 127.0, FP8: 448.0}  # the largest number of each type
SMALLEST = 1e-12  # of what scales are made from: a row of zeros has a scale, too


class Queries8(NamedTuple):
    """Queries in 8 bits, and what they lose to the means of the keys.

    q: [S, inner]; scale: float32 [heads, S]; bias: float32 [segments - 1, heads, S].
    """

    q: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor


class KeysValues8(NamedTuple):
    """Keys and values as this family writes and reads them: an arena, rows of one, or what a neighbour lends.

    k: [rows, inner] int8 or float8_e4m3fn; k_scale: float32 [heads, tiles_of(rows)].
    v: [rows, inner], 16 bits, and no v_scale; or float8_e4m3fn [inner, tiles_of(rows) * TILE], with zeros or junk
        behind the rows, and v_scale like k_scale.
    """

    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor | None = None

    @classmethod
    def empty(
        cls,
        rows: int,
        inner: int,
        heads: int,
        values: torch.dtype,
        device: torch.device | str = "cpu",
        keys: torch.dtype = torch.int8,
    ) -> KeysValues8:
        """Memory for ``rows``; float8_e4m3fn ``values`` are the transposed ones."""
        tiles = tiles_of(rows)
        shape = (inner, tiles * TILE) if values == FP8 else (rows, inner)
        return cls(
            torch.empty(rows, inner, dtype=keys, device=device),
            torch.empty(heads, tiles, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=values, device=device),
            torch.empty(heads, tiles, dtype=torch.float32, device=device) if values == FP8 else None,
        )

    def rows(self, start: int, count: int) -> KeysValues8:
        """``count`` rows from ``start`` on, a multiple of TILE, with their whole tiles of scales and fp8 values."""
        assert start % TILE == 0, start
        tiles = slice(start // TILE, start // TILE + tiles_of(count))
        k, k_scale = self.k[start : start + count], self.k_scale[:, tiles]
        if self.v_scale is None:
            return KeysValues8(k, k_scale, self.v[start : start + count])
        return KeysValues8(k, k_scale, self.v[:, start : start + tiles_of(count) * TILE], self.v_scale[:, tiles])


def quantise(x: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` in ``dtype``, and the scale that brings it back; ``largest`` broadcasts to x's shape.

    A NaN or an infinity makes its scale NaN: integers cannot carry it, the scale must.
    """
    largest = largest.clamp_min(SMALLEST)
    limit = LIMITS[dtype]
    values = x * torch.full_like(largest, limit).div(largest)  # limit / largest is a reciprocal, rounded twice
    if dtype == torch.int8:
        values = values.nan_to_num(0.0).round()
    scale = largest / limit
    return values.clamp(-limit, limit).to(dtype), torch.where(scale.isfinite(), scale, torch.nan)


def tiles_of(rows: int) -> int:
    return -(-rows // TILE)


def _tiled(x: torch.Tensor) -> torch.Tensor:
    """[S, ...] as [tiles, TILE, ...], with zeros behind the end."""
    tiles = tiles_of(len(x))
    padded = x.new_zeros(tiles * TILE, *x.shape[1:])
    padded[: len(x)] = x
    return padded.unflatten(0, (tiles, TILE))


def quantise_rows(x: torch.Tensor, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per row and head. x: [S, inner] -> [S, inner] of dtype, [heads, S]."""
    by_head = x.unflatten(1, (heads, -1))
    values, scale = quantise(by_head, by_head.abs().amax(-1, keepdim=True), dtype)
    return values.flatten(1), scale.squeeze(-1).T.contiguous()


def quantise_tiles(x: torch.Tensor, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per TILE rows and head. x: [S, inner] -> [S, inner] of dtype, [heads, tiles]."""
    if len(x) == 0:
        return x.to(dtype), x.new_empty(heads, 0)
    by_tile = _tiled(x.unflatten(1, (heads, -1)))  # [tiles, TILE, heads, head_dim]
    values, scale = quantise(by_tile, by_tile.abs().amax((1, 3), keepdim=True), dtype)
    return values.flatten(0, 1).flatten(1)[: len(x)], scale[:, 0, :, 0].T.contiguous()


def quantise_values(v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One fp8 scale per TILE rows and head, and rows as columns. [S, inner] -> [inner, tiles * TILE], [heads, tiles].

    Columns behind S are zeros.
    """
    values, scale = quantise_tiles(v, heads, FP8)
    padded = torch.zeros(v.shape[1], tiles_of(len(v)) * TILE, dtype=FP8, device=v.device)
    padded[:, : len(v)] = values.T
    return padded, scale


def key_bias(q: torch.Tensor, means: torch.Tensor, heads: int) -> torch.Tensor:
    """The loss of each neighbour's keys to a mean that is not the own one, as seen by every query.

    q: [S, inner]; means: [segments, inner], the first the own. Returns [segments - 1, heads, S].
    """
    differences = (means[1:] - means[:1]).to(q.dtype).unflatten(1, (heads, -1))  # [segments - 1, heads, head_dim]
    return torch.einsum("shd,ghd->ghs", q.unflatten(1, (heads, -1)), differences).contiguous()


def tile_sums(k: torch.Tensor) -> torch.Tensor:
    """[S, inner] -> [tiles, inner]"""
    return _tiled(k).sum(1)


def qk_norm_rope_8bit(
    qkv: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    means: torch.Tensor,
    out: KeysValues8,
    k_sums: torch.Tensor | None,
    *,
    heads: int,
    eps: float,
) -> Queries8:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    raw_q, raw_k, v = qkv.to(wide).chunk(3, dim=1)  # [S, inner] each
    q = rotate(rms_norm(raw_q, norm_q, eps), cos, sin, heads)
    k = rotate(rms_norm(raw_k, norm_k, eps), cos, sin, heads)
    if k_sums is not None:
        k_sums.copy_(tile_sums(k))
    keys, scale = quantise_tiles(k - means[0], heads, out.k.dtype)
    made = KeysValues8(keys, scale, *((v, None) if out.v_scale is None else quantise_values(v, heads)))
    for target, source in zip(out, made):
        if target is not None and source is not None:
            target.copy_(source)
    return Queries8(*quantise_rows(q, heads, out.k.dtype), key_bias(q, means, heads).float())


def attention_8bit(
    queries: Queries8,
    keys_values: KeysValues8,
    spans: Sequence[int],
    *,
    heads: int,
    dtype: torch.dtype,
    exact: bool = False,
) -> torch.Tensor:
    """See the package. ``exact``: float64, and the weights are not rounded: what tests take for the truth."""
    (q, q_scale, bias), (k, k_scale, v, v_scale) = queries, keys_values
    wide = torch.float64 if exact else torch.float32
    pairs = list(zip(spans[::2], spans[1::2]))
    rows = torch.cat([torch.arange(start, end, device=q.device) for start, end in pairs])
    segment = torch.cat([torch.full((end - start,), i, device=q.device) for i, (start, end) in enumerate(pairs)])

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.to(wide).unflatten(1, (heads, -1)).transpose(0, 1)  # [heads, S, head_dim]

    def widened(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return by_head(x) if scale is None else by_head(x) * scale[:, rows // TILE].to(wide)[..., None]

    shift = torch.cat([bias.new_zeros(1, *bias.shape[1:]), bias]).to(wide)  # [segments, heads, S_q]
    scores = by_head(q) * q_scale.to(wide)[..., None] @ widened(k[rows], k_scale).mT  # [heads, S_q, S_k]
    scores = (scores + shift[segment].permute(1, 2, 0)) * (q.shape[1] // heads) ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    if not exact:
        if v_scale is None:
            weights = weights.to(v.dtype).to(wide)
        else:
            weights = (weights * LIMITS[FP8]).to(FP8).to(wide) / LIMITS[FP8]
    values = v[rows] if v_scale is None else v[:, rows].T
    return (weights @ widened(values, v_scale) / total).transpose(0, 1).flatten(1).to(wide if exact else dtype)
