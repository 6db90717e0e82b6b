"""Modulations of a unit whose tokens are not all at one timestep."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dualparal.models.base import TimeCondition


def joined(parts: Sequence[TimeCondition], rows: Sequence[int]) -> TimeCondition:
    """The modulations of runs of tokens that follow each other, ``rows`` of each; of a single run its own."""
    if len(parts) == 1:
        return parts[0]
    heads = [part.head for part in parts if part.head is not None]
    layers = torch.stack([part.layers for part in parts], 1)
    return TimeCondition(layers, torch.stack(heads) if heads else None, tuple(rows))
