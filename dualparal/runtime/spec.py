"""The facts of a stage, fixed for a whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dualparal.config.eight_bit import OFF, EightBitPolicy
from dualparal.models.base import Grid


@dataclass(frozen=True)
class StageSpec:
    """Facts of one stage of a run.

    Attributes:
        layers: indices of its layers in the model.
        num_layers: layers of the whole model.
        grid: size of a latent frame.
        expert_of_step: index of the transformer that runs at each step of the schedule.
        timesteps: the sampler's at these steps.
        slots: number of slots of the feature store, by side ("head", "tail", "anchor"), and of a block's own state
            ("mean").
        branches: 2 with guidance, otherwise 1.
        max_tokens: own tokens of the largest window.
        lent: tokens that are lent, by side.
        starts: the first of them among its own outside of refreshes, by side.
        eight_bit: the layers and steps at which self-attention has 8 bits.
        refreshes: True when the run has refreshes.
        features_8bit: features of attention in 16 bits are kept in 8.
        patch: numbers of a token's latents, and of what is told of images beside them.
        velocity_patch: numbers of a token's velocity.
        windows: number of windows, of all blocks in flight, whose rotary angles are kept.
        anchor_weight: added to the logits of the anchor.
        unequal_times: the model is told the timestep of each frame, where a window's are not all at one.
        fixed_frames: the first frames of the video that are given: they are at timestep 0 throughout.
    """

    layers: range
    num_layers: int
    grid: Grid
    expert_of_step: Sequence[int]
    timesteps: torch.Tensor
    slots: Mapping[str, int]
    branches: int
    max_tokens: int
    lent: Mapping[str, int]
    starts: Mapping[str, int]
    eight_bit: EightBitPolicy = OFF
    refreshes: bool = False
    features_8bit: bool = False
    patch: int = 0
    velocity_patch: int = 0
    windows: int = 1
    anchor_weight: float = 0.0
    unequal_times: bool = False
    fixed_frames: int = 0

    @property
    def sides(self) -> list[str]:
        """The sides of which there are features."""
        return [side for side in self.starts if self.slots[side]]

    @property
    def first(self) -> bool:
        """True when the stage embeds latents."""
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        """True when the stage makes velocities."""
        return self.layers.stop == self.num_layers
