"""Velocities of steps that the model does not run, from those before."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def extrapolate(velocities: Sequence[torch.Tensor], levels: Sequence[float], level: float) -> torch.Tensor:
    """The polynomial through some velocities, at another noise level: Newton's, in Lagrange's form.

    One velocity is held; two give the Taylor series of order 1 by divided differences, three that of order 2.

    Args:
        velocities: float32, of one shape, oldest first.
        levels: their noise levels, all different.
        level: at which the velocity is wanted.

    Returns:
        float32; one velocity alone is given back as it is.
    """
    if len(velocities) == 1:
        return velocities[0]
    found: torch.Tensor | None = None
    for own, velocity in zip(levels, velocities, strict=True):
        weight = 1.0
        for other in levels:
            if other != own:
                weight *= (level - other) / (own - other)
        found = velocity * weight if found is None else found + velocity * weight
    assert found is not None, "there is a velocity to begin with"
    return found
