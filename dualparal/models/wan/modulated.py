"""Fused residuals and norms of a unit whose tokens are in runs of one timestep each.

The fused ops take one vector for all rows (``dualparal.kernels.residual_norm``), so each run is a call of its own, and
what comes of them is copied together. A unit of one timestep is a single call, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dualparal.kernels import residual_norm as fused


def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    runs: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kernels.residual_norm`` with vectors by run.

    Args:
        x, y: [tokens, inner], the last tokens of the unit.
        gate, weight, bias: float32 [inner] for all of them, or [runs, inner].
        runs: tokens of each run of the unit; empty: there is one.
    """
    if not runs:
        return fused.residual_norm(x, y, gate, weight, bias, eps=eps)
    parts = [
        fused.residual_norm(
            x[rows], None if y is None else y[rows], *(_of(v, k) for v in (gate, weight, bias)), eps=eps
        )
        for k, rows in _slices(runs, len(x))
    ]
    return x if y is None else torch.cat([new for new, _ in parts]), torch.cat([normed for _, normed in parts])


def residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None, runs: Sequence[int] = ()) -> torch.Tensor:
    """``kernels.residual`` with a gate by run; arguments as above."""
    if not runs:
        return fused.residual(x, y, gate)
    return torch.cat([fused.residual(x[rows], y[rows], _of(gate, k)) for k, rows in _slices(runs, len(x))])


def _of(vector: torch.Tensor | None, run: int) -> torch.Tensor | None:
    return vector[run] if vector is not None and vector.ndim == 2 else vector


def _slices(runs: Sequence[int], tokens: int) -> Iterator[tuple[int, slice]]:
    """Runs that have some of the last ``tokens``, each with its place among these."""
    start = tokens - sum(runs)
    for number, length in enumerate(runs):
        stop = start + length
        if stop > 0:
            yield number, slice(max(start, 0), stop)
        start = stop
