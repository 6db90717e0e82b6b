"""Keys of an anchor: turned to where a reader wants them, and weighed against its other keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dualparal.kernels.attention import attention, merge
from dualparal.kernels.qk_norm_rope import rotate
from dualparal.models.base import AttentionKernel, AttentionStrategy, Rotary
from dualparal.models.keys_values import Context8, KeysValues


def turn(keys: torch.Tensor, shift: Rotary, heads: int) -> None:
    """Moves keys to another time, in place.

    Rotations add up, so keys that lie as at their own positions are as good as unrotated ones: either way they are
    rounded once when they are kept and once when they are read.

    Args:
        keys: [tokens, inner], rotated.
        shift: of ``Slice.shift``.
        heads: in ``inner``.
    """
    keys.copy_(rotate(keys.float(), shift.cos, shift.sin, heads))


@dataclass(frozen=True)
class Weighed:
    """A strategy that adds a number to the logits of the last keys (``models.base.AttentionStrategy``).

    They are attended to by themselves, and both results merged by their log-sum-exps: every backend has these, and
    none needs a mask. The kernel of 16 bits is ``kernels.attention``, whatever the family, and called here for them.

    Attributes:
        rows: number of the last keys.
        weight: added to their logits.
        attend: the strategy that is called without such keys.
    """

    rows: int
    weight: float
    attend: AttentionStrategy

    def __call__(
        self, kernel: AttentionKernel, queries: Any, context: KeysValues | Context8, heads: int
    ) -> torch.Tensor:
        assert isinstance(context, KeysValues), "refused by the config"
        first = len(context.keys) - self.rows
        parts = [
            attention(queries, *context.rows(start, count), heads=heads, return_lse=True)
            for start, count in ((0, first), (first, self.rows))
        ]
        (plain, plain_lse), (anchor, anchor_lse) = parts
        return merge([(plain, plain_lse), (anchor, anchor_lse + self.weight)])[0]
