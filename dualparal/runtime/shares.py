"""Shares of a stage: each of its places has some tokens and some heads of every unit, and swaps them around attention.

Every place has all weights of the stage, and runs linears, norms and attention to the text on its tokens alone. For
self-attention queries, keys and values go to the place that has their heads, which attends over the whole window and
keeps the features of these heads; the result goes back. Source: Jacobs et al., "DeepSpeed Ulysses" (2023). The
pipelined form is PipeSP of PipeDiT (2025): the result of one group of heads travels while the next is attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from dualparal.config.decoding import row_ranges
from dualparal.models.base import AttentionKernel, AttentionStrategy
from dualparal.models.keys_values import Context8, KeysValues

GROUPS = 4  # of a place's heads in the pipelined form: the last one's way alone is waited for


class ShareExchange(Protocol):
    """The way from one place of a stage to the others, all of which make the same exchanges in the same order.

    Attributes:
        index: of this place.
        count: number of places.
    """

    index: int
    count: int

    def swap(self, sends: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]) -> None:
        """Sends tensors to other places and fills those that come from them, as ``models.base.RowExchange`` does."""
        ...

    def begin(self, sends: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]) -> Callable[[], None]:
        """Begins a swap. Returns what ends it: until then nobody touches the tensors."""
        ...


class Cut(NamedTuple):
    """A window cut over the places.

    Attributes:
        rows: tokens of each place.
        first_own: tokens in front that belong to the previous block.
    """

    rows: list[range]
    first_own: int

    @property
    def tokens(self) -> int:
        """Tokens of the window."""
        return self.rows[-1].stop

    def own(self, place: int) -> range:
        """The rows of a place, counted from its first, whose velocity counts: those of the unit's own block."""
        rows = self.rows[place]
        return range(min(len(rows), max(0, self.first_own - rows.start)), len(rows))


class Share:
    """The share of one place: its heads, and its exchange with the others.

    Args:
        exchange: the way to the others.
        heads: of the model's self-attention.
        head_dim: width of one.
        pipelined: the result of one group of heads travels while the next is attended to.

    Attributes:
        width: of this place's keys and values.
    """

    def __init__(self, exchange: ShareExchange, heads: int, head_dim: int, pipelined: bool) -> None:
        self.exchange, self.pipelined = exchange, pipelined
        self.heads = row_ranges(heads, exchange.count)
        self._head_dim = head_dim
        self.width = len(self.heads[exchange.index]) * head_dim

    @property
    def index(self) -> int:
        """The number of the place."""
        return self.exchange.index

    @property
    def others(self) -> list[int]:
        """The numbers of the other places."""
        return [place for place in range(self.exchange.count) if place != self.index]

    def columns(self, heads: range) -> slice:
        """Columns of some heads in a width of all."""
        return slice(heads.start * self._head_dim, heads.stop * self._head_dim)

    def groups(self, place: int) -> list[range]:
        """Heads of a place in the order in which their results travel."""
        own = self.heads[place]
        count = min(GROUPS, len(own)) if self.pipelined else 1
        return [range(own.start + part.start, own.start + part.stop) for part in row_ranges(len(own), count)]


class Ulysses:
    """The strategy of a place around self-attention, for one unit (``models.base.AttentionStrategy``).

    Args:
        share: the place's.
        rows: tokens of every place.
        target: rows [whole window | neighbours] of this place's heads; the neighbours' are there.
        attend: the strategy around the kernel, as on a stage of one place.
    """

    def __init__(self, share: Share, rows: Sequence[range], target: KeysValues, attend: AttentionStrategy) -> None:
        self._share, self._rows, self._target, self._attend = share, rows, target, attend

    def __call__(
        self, kernel: AttentionKernel, queries: Any, context: KeysValues | Context8, heads: int
    ) -> torch.Tensor:
        assert isinstance(context, KeysValues), "refused by the config"
        whole = self._gather(queries, context)
        share, own, inner = self._share, self._share.heads[self._share.index], queries.shape[1]
        result = queries.new_empty(len(queries), inner)
        groups = {place: share.groups(place) for place in range(share.exchange.count)}
        endings: list[tuple[Callable[[], None], dict[int, torch.Tensor], int]] = []
        for turn in range(max(map(len, groups.values()))):
            sends: dict[int, torch.Tensor] = {}
            if turn < len(groups[share.index]):
                part = groups[share.index][turn]
                made = self._attend_to(kernel, whole, part, own)
                result[:, share.columns(part)] = self._part_of(made, share.index)
                sends = {place: self._part_of(made, place) for place in share.others}
            wanted = {
                place: queries.new_empty(len(queries), _width(share.columns(groups[place][turn])))
                for place in share.others
                if turn < len(groups[place])
            }
            endings.append((share.exchange.begin(sends, wanted), wanted, turn))
        for end, wanted, turn in endings:
            end()
            for place, tensor in wanted.items():
                result[:, share.columns(groups[place][turn])] = tensor
        return result

    def _gather(self, queries: torch.Tensor, context: KeysValues) -> torch.Tensor:
        """Swaps queries, keys and values for those of this place's heads. Returns the queries of the whole window; keys
        and values go to their rows of the target."""
        share, given = self._share, (queries, *context)
        sends = {
            place: torch.stack([tensor[:, share.columns(share.heads[place])] for tensor in given])
            for place in share.others
        }
        wanted = {place: queries.new_empty(3, len(self._rows[place]), share.width) for place in share.others}
        end = share.exchange.begin(sends, wanted)
        whole = queries.new_empty(self._rows[-1].stop, share.width)
        own = [tensor[:, share.columns(share.heads[share.index])] for tensor in given]
        self._place(whole, share.index, own)
        end()
        for place, tensors in wanted.items():
            self._place(whole, place, list(tensors))
        return whole

    def _place(self, whole: torch.Tensor, place: int, tensors: Sequence[torch.Tensor]) -> None:
        rows = self._rows[place]
        for target, tensor in zip((whole, *self._target), tensors, strict=True):
            target[rows.start : rows.stop] = tensor

    def _attend_to(self, kernel: AttentionKernel, queries: torch.Tensor, part: range, own: range) -> torch.Tensor:
        """The result for some of this place's heads and the whole window, contiguous."""
        if len(part) == len(own):
            return self._attend(kernel, queries, self._target, len(own))
        columns = self._share.columns(range(part.start - own.start, part.stop - own.start))
        context = KeysValues(*(tensor[:, columns] for tensor in self._target))
        return self._attend(kernel, queries[:, columns], context, len(part))

    def _part_of(self, made: torch.Tensor, place: int) -> torch.Tensor:
        rows = self._rows[place]
        return made[rows.start : rows.stop]


def _width(columns: slice) -> int:
    width: int = columns.stop - columns.start
    return width
