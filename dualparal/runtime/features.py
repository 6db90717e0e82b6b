"""Features: keys and values that blocks lend each other, in 16 or in 8 bits, and the store that keeps them.

The store knows slots, not blocks: the schedule decides whose features lie in a slot. Features are stored after norm and
rotation at absolute positions, ready to be read. Rows are numbered by tensors in device memory, so that a captured
graph can be told another slot.

The reader's step decides the format in which features are read, the maker's step the one in which they are kept; where
8-bit attention is on at only one of the two, the reader converts (``to_8bit``, ``to_16bit``). That is the case at the
first and last of the steps that are in 8 bits: the next block's features are one step behind, those of the previous
block with ``prior`` one step ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dualparal.kernels.qk_norm_rope import Lend
from dualparal.models.keys_values import Format

_ALIGNMENT = 16  # bytes: of a slot


class FeatureStore:
    """Store of all that outlives a unit, by layer, side, slot and branch. Fixed buffers, allocated once.

    Where 8-bit attention is on at some steps only, a slot can hold either format, and is as large as the larger.

    Args:
        slots: number of slots per side, such as {"head": 1, "tail": 9}.
        branches: branches of guidance, 1 or 2.
        formats: by layer and side, the formats that a slot can hold: {True for 8 bits, False for 16: format}.
        device: of the buffers.
    """

    def __init__(
        self,
        slots: Mapping[str, int],
        branches: int,
        formats: Sequence[Mapping[str, Mapping[bool, Format]]],
        device: torch.device,
    ) -> None:
        self._branches = branches
        self._buffers: list[torch.Tensor] = []
        self._views: list[dict[tuple[str, bool], list[torch.Tensor]]] = []
        for layer in formats:
            views = {}
            for side, by_format in layer.items():
                for eight_bit, tensors in self._allocate(slots[side] * branches, by_format, device).items():
                    views[side, eight_bit] = tensors
            self._views.append(views)
        numbers = torch.arange(max(slots.values(), default=0) * branches, device=device)
        self._numbers = list(numbers.split(1))  # made once: a view per unit would cost more than its use

    def _allocate(
        self, count: int, formats: Mapping[bool, Format], device: torch.device
    ) -> dict[bool, list[torch.Tensor]]:
        """Allocates ``count`` slots that hold any of the formats.

        The first tensors of all formats share one buffer of bytes, the second ones another, and so on.
        """
        found: dict[bool, list[torch.Tensor]] = {eight_bit: [] for eight_bit in formats}
        for number in range(max(map(len, formats.values()))):
            sharing = {eight_bit: tensors[number] for eight_bit, tensors in formats.items() if number < len(tensors)}
            if len(formats) == 1:
                [(eight_bit, tensor)] = sharing.items()
                whole = torch.empty(count, *tensor.shape, dtype=tensor.dtype, device=device)
                self._buffers.append(whole)
                found[eight_bit].append(whole)
                continue
            width = max(tensor.nbytes for tensor in sharing.values())
            buffer = torch.empty(count, -(-width // _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8, device=device)
            self._buffers.append(buffer)
            for eight_bit, tensor in sharing.items():
                found[eight_bit].append(buffer[:, : tensor.nbytes].view(tensor.dtype).unflatten(1, tensor.shape))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def row(self, side: str, slot: int, branch: int) -> torch.Tensor:
        """The row of a slot and branch, int64 [1] on the device."""
        return self._numbers[slot * self._branches + branch]

    def load(self, layer: int, side: str, eight_bit: bool, row: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
        """Copies the content of a row into the tensors ``out``, which have its format."""
        for view, target in zip(self._views[layer][side, eight_bit], out, strict=True):
            wide = _movable(view, target)
            torch.index_select(_as(view, wide), 0, row, out=_as(target, wide).unsqueeze(0))

    def save(self, layer: int, side: str, eight_bit: bool, row: torch.Tensor, made: Sequence[torch.Tensor]) -> None:
        """Copies the tensors ``made``, which have the format, into a row."""
        for view, source in zip(self._views[layer][side, eight_bit], made, strict=True):
            wide = _movable(view, source)
            _as(view, wide).index_copy_(0, row, _as(source, wide).unsqueeze(0))

    def lend(self, layer: int, side: str, row: torch.Tensor, first: int) -> Lend | None:
        """The place into which a layer itself puts the keys and values of a row's tokens, from token ``first`` on.

        None where the slots can hold 8 bits, too: what is made for them is saved afterwards. Not for slots in which
        features of 16 bits are kept in 8.
        """
        if (side, True) in self._views[layer]:
            return None
        keys, values = self._views[layer][side, False]
        return Lend(keys, values, row, first)


def _movable(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype in which numbers are moved between tensors of one dtype: as wide as rows and strides allow.

    Torch's indexing copies by the element, a thread each, and does not take fp8 everywhere.
    """
    size = tensors[0].dtype.itemsize
    for wide in (torch.complex128, torch.int64):
        steps = [step * size for x in tensors for step in (x.shape[-1], x.storage_offset(), *x.stride()[:-1])]
        if all(step % wide.itemsize == 0 for step in steps):
            return wide
    return tensors[0].dtype if size > 1 else torch.uint8


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.view(dtype)
