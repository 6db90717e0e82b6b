"""Small three-dimensional convolutions on the CPU, with torch's own bits in a third of its time.

Where an input has few channels, torch convolves by ``slow_conv3d``: it copies all windows of the input into one matrix
(42 MB for 24 channels of 4 x 64 x 64) and multiplies. Most of that is the copy, which leaves the cache on its way out
and is read again. Here it is made and multiplied piece by piece. Each output is the same sum in the same order, as a
product of matrices adds along the windows and a piece holds whole windows. Wan's own VAE is too wide to be affected.
"""

from __future__ import annotations

from typing import Any

import torch

_SLOW: Any = torch._C._ConvBackend.Slow3d  # type: ignore[attr-defined]
PIECE = 1 << 20  # bytes of windows at a time; half of it and twice as much are as fast with caches of 2 MiB and more
_FEW = 12  # outputs; products of fewer rows add in another order now and then over several threads (measured, MKL)
_PLAIN = ((1, 1, 1), (0, 0, 0), (1, 1, 1), 1)  # stride, padding, dilation, groups: a causal convolution pads by itself


def is_slow(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *options: Any) -> bool:
    """True where ``by_columns`` may take the place of ``slow_conv3d``, by which torch would convolve.

    Args:
        x: [1, C, F, H, W], any device and dtype.
        weight: [O, C, f, h, w].
        bias: [O].
        options: stride, padding, dilation and groups, as ``torch.nn.functional.conv3d`` takes them.
    """
    if bias is None or options != _PLAIN or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if x.ndim != 5 or len(x) != 1 or any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (x, weight, bias)):
        return False
    if len(weight) < _FEW and (len(weight) == 1 or torch.get_num_threads() > 1):
        return False
    stride, padding, dilation, groups = options
    backend = torch._C._select_conv_backend(x, weight, bias, stride, padding, dilation, False, padding, groups)
    return bool(backend == _SLOW)


def by_columns(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The convolution of a video, without padding and with stride 1, by products of matrices.

    Args:
        x: [1, C, F, H, W], float32 on the CPU.
        weight: [O, C, f, h, w].
        bias: [O].

    Returns:
        [1, O, F - f + 1, H - h + 1, W - w + 1].
    """
    windows = x[0]
    for axis, size in enumerate(weight.shape[2:], start=1):
        windows = windows.unfold(axis, size, 1)
    windows = windows.permute(0, 4, 5, 6, 1, 2, 3)  # [C, f, h, w, frames, rows, width]
    frames, rows, width = windows.shape[4:]
    matrix, start = weight.flatten(1), bias[:, None]
    depth = matrix.shape[1]
    few, some = frames, rows  # of a piece: all that there is, or some rows of one frame
    if 4 * depth * frames * rows * width > PIECE:
        few, some = 1, _even(rows, max(1, PIECE // (4 * depth * width)))
    columns = x.new_empty(depth * few * some * width)
    made = x.new_empty(len(weight), frames * rows * width)
    for first in range(0, frames, few):
        for top in range(0, rows, some):
            piece = windows[..., first : first + few, top : top + some, :]
            count = piece.shape[4:].numel()
            filled = columns[: depth * count].view(piece.shape).copy_(piece).view(depth, count)
            begin = (first * rows + top) * width
            torch.addmm(start, matrix, filled, out=made[:, begin : begin + count])
    return made.view(1, len(weight), frames, rows, width)


def _even(total: int, most: int) -> int:
    """The size of parts of ``total``, ``most`` or fewer each, whose number is least and which are about as large."""
    parts = -(-total // most)
    return -(-total // parts)
