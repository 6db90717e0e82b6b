"""Stage 0 on several ranks: the first has latents, velocities and samplers, the others take their tokens from it."""

from __future__ import annotations

import torch

from dualparal.distributed.teams import Team
from dualparal.runtime.shares import Cut
from dualparal.runtime.stage import Stage, UnitPlan


class FirstPlaces:
    """The ranks of stage 0 as one of them sees it. All make the same calls in the same order.

    Args:
        team: the ranks.
        stage: this rank's layers.
    """

    def __init__(self, team: Team, stage: Stage) -> None:
        self.team = team
        self._stage, self._exchange = stage, team.exchange
        expert = stage.experts[0]
        self._dtype, self._device = expert.dtype, expert.device

    def spread(self, window: torch.Tensor, mark: torch.Tensor, plan: UnitPlan) -> torch.Tensor:
        """Sends all places their tokens; called on the first.

        Args:
            window: latents [1, C, F, H, W].
            mark: [1], see ``nonfinite``.
            plan: of the unit.

        Returns:
            Its own, patches [tokens, patch].
        """
        patches, rows = self._stage.experts[0].patches(window), self._cut(plan).rows
        parts = [patches[part.start : part.stop] for part in rows]
        sends = {place: torch.cat([part.flatten(), mark.to(part.dtype)]) for place, part in enumerate(parts) if place}
        self._exchange.swap(sends, {})
        return parts[0]

    def take(self, plan: UnitPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes what ``spread`` sends; called on the others. Returns (patches [tokens, patch], mark [1])."""
        patch = self._stage.spec.patch
        message = self._empty(len(self._cut(plan).rows[self._exchange.index]) * patch)
        self._exchange.swap({}, {0: message})
        return message[:-1].view(-1, patch), message[-1:]

    def give(self, velocity: torch.Tensor, mark: torch.Tensor) -> None:
        """Sends the velocity of this place's own tokens, of any shape, and its mark [1] to the first place."""
        self._exchange.swap({0: torch.cat([velocity.flatten(), mark])}, {})

    def collect(self, velocity: torch.Tensor, mark: torch.Tensor, plan: UnitPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Joins what ``give`` sends; called on the first place.

        Args:
            velocity: of its own tokens, of any shape.
            mark: its own, [1].
            plan: of the unit.

        Returns:
            The velocity [1, C, own frames, H, W], and the mark [1] of the first stage whose output was not finite.
        """
        cut, patch = self._cut(plan), self._stage.spec.velocity_patch
        wanted = {place: self._empty(len(cut.own(place)) * patch) for place in range(1, self._exchange.count)}
        self._exchange.swap({}, wanted)
        whole = torch.cat([velocity.flatten(), *(message[:-1] for message in wanted.values())])
        marks = torch.stack([mark, *(message[-1:] for message in wanted.values())])
        none = torch.finfo(marks.dtype).max
        first = torch.where(marks > 0, marks, none).amin(0)
        picture = self._stage.experts[0].picture(whole.view(-1, patch), self._stage.spec.grid)
        return picture, first * (first < none)

    def _cut(self, plan: UnitPlan) -> Cut:
        return self._stage.cut(len(plan.window), plan.fed_context)

    def _empty(self, numbers: int) -> torch.Tensor:
        """Memory for so many numbers and a mark."""
        return torch.empty(numbers + 1, dtype=self._dtype, device=self._device)
