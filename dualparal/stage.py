"""A run of layers with its neighbour features. It knows neither its rank nor the schedule.

Everything that does not change from unit to unit is made once: time conditions per step, keys and values of the
text per prompt, rotary angles per window. Layers share one workspace for keys and values [own | next | previous].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dualparal.features import FeatureStore, KeysValues
from dualparal.models.base import Grid, Pending, Rotary, Slice, TimeCondition
from dualparal.schedule import Features, Unit


class Stage:
    """One rank's layers of every expert.

    Args:
        experts: the same layers of each transformer of the model.
        expert_of_step: which of them runs at each step.
        timesteps: the sampler's, [T].
        store: slots for the features of neighbours; None when no block reads another.
        max_tokens: own tokens of the largest window.
        context_tokens: tokens that a neighbour lends.
        first, last: whether this stage embeds latents, and whether it makes velocities.
    """

    def __init__(
        self,
        experts: Sequence[Slice],
        expert_of_step: Sequence[int],
        timesteps: torch.Tensor,
        store: FeatureStore | None,
        grid: Grid,
        max_tokens: int,
        context_tokens: int,
        *,
        first: bool,
        last: bool,
    ) -> None:
        self.experts = experts
        self.expert_of_step = expert_of_step
        self.timesteps = timesteps
        self.store = store
        self.grid = grid
        self.context_tokens = context_tokens
        self.first, self.last = first, last
        self.inner_dim = experts[0].inner_dim
        slice_ = experts[0]
        rows = max_tokens + (2 * context_tokens if store is not None else 0)
        self.workspace = KeysValues(
            *(torch.empty(rows, self.inner_dim, dtype=slice_.dtype, device=slice_.device) for _ in range(2))
        )
        self._time: dict[int, TimeCondition] = {}
        self._prompts: dict[int, torch.Tensor] = {}
        self._text: dict[tuple[int, int, int], list[KeysValues]] = {}
        self._rotary: tuple[tuple[int, int], Rotary] | None = None

    def add_prompt(self, prompt: int, embeds: torch.Tensor) -> None:
        """Makes a prompt known: embeds [branches, sequence, text_dim]."""
        self._prompts[prompt] = embeds

    def drop_prompts(self, before: int) -> None:
        """Forgets prompts older than ``before``: no block in flight uses them any more."""
        for key in [k for k in self._text if k[0] < before]:
            del self._text[key]
        for prompt in [p for p in self._prompts if p < before]:
            del self._prompts[prompt]

    def knows_prompt(self, prompt: int) -> bool:
        return prompt in self._prompts

    @torch.inference_mode()
    def run(
        self,
        hidden: torch.Tensor,
        unit: Unit,
        *,
        prompt: int,
        window: tuple[int, int],
        fed_context: int,
        reads: Sequence[Features],
        writes: Sequence[Features],
    ) -> torch.Tensor:
        """One unit through the layers.

        Args:
            hidden: first stage: latents [1, C, F, H, W]; otherwise hidden states [tokens, inner].
            window: absolute index of the first frame, and number of frames F.
            fed_context: leading frames that belong to the previous block (``paper``).
            reads, writes: slots of the feature store, in the order in which keys follow the own ones.

        Returns:
            Hidden states [tokens, inner], or on the last stage the velocity [1, C, own frames, H, W].
        """
        which = self.expert_of_step[unit.step]
        expert = self.experts[which]
        time = self._time_condition(unit.step)
        text = self._text_condition(prompt, unit.branch, which)
        rotary = self._angles(*window)
        if self.first:
            hidden = expert.embed(hidden)
        pending: Pending | None = None
        for index in range(expert.num_layers):
            neighbours = [self._slot(index, features) for features in reads]
            hidden, pending, own = expert.layer(
                index, hidden, pending, time, text[index], rotary, neighbours, self.workspace
            )
            for features in writes:
                row = fed_context * self.grid.tokens
                if features.side == "tail":
                    row = len(own.keys) - self.context_tokens
                self._slot(index, features).copy_(own.rows(row, self.context_tokens))
        if not self.last:
            return expert.finish(hidden, pending)
        first = fed_context * self.grid.tokens
        assert pending is not None, "a stage has at least one layer"
        return expert.head(hidden[first:], (pending[0][first:], pending[1]), time, self.grid)

    def _slot(self, layer: int, features: Features) -> KeysValues:
        assert self.store is not None, "the schedule reads features but the stage has no store"
        return self.store.slot(layer, features.side, features.slot, features.branch)

    def _time_condition(self, step: int) -> TimeCondition:
        if step not in self._time:
            self._time[step] = self.experts[self.expert_of_step[step]].time(self.timesteps[step])
        return self._time[step]

    def _text_condition(self, prompt: int, branch: int, expert: int) -> list[KeysValues]:
        key = prompt, branch, expert
        if key not in self._text:
            self._text[key] = self.experts[expert].text(self._prompts[prompt][branch])
        return self._text[key]

    def _angles(self, start: int, frames: int) -> Rotary:
        if self._rotary is None or self._rotary[0] != (start, frames):
            self._rotary = (start, frames), self.experts[0].rotary(start, frames, self.grid)
        return self._rotary[1]
