"""The dtype of a VAE, and the cut of the picture's rows over several decoders. No torch."""

from __future__ import annotations

from itertools import pairwise

AUTO = "auto"
MOST_LEVELS = 3  # of 255: frames in 16 bits that lie further from those in float32 are nobody's default
# The most levels of 255 between frames in bfloat16 and in float32, of the package's trained VAE on latents of its
# model, few steps and six, on a CPU: bench/vae_error.py, docs/vae-dtype.md.
MEASURED_LEVELS = 7


def choose_vae_dtype(asked: str, on_card: bool, has_bfloat16: bool = True) -> str:
    """The dtype that a VAE decodes in.

    Args:
        asked: a dtype's name, which is taken as it is, or "auto": float32 on the CPU; on a card bfloat16 if the card
            has units for it and ``MEASURED_LEVELS`` are at most ``MOST_LEVELS``, else float32.
        on_card: frames are made on a card.
        has_bfloat16: that card multiplies bfloat16 in hardware.

    Returns:
        "float32", "bfloat16" or "float16".
    """
    if asked != AUTO:
        return asked
    return "bfloat16" if on_card and has_bfloat16 and MEASURED_LEVELS <= MOST_LEVELS else "float32"


def row_ranges(height: int, count: int) -> list[range]:
    """The rows of each of ``count`` parts of a picture: contiguous, as even as can be, the larger ones first.

    One row is enough for a part: decoders compute what needs more, to add in the same order, in the place of the whole.

    Args:
        height: latent rows of the picture.
        count: number of parts.

    Raises:
        ValueError: more parts than rows.
    """
    if not 1 <= count <= height:
        raise ValueError(
            f"{count} parts of a picture of {height} latent rows: every part needs a row; use 1 to {height} decoders"
        )
    least, more = divmod(height, count)
    starts = [part * least + min(part, more) for part in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]
