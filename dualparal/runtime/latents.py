"""Latents of a video's blocks in flight, with their samplers and updates. Stage 0 owns them besides its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from dualparal.config.reuse import StepPlan
from dualparal.device import to_device
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.sampling.continued import KnownBlock
from dualparal.sampling.extrapolate import extrapolate
from dualparal.sampling.images import ImageCondition
from dualparal.sampling.sampler import BlockSampler, Sampler
from dualparal.sampling.state import BlockState
from dualparal.schedule.actions import Unit
from dualparal.schedule.layout import Layout
from dualparal.schedule.schedule import Schedule

StepCallback = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]


class LatentQueue:
    """Latents and sampler states of a video's blocks in flight. Owned by stage 0.

    Args:
        schedule: the order of work.
        layout: the places of blocks in the video.
        sampler: makes a fresh state for every block.
        noise: block -> initial latents [1, C, F, H, W], float32.
        prompt_of: block -> id of its prompt, asked once, when the block enters.
        embeds_of: id of a prompt -> its embeddings [branches, sequence, text_dim].
        steps: those of the sampler at which the model runs; between, velocities are extrapolated.
        guidance_scales: one per step of the sampler.
        device: of the latents.
        callback: (block, step, timestep, latents) -> latents, after every step of the sampler.
        condition: what the model is told of images, on the device; None: nothing.
        first_frame: latents [1, C, 1, H, W] that the video begins with, on the device, for a model that keeps them:
            block 0 has them before its first step and after each, as diffusers' WanImageToVideoPipeline feeds them;
            None: it begins with noise.
        clip: block 0, where its latents are known; the sampler's steps of it count for nothing.
    """

    def __init__(
        self,
        schedule: Schedule,
        layout: Layout,
        sampler: Sampler,
        noise: Callable[[int], torch.Tensor],
        prompt_of: Callable[[int], int],
        embeds_of: Callable[[int], torch.Tensor],
        steps: StepPlan,
        guidance_scales: Sequence[float],
        device: torch.device,
        callback: StepCallback | None = None,
        condition: ImageCondition | None = None,
        first_frame: torch.Tensor | None = None,
        clip: KnownBlock | None = None,
    ) -> None:
        self.schedule = schedule
        self.layout = layout
        self.sampler = sampler
        self.noise = noise
        self.prompt_of = prompt_of
        self.embeds_of = embeds_of
        self.steps = steps
        self.guidance_scales = guidance_scales
        self.device = device
        self.callback = callback
        self.clip = clip
        self.condition = condition
        self.first_frame = first_frame
        self._latents: dict[int, torch.Tensor] = {}
        self._states: dict[int, BlockSampler] = {}
        self._prompts: dict[int, int] = {}
        self._velocity: dict[tuple[int, int], torch.Tensor] = {}  # by block and branch
        self._kept: dict[tuple[int, int], list[torch.Tensor]] = {}  # as ``BlockState.velocities``

    def state(self) -> dict[int, BlockState]:
        """Latents and sampler states of the blocks in flight, which nobody will write to."""
        branches = range(self.schedule.branches if self.steps.kept else 0)
        return {
            block: BlockState(
                self._latents[block], state.state(), [self._kept.get((block, branch), []) for branch in branches]
            )
            for block, state in self._states.items()
        }

    def restore(self, blocks: Mapping[int, BlockState], finished: Mapping[int, torch.Tensor]) -> None:
        """Restores a ``state``.

        Args:
            blocks: the states by block.
            finished: final latents [1, C, F, H, W] of the block before the first, and of block 0 where it is the
                anchor; by block, where they are kept.
        """
        for block, latents in finished.items():
            self._latents[block] = latents.to(self.device)
        if self.schedule.is_anchored:
            self._prompts[0] = self.prompt_of(0)
        for block in sorted(blocks):
            self._prompts[block] = self.prompt_of(block)
            self._latents[block] = blocks[block].latents.to(self.device)
            self._states[block] = self.sampler.start(block)
            self._states[block].restore(blocks[block].sampler, self.device)
            for branch, kept in enumerate(blocks[block].velocities):
                self._kept[block, branch] = [velocity.to(self.device) for velocity in kept]

    def prompt(self, unit: Unit) -> int:
        """Id of the prompt of the unit's block. The first unit of a block makes it enter."""
        if unit.block not in self._prompts:
            self._prompts[unit.block] = self.prompt_of(unit.block)
            known = self._known(unit.block)
            begun = to_device(known.at(0) if known else self.noise(unit.block), self.device)
            self._latents[unit.block] = self._begun(unit.block, begun)
            self._states[unit.block] = self.sampler.start(unit.block)
        return self._prompts[unit.block]

    def _known(self, block: int) -> KnownBlock | None:
        return self.clip if block == 0 else None

    def window(self, unit: Unit) -> torch.Tensor:
        """Latents [1, C, F, H, W] that the model is fed for a unit.

        Under a policy that feeds latents, and in a refresh, the end of the block before lies in front of the own ones.
        Channels of what the model is told of images lie behind the latents'.
        """
        window, refresh = self._latents[unit.block], self.schedule.refreshes(unit)
        if fed := self.layout.fed_context(unit.block, refresh):
            window = torch.cat([self._latents[unit.block - 1][:, :, -fed:], window], dim=2)
        if self.condition is None:
            return window
        return torch.cat([window, self.condition.of(self.layout.window(unit.block, refresh))], dim=1)

    def velocity_shape(self, unit: Unit) -> torch.Size:
        """The shape [1, C, F, H, W] of the velocity of a unit: that of its block's own latents."""
        return self._latents[unit.block].shape

    def take(self, unit: Unit, velocity: torch.Tensor) -> None:
        """Keeps a copy of a branch's velocity until the update; no update comes for one of a finished block."""
        if self.schedule.makes_anchor(unit):
            return
        self._velocity[unit.block, unit.branch] = velocity.clone()

    def update(self, block: int, step: int) -> None:
        """Takes the sampler's steps that follow from the block's velocities at a step of the schedule."""
        run = [self._velocity.pop((block, branch)) for branch in range(self.schedule.branches_at(step))]
        self._keep(block, step, 0, run[0])
        if len(run) == 2:
            self._keep(block, step, 1, run[1].float() - run[0].float())
        for at in self.steps.span(step):
            velocity = self._velocity_at(block, step, at, run)
            latents = self._states[block].step(velocity, at, self._latents[block])
            if known := self._known(block):
                latents = to_device(known.at(at + 1), self.device)
            elif self.callback is not None:
                latents = self.callback(block, at, self.sampler.timesteps[at], latents)
            self._latents[block] = self._begun(block, latents)

    def _begun(self, block: int, latents: torch.Tensor) -> torch.Tensor:
        if block > 0 or self.first_frame is None:
            return latents
        return torch.cat([self.first_frame, latents[:, :, 1:]], dim=2)

    def _keep(self, block: int, step: int, branch: int, velocity: torch.Tensor) -> None:
        """Keeps what a branch was at a step as long as others are extrapolated from it."""
        if count := len(self.steps.known(step, branch)):
            kept = [*self._kept.get((block, branch), []), velocity.float()]  # a new list: a snapshot may have the other
            self._kept[block, branch] = kept[-count:]

    def _velocity_at(self, block: int, step: int, at: int, run: Sequence[torch.Tensor]) -> torch.Tensor:
        """The velocity that the sampler takes at its step ``at``, after step ``step`` of the schedule.

        Args:
            run: velocities of the branches that were run at ``step``.
        """
        own = run if at == self.steps.runs[step] else ()
        scale = self.guidance_scales[at]
        if len(own) == 2 and self.steps.guided[step]:
            return combine_guidance(own[0], own[1], scale)
        cond = own[0] if own else self._extrapolated(block, step, at, 0)
        if not self.steps.guided[step]:
            return cond
        cond = cond.float()
        return combine_guidance(cond, cond + self._extrapolated(block, step, at, 1), scale)

    def _extrapolated(self, block: int, step: int, at: int, branch: int) -> torch.Tensor:
        levels = [self.steps.levels[known] for known in self.steps.known(step, branch)]
        return extrapolate(self._kept[block, branch], levels, self.steps.levels[at])

    def emit(self, block: int) -> torch.Tensor:
        """Gives out the final latents [1, C, F, H, W] of a block.

        Its successor may still read them; its predecessor is forgotten.
        """
        del self._states[block]
        for branch in range(self.schedule.branches):
            self._kept.pop((block, branch), None)
        self._latents.pop(block - 1, None)
        self._prompts.pop(block - 1, None)
        return self._latents[block]
