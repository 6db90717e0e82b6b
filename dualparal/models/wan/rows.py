"""Decoding a part of the picture's rows: what mixes rows asks the other parts for theirs; all else is left as it is.

Convolutions over 3x3 points need a row of each neighbour, the attention in the middle needs every row. Norms,
activations, 1x1 convolutions, upsampling (nearest), shortcuts (``DupUp3D``) and patches stay within a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dualparal.config.decoding import row_ranges
from dualparal.models.base import RowExchange

# A matrix product of a single column, and a 1x1 convolution in bfloat16 of up to five, added in another order than one
# of many (measured, torch 2.13, AVX-512). Parts of fewer points than this are computed in the place of the whole.
_FEW_POINTS = 16
# Activations take whole vectors another way than what is left over at the end: exp, 1 of 2**23. Any vectors divide it.
_VECTORS = 64
_NATIVE = ("Slow2d", "Slow3d", "SlowDilated2d", "SlowDilated3d")  # torch's matrix products, beside oneDNN


class OverRows(TorchFunctionMode):
    """A context in which a decoder that is given some rows of the picture makes the frames' rows that belong to them.

    It stands between the decoder's code and torch, for this thread only, so nobody's modules are copied or altered:
    padding and convolutions get their neighbours' rows instead of zeros, attention the keys and values of all. All
    parts must decode the same latents in the same order, each with a context of its own.

    On the CPU every point has the bits that it has in the whole picture. Three things would break that, and are done
    on a tensor of the whole picture's shape, in which the other rows are zeros: a convolution that torch would give to
    other code for its size (``_select_conv_backend``) or that is a matrix product over several threads, few points,
    and activations that do not come out even in vectors or are cut for threads. With one thread that is rare; with
    more, a small model gains nothing from parts. Attention on the CPU is done for all rows by every part, as its
    blocks depend on the number of queries: counted, 0.4 % of a decode at 480p, 1 % at 720p. Other devices choose their
    algorithms by shape, and bits are not promised; there each part has its own queries and nothing is done twice.

    Args:
        rows: the way to the other parts.

    Attributes:
        part: the latent rows of this part, once ``begin`` was called.
    """

    def __init__(self, rows: RowExchange) -> None:
        super().__init__()
        self._rows = rows
        self._total = 0
        self._ranges: list[range] = []
        self.part = range(0)
        self._replaced: Mapping[Any, Callable[..., torch.Tensor]] = {
            F.pad: self._pad,
            torch.conv2d: self._convolve,
            torch.conv3d: self._convolve,
            F.scaled_dot_product_attention: self._attend,
            F.silu: self._each_point,
            F.normalize: self._each_point,
        }

    def begin(self, height: int) -> None:
        """Makes ready for latents of ``height`` rows. Raises ValueError when there are more parts than rows."""
        self._ranges = row_ranges(height, self._rows.count)
        self._total, self.part = height, self._ranges[self._rows.index]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        replaced = self._replaced.get(func)
        return func(*args, **(kwargs or {})) if replaced is None else replaced(func, *args, **(kwargs or {}))

    def _pad(self, func: Any, x: torch.Tensor, pad: Sequence[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Padding, with the neighbours' rows in place of zeros above and below."""
        padded: torch.Tensor = func(x, pad, *args, **kwargs)
        left, _, above, below = [*pad, 0, 0][:4]
        if above or below:
            assert above == below, "a convolution as wide above as below"
            inner = padded.narrow(-1, left, x.shape[-1])
            inner = inner.narrow(2, pad[4], x.shape[2]) if len(pad) > 4 else inner
            first, last = self._beside(x, above)
            if first is not None:
                inner[..., :above, :].copy_(first)
            if last is not None:
                inner[..., -below:, :].copy_(last)
        return padded

    def _convolve(
        self,
        func: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        """A convolution of rows beside the neighbours', which stand where it would pad with zeros or ``_pad`` did."""
        sides = weight.dim() - 2
        stride, padding, dilation = ((v,) * sides if isinstance(v, int) else (*v,) for v in (stride, padding, dilation))
        above = padding[-2]
        there = weight.shape[-2] - 1 - 2 * above  # rows that ``_pad`` has added
        own = x.shape[-2] - there
        whole = self._whole(x, own, there)
        inner = padding
        if above:
            x = self._pad(F.pad, x, [0, 0, above, above])
            inner = (*padding[:-2], 0, padding[-1])
        here = (x, weight, bias, stride, inner, dilation)
        if x.device.type == "cpu":
            in_whole = (x.new_empty(()).expand(whole), weight, bias, stride, padding, dilation)
            backends = [_backend(*arguments, groups) for arguments in (here, in_whole)]
            steady = backends[1] not in _NATIVE or torch.get_num_threads() == 1
            if backends[0] != backends[1] or not steady or own * x.shape[-1] < _FEW_POINTS:
                top = self._top(own)
                y = func(_placed(x, whole, top - above), *in_whole[1:], groups)
                return _dense(y.narrow(-2, top, own))
        y = func(*here, groups)
        return y

    def _each_point(self, func: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """An activation, or a norm over the channels of every point."""
        own, whole = x.shape[-2], self._whole(x, x.shape[-2])
        if x.device.type == "cpu":
            even = x.numel() % _VECTORS == 0 and torch.Size(whole).numel() % _VECTORS == 0
            steady = func is F.normalize or (even and torch.get_num_threads() == 1)
            if not steady or own * x.shape[-1] < _FEW_POINTS:
                top = self._top(own)
                return _dense(func(_placed(x, whole, top), *args, **kwargs).narrow(-2, top, own))
        y: torch.Tensor = func(x, *args, **kwargs)
        return y

    def _attend(
        self, func: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Attention [t, 1, tokens, C] of this part's queries to the tokens of all parts."""
        own = queries.shape[-2]
        if queries.device.type != "cpu":
            keys, values = self._gathered(torch.cat([keys, values], dim=-1)).chunk(2, dim=-1)
            y: torch.Tensor = func(queries, keys, values, *args, **kwargs)
            return y
        gathered = self._gathered(torch.cat([queries, keys, values], dim=-1)).chunk(3, dim=-1)
        y = func(*gathered, *args, **kwargs)
        return y.narrow(-2, self._top(own), own)

    def _gathered(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [..., own, C] of this part to those of the picture [..., tokens, C]."""
        per_row = tokens.shape[-2] // len(self.part)
        sizes = [[*tokens.shape[:-2], len(rows) * per_row, tokens.shape[-1]] for rows in self._ranges]
        parts = [tokens if rows == self.part else tokens.new_empty(size) for rows, size in zip(self._ranges, sizes)]
        others = [part for part in range(self._rows.count) if part != self._rows.index]
        self._rows.swap(dict.fromkeys(others, tokens), {part: parts[part] for part in others})
        return torch.cat(parts, dim=-2)

    def _beside(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The last rows of the part above this one, and the first of that below; None at the picture's edge."""
        edges = {self._rows.index - 1: x[..., :count, :], self._rows.index + 1: x[..., -count:, :]}
        sends = {part: rows.contiguous() for part, rows in edges.items() if 0 <= part < self._rows.count}
        wanted = {part: torch.empty_like(rows) for part, rows in sends.items()}
        self._rows.swap(sends, wanted)
        return wanted.get(self._rows.index - 1), wanted.get(self._rows.index + 1)

    def _top(self, own: int) -> int:
        """Rows (or tokens) of the picture above this part's ``own``."""
        return self.part.start * (own // len(self.part))

    def _whole(self, x: torch.Tensor, own: int, added: int = 0) -> list[int]:
        """The shape that ``x`` has for the whole picture; ``added``: rows beside those of the picture."""
        return [*x.shape[:-2], self._total * (own // len(self.part)) + added, x.shape[-1]]


def _backend(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> str:
    """Name of the code that torch takes for a convolution: by sizes, dtype and number of threads."""
    none = [0] * len(stride)
    chosen = torch._C._select_conv_backend(x, weight, bias, stride, padding, dilation, False, none, groups)
    return str(chosen).rpartition(".")[2]


def _placed(x: torch.Tensor, shape: Sequence[int], top: int) -> torch.Tensor:
    """Rows ``x`` from row ``top`` on of a tensor of zeros, in the same order of memory; what juts out is left away."""
    whole = torch.empty_permuted(shape, _order(x), dtype=x.dtype, device=x.device).zero_()
    begin, end = max(top, 0), min(top + x.shape[-2], shape[-2])
    whole[..., begin:end, :] = x[..., begin - top : end - top, :]
    return whole


def _dense(x: torch.Tensor) -> torch.Tensor:
    """A copy without gaps, in the same order of memory."""
    return torch.empty_permuted(x.shape, _order(x), dtype=x.dtype, device=x.device).copy_(x)


def _order(x: torch.Tensor) -> list[int]:
    """Dimensions of a tensor from the outermost in memory to the innermost."""
    return sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)
