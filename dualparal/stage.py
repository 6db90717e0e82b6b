"""A run of layers with its neighbour features. It knows neither its rank nor the schedule.

Everything that does not change from unit to unit is made once: time conditions per step, keys and values of the
text per prompt, rotary angles per window. Layers share one workspace for keys and values [own | next | previous].

``forward`` is a function of tensors and a ``StepShape`` alone: slot numbers are tensors too, so that a captured
graph of it (``graphs.py``) serves every block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dualparal.features import FeatureStore, KeysValues
from dualparal.models.base import Grid, Pending, Rotary, Slice, TimeCondition
from dualparal.schedule import Features, Unit


class StepShape(NamedTuple):
    """What decides which operations a unit takes; two units of one shape differ in the values of tensors only."""

    expert: int
    branch: int
    frames: int
    fed_context: int  # leading frames that belong to the previous block (``paper``)
    reads: tuple[str, ...]  # sides of the features read, in the order in which their keys follow the own ones
    writes: tuple[str, ...]


class StepInputs(NamedTuple):
    """The tensors of a unit. ``text`` and ``time`` are shared between units and never written to."""

    hidden: torch.Tensor  # first stage: latents [1, C, F, H, W]; otherwise hidden states [tokens, inner]
    text: torch.Tensor  # [layers, 2, tokens, inner]
    time: TimeCondition
    rotary: Rotary
    read_at: tuple[torch.Tensor, ...]  # int64 [1] each: rows of the feature store
    write_at: tuple[torch.Tensor, ...]


Forward = Callable[[StepShape, StepInputs], torch.Tensor]


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
        wrap: what to put around ``forward``, such as ``graphs.Graphed``.
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
        wrap: Callable[[Forward], Forward] | None = None,
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
        self._step = wrap(self.forward) if wrap else self.forward
        self._time: dict[int, TimeCondition] = {}
        self._prompts: dict[int, torch.Tensor] = {}
        self._text: dict[tuple[int, int, int], torch.Tensor] = {}
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
            Hidden states [tokens, inner], or on the last stage the velocity [1, C, own frames, H, W]. Good until the
            next unit.
        """
        expert = self.expert_of_step[unit.step]
        shape = StepShape(
            expert, unit.branch, window[1], fed_context, tuple(f.side for f in reads), tuple(f.side for f in writes)
        )
        inputs = StepInputs(
            hidden,
            self._text_condition(prompt, unit.branch, expert),
            self._time_condition(unit.step),
            self._angles(*window),
            tuple(self._row(features) for features in reads),
            tuple(self._row(features) for features in writes),
        )
        return self._step(shape, inputs)

    def forward(self, shape: StepShape, inputs: StepInputs) -> torch.Tensor:
        """The arithmetic of a unit; nothing else decides its result."""
        expert, lent, tokens = self.experts[shape.expert], self.context_tokens, self.grid.tokens
        hidden = expert.embed(inputs.hidden) if self.first else inputs.hidden
        own = len(hidden)
        context = self.workspace.rows(0, own + lent * len(shape.reads))
        first_own = shape.fed_context * tokens
        rows = {"head": first_own, "tail": own - lent}
        pending: Pending | None = None
        for index in range(expert.num_layers):
            for place, (side, at) in enumerate(zip(shape.reads, inputs.read_at, strict=True)):
                self._features.load(index, side, at, context.rows(own + place * lent, lent))
            text = KeysValues(inputs.text[index, 0], inputs.text[index, 1])
            lends = [
                self._features.lend(index, side, at, rows[side])
                for side, at in zip(shape.writes, inputs.write_at, strict=True)
            ]
            hidden, pending = expert.layer(index, hidden, pending, inputs.time, text, inputs.rotary, context, lends)
        if not self.last:
            return expert.finish(hidden, pending)
        assert pending is not None, "a stage has at least one layer"
        return expert.head(hidden[first_own:], (pending[0][first_own:], pending[1]), inputs.time, self.grid)

    @property
    def _features(self) -> FeatureStore:
        assert self.store is not None, "the schedule reads features but the stage has no store"
        return self.store

    def _row(self, features: Features) -> torch.Tensor:
        return self._features.row(features.side, features.slot, features.branch)

    def _time_condition(self, step: int) -> TimeCondition:
        if step not in self._time:
            self._time[step] = self.experts[self.expert_of_step[step]].time(self.timesteps[step])
        return self._time[step]

    def _text_condition(self, prompt: int, branch: int, expert: int) -> torch.Tensor:
        key = prompt, branch, expert
        if key not in self._text:
            self._text[key] = self.experts[expert].text(self._prompts[prompt][branch])
        return self._text[key]

    def _angles(self, start: int, frames: int) -> Rotary:
        if self._rotary is None or self._rotary[0] != (start, frames):
            self._rotary = (start, frames), self.experts[0].rotary(start, frames, self.grid)
        return self._rotary[1]
