"""Timesteps of the frames of a window, and what the layers make of them.

Most units have one. Others have runs of frames with one each: a fixed first frame is finished from the beginning, and
a model that was trained for frames of unequal noise is told how far its neighbour's are, where these are fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from dualparal.models.base import Slice, TimeCondition
from dualparal.models.times import joined


class Run(NamedTuple):
    """Frames of a window, one after the other, that are at one step; the number of steps: at timestep 0, finished."""

    step: int
    frames: int


class Moments:
    """The time conditions of a stage's units: those of a step are made once, those of several runs joined per unit.

    Args:
        experts: the stage's slices.
        timesteps: the sampler's at the steps of the schedule.
        unequal_times: the model is told the timestep of each frame, where a window's are not all at one.
        fixed_frames: the first frames of the video that are given.
    """

    def __init__(
        self, experts: Sequence[Slice], timesteps: torch.Tensor, unequal_times: bool, fixed_frames: int
    ) -> None:
        self._experts, self._timesteps = experts, timesteps
        self._unequal_times, self._fixed_frames = unequal_times, fixed_frames
        self._made: dict[tuple[int, int], TimeCondition] = {}  # by expert and step

    def runs(self, window: range, step: int, fed: int, fed_step: int) -> list[Run]:
        """The runs of a unit's window.

        Args:
            window: absolute indices of its frames.
            step: the unit's.
            fed: leading frames that belong to the previous block, which has come to ``fed_step``.
        """
        if not self._unequal_times:
            fed_step = step
        if (not fed or fed_step == step) and window.start >= self._fixed_frames:
            return [Run(step, len(window))]
        finished = len(self._timesteps)
        steps = [fed_step if frame < window.start + fed else step for frame in window]
        steps = [finished if frame < self._fixed_frames else at for frame, at in zip(window, steps, strict=True)]
        return [Run(at, len(list(group))) for at, group in groupby(steps)]

    def condition(self, runs: Sequence[Run], expert: int, tokens: int, rows: range | None) -> TimeCondition:
        """The modulations that the timesteps of ``runs`` give to the layers of ``expert``.

        Args:
            runs: of the whole window.
            expert: index of the transformer that runs the unit.
            tokens: of a frame.
            rows: the tokens of this place, where the stage has several; None: all of the window's.
        """
        if len(runs) == 1:
            return self._at(expert, runs[0].step)
        parts, lengths, start = [], [], 0
        for run in runs:
            stop = start + run.frames * tokens
            length = stop - start if rows is None else min(stop, rows.stop) - max(start, rows.start)
            if length > 0:
                parts.append(self._at(expert, run.step))
                lengths.append(length)
            start = stop
        return joined(parts, lengths)

    def _at(self, expert: int, step: int) -> TimeCondition:
        if (expert, step) not in self._made:
            steps = self._timesteps
            timestep = steps[step] if step < len(steps) else torch.zeros_like(steps[0])
            self._made[expert, step] = self._experts[expert].time(timestep)
        return self._made[expert, step]
