"""The prompt embeddings of each block of a video."""

from __future__ import annotations

import threading
from bisect import bisect_right

import torch


class Prompts:
    """Prompt embeddings by block. A prompt's id is the first block that it was set for.

    ``change`` may be called from any thread while blocks are entering.

    Args:
        embeds: first block -> embeddings [branches, sequence, text_dim]; the first block that will be asked for, or one
            before it, is among the keys.
    """

    def __init__(self, embeds: dict[int, torch.Tensor]) -> None:
        self._embeds = dict(embeds)
        self._entered = -1
        self._lock = threading.Lock()

    def of(self, block: int) -> int:
        """Id of the prompt of a block, which counts as entered from now on."""
        with self._lock:
            self._entered = max(self._entered, block)
            return self._current(block)

    def _current(self, block: int) -> int:
        starts = sorted(self._embeds)
        return starts[bisect_right(starts, block) - 1]

    def embeds(self, prompt: int) -> torch.Tensor:
        """Embeddings [branches, sequence, text_dim] of a prompt by its id; raises KeyError once it is forgotten."""
        return self._embeds[prompt]

    def forget(self, before: int) -> None:
        """Drops the prompts that only blocks before the block ``before`` have used."""
        with self._lock:
            current = self._current(before)
            self._embeds = {start: embeds for start, embeds in self._embeds.items() if start >= current}

    def state(self) -> dict[int, torch.Tensor]:
        """First block -> embeddings, of all prompts that blocks under way and later ones use."""
        with self._lock:
            return dict(self._embeds)

    def change(self, embeds: torch.Tensor) -> int:
        """Sets the embeddings of new blocks from now on; later changes that were planned before are dropped.

        Returns:
            The first block that takes them.
        """
        with self._lock:
            first = self._entered + 1
            self._embeds = {start: e for start, e in self._embeds.items() if start < first}
            self._embeds[first] = embeds
            return first
