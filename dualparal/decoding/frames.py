"""Decoded frames as the caller wants them: arrays, tensors, pictures, bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL.Image import Image

FrameKind = Literal["pt", "np", "pil"]


@overload
def to_output(frames: torch.Tensor, output_type: Literal["pt"]) -> torch.Tensor: ...


@overload
def to_output(frames: torch.Tensor, output_type: Literal["np"]) -> npt.NDArray[np.float32]: ...


@overload
def to_output(frames: torch.Tensor, output_type: Literal["pil"]) -> list[Image]: ...


def to_output(frames: torch.Tensor, output_type: FrameKind) -> torch.Tensor | npt.NDArray[np.float32] | list[Image]:
    """Frames as diffusers' ``VideoProcessor`` would give them, without the batch axis.

    Args:
        frames: [F, 3, H, W] in [-1, 1], of any floating-point dtype.
        output_type: "pt", "np" or "pil".

    Returns:
        "pt": [F, 3, H, W] in [0, 1], dtype and device kept. "np": float32 [F, H, W, 3] in [0, 1]. "pil": F images.

    Raises:
        ValueError: another type.
    """
    if output_type == "pt":
        return _to_unit(frames)
    if output_type == "np":
        return _to_unit(frames).permute(0, 2, 3, 1).float().contiguous().cpu().numpy()
    if output_type == "pil":
        from PIL import Image

        return [Image.fromarray(frame) for frame in to_uint8(frames)]
    raise ValueError(f"output_type={output_type!r} is not an output type of frames: use 'pt', 'np' or 'pil'")


def to_uint8(frames: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Frames [F, 3, H, W] in [-1, 1] as [F, H, W, 3] uint8, the values of diffusers' PIL images."""
    # Rounded where the frames are: a quarter of the bytes to copy to the host.
    levels = (_to_unit(frames).float() * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _to_unit(frames: torch.Tensor) -> torch.Tensor:
    """Frames in [-1, 1] as frames in [0, 1]; values beyond are clamped."""
    return (frames * 0.5 + 0.5).clamp(0, 1)
