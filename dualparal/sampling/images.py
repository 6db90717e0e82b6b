"""The part that a video's images have in its latent frames, and in the conditions of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class ImageCondition:
    """All that a model is told of a video's images. Latent frames are counted from the video's first.

    Attributes:
        first: [1, C, k, h, w] float32, told of the first k latent frames.
        later: [1, C, 1, h, w], of each one after them; None: there is none.
        ending: [1, C, e, h, w], of the last e of all that are computed, which an image ends; None: no image does.
        length: latent frames that are computed, where there is an ``ending``; otherwise 0.
        tokens: [n, text_dim] in the transformer's dtype: read by attention, before the text's; None: no such.
    """

    first: torch.Tensor
    later: torch.Tensor | None = None
    ending: torch.Tensor | None = None
    length: int = 0
    tokens: torch.Tensor | None = None

    def of(self, frames: range) -> torch.Tensor:
        """The condition [1, C, F, h, w] of consecutive latent frames."""
        end = frames.stop if self.ending is None else self.length - self.ending.shape[2]
        early, late = self.first.shape[2], max(frames.start, min(frames.stop, end))
        parts = [self.first[:, :, frames.start : min(late, early)]]
        if (count := late - max(frames.start, early)) > 0:
            assert self.later is not None, "a frame that nothing is known of"
            parts.append(self.later.expand(-1, -1, count, -1, -1))
        if self.ending is not None and frames.stop > end:
            parts.append(self.ending[:, :, late - end : frames.stop - end])
        return torch.cat(parts, dim=2)

    def on(self, device: torch.device) -> ImageCondition:
        """The same, told of frames on a device; ``tokens`` stay."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items() if name != "tokens"}
        return replace(self, **moved)  # type: ignore[arg-type]

    def before(self, tokens: torch.Tensor) -> torch.Tensor:
        """Prompt embeddings [branches, n, text_dim] with the images' tokens before the text's in every branch."""
        if self.tokens is None:
            return tokens
        return torch.cat([self.tokens.to(tokens).expand(len(tokens), -1, -1), tokens], dim=1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        found = {"first": self.first, "later": self.later, "ending": self.ending, "tokens": self.tokens}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor], length: int) -> ImageCondition:
        """The inverse of ``tensors``. Raises KeyError."""
        later, ending, tokens = (tensors.get(name) for name in ("later", "ending", "tokens"))
        return cls(tensors["first"], later, ending, length if ending is not None else 0, tokens)
