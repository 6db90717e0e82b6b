"""Makes the parts of one run: its stages, the edges between them, queues of latents, decoder and checkpointer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dualparal.checkpoint import given
from dualparal.checkpoint.checkpointer import Checkpoint, Checkpointer
from dualparal.checkpoint.snapshot import Resumed
from dualparal.decoding.delivery import Delivery
from dualparal.distributed.edges import Inbound, LocalEdge, Outbound
from dualparal.distributed.messages import Lengths
from dualparal.distributed.prompts import PromptChannel
from dualparal.distributed.remote import ReceiveEdge, SendEdge
from dualparal.distributed.rows import local_rows
from dualparal.distributed.teams import Team
from dualparal.engine.identity import maker, snapshot_info
from dualparal.engine.parts import Parts
from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.runtime.executor import FirstStage, Links, Report, StageExecutor
from dualparal.runtime.graphs import Graphed, cuda_capture
from dualparal.runtime.latents import LatentQueue, StepCallback
from dualparal.runtime.shares import Cut, Share, ShareExchange
from dualparal.runtime.spec import StageSpec
from dualparal.runtime.stage import Forward, Stage
from dualparal.runtime.threads import ThreadedStage
from dualparal.runtime.warm_up import warm_up
from dualparal.sampling.continued import Clip, KnownBlock
from dualparal.sampling.images import ImageCondition
from dualparal.sampling.noise import BlockNoise
from dualparal.sampling.prompts import Prompts
from dualparal.schedule.actions import Unit
from dualparal.schedule.layout import token_ranges
from dualparal.schedule.schedule import Schedule
from dualparal.trace.clock import BusyClock

_WARMED = ("cuda",)  # types of devices whose kernels are loaded, and steps captured, before a run begins


@dataclass(frozen=True)
class RunSpec:
    """One run: videos that are made together, the order of work, and what is kept of them.

    Attributes:
        requests: one per video; they differ in prompt, noise and seed only.
        schedule: the order of work.
        scheduler: diffusers' sampler object.
        timeline: the file of the trace; None: no trace.
        checkpoint: the place of snapshots; None: none are kept.
        resumed: the snapshot that the run goes on from; None: it begins.
        report: called with (phase, stage=, block=, step=) before every action, see ``Engine.from_pretrained``.
    """

    requests: Sequence[Request]
    schedule: Schedule
    scheduler: Any
    timeline: Path | None = None
    checkpoint: Checkpoint | None = None
    resumed: Resumed | None = None
    report: Callable[..., None] | None = None


class Builder:
    """Builds the parts of a run on this rank.

    Args:
        setup: the engine's model, options and place.
        parts: the loaded parts of the model, and the edges' communicators.
        spec: the run.
        prompts: of every video, on the rank that leads; empty elsewhere.
        images: the same of what the model is told of images, where there are any.
        clips: the same of what it goes on from.
        pools: the noise [1, C, f, h, w] of every clip; none where there is none.
    """

    def __init__(
        self,
        setup: Setup,
        parts: Parts,
        spec: RunSpec,
        prompts: Sequence[Prompts],
        images: Sequence[ImageCondition | None],
        clips: Sequence[Clip | None],
        pools: Sequence[torch.Tensor] = (),
    ) -> None:
        self.setup, self.parts, self.spec, self.prompts = setup, parts, spec, prompts
        self.images, self.clips, self.pools = images, clips, pools
        self.request = spec.requests[0]  # where it is asked, all requests say the same
        self.schedule, self.layout = spec.schedule, self.request.layout

    def checkpointer(self, decoder: Delivery) -> Checkpointer | None:
        """The keeper of snapshots, which writes the first one of a run that begins. None: none are kept.

        Raises OSError.
        """
        setup, spec, checkpoint = self.setup, self.spec, self.spec.checkpoint
        if checkpoint is None:
            return None
        if spec.resumed is not None:
            run = {**spec.resumed.snapshot.run, **maker(setup)}
        else:
            latents = [request.latents for request in spec.requests if request.latents is not None]
            noise = given.write_noise(checkpoint.folder, torch.cat(latents)) if latents else None
            told = [condition for condition in self.images if condition is not None]
            images = given.write_images(checkpoint.folder, told) if told else None
            known = [clip.latents for clip in self.clips if clip is not None]
            clips = given.write_clips(checkpoint.folder, known, self.pools) if known else None
            files = {"noise": noise, "images": images, "clips": clips}
            run = snapshot_info(setup, spec.scheduler, spec.requests, files, checkpoint.notes)
        found = Checkpointer(
            checkpoint,
            run,
            self.schedule,
            self.layout,
            decoder.history,
            lambda: [prompts.state() for prompts in self.prompts],
            setup.mesh.device,
            "" if spec.resumed is None else spec.resumed.name,
            self.request.video.skipped_blocks,
        )
        if spec.resumed is None:
            found.begin()
        return found

    def executors(
        self,
        clocks: Sequence[BusyClock],
        decoder: Delivery | None,
        keeper: Checkpointer | None,
        decoding: Callable[[], float] | None,
    ) -> list[StageExecutor]:
        """The executors of this rank's stages, one for each.

        Args:
            clocks: theirs.
            decoder: on the rank that leads; None elsewhere.
            keeper: on the rank that leads, if snapshots are kept; None elsewhere.
            decoding: () -> seconds that decoding has taken beside the stage so far; None: nothing is decoded here.
        """
        setup = self.setup
        inbound, outbound = self._edges() if setup.num_stages > 1 and clocks else ({}, {})
        channel = self._prompt_channel()
        experts = self._expert_of_step()
        found = []
        for index, clock in zip(setup.mesh.stages, clocks, strict=True):
            stage, team = self._stage(index, self._stage_spec(index, experts))
            leading = self._first_stage(experts, decoder, keeper) if index == 0 and decoder is not None else None
            links = Links(channel, inbound.get(index), outbound.get(index), team if index == 0 else None)
            report = self._reporter(index, clock, decoding if index == setup.mesh.stages.start else None)
            found.append(StageExecutor(self.schedule, self.layout, index, stage, links, clock, leading, report))
        return found

    def _stage(self, index: int, spec: StageSpec) -> tuple[Stage | ThreadedStage, Team | None]:
        """The layers of a stage here, and its ranks if they are several. In one process its places are threads."""
        mesh, slices, wrap = self.setup.mesh, self.parts.slices[index], _graphed if self.setup.config.graphs else None
        if mesh.places == 1:
            return Stage(slices, spec, wrap=wrap), None
        if mesh.distributed:
            team = Team(self.parts.team_groups[index], mesh.team, mesh.place, index)
            return Stage(slices, spec, share=self._share(team.exchange)), team
        exchanges = local_rows(mesh.places, f"stage {index}, place")
        return ThreadedStage([Stage(slices, spec, share=self._share(each)) for each in exchanges], exchanges), None

    def _share(self, exchange: ShareExchange) -> Share:
        spec, form = self.setup.source.spec, self.setup.config.sequence_parallel_form
        return Share(exchange, spec.heads, spec.inner_dim // spec.heads, form == "pipelined")

    def warm_up(self, executors: Sequence[StageExecutor], decoder: Delivery | None) -> None:
        """Does once all that these will do, so that nothing is loaded or captured in the middle of a run."""
        device, grid = self.setup.mesh.device, self.request.grid
        if device.type not in _WARMED:
            return
        embeds = torch.zeros(self._prompt_shape(), dtype=self.setup.dtype)
        for executor in executors:
            warm_up(executor, embeds, self.setup.config.graphs, self.parts.warmed)
        name = "decoder", grid, self.request.video.output_type
        if decoder is not None and name not in self.parts.warmed:  # the first latent frame of a video, and another one
            self.parts.warmed.add(name)
            channels = self.setup.source.spec.in_channels
            decoder.warm_up(torch.zeros(1, channels, 2, grid.height, grid.width, device=device))

    def _expert_of_step(self) -> list[int]:
        """The index of the transformer that runs each step of the sampler (Wan2.2 has two)."""
        sampler = self.request.sampler
        return [self.setup.source.spec.expert(float(t), sampler.num_train_timesteps) for t in sampler.timesteps]

    def _stage_spec(self, index: int, experts: Sequence[int]) -> StageSpec:
        setup, schedule, blocks, grid = self.setup, self.schedule, self.setup.config.blocks, self.request.grid
        model = setup.source.spec
        lent, runs = blocks.context_frames * grid.tokens, list(self.request.steps.runs)
        if schedule.is_anchored:
            runs.append(runs[-1])  # of a finished block
        slots = {side: schedule.slots(side) for side in ("head", "tail", "anchor")}
        if setup.config.attention_8bit.on:
            slots["mean"] = schedule.places
        return StageSpec(
            layers=setup.layers[index],
            num_layers=model.num_layers,
            grid=grid,
            expert_of_step=[experts[step] for step in runs],
            timesteps=self.request.sampler.timesteps[runs],
            slots=slots,
            branches=schedule.branches,
            max_tokens=self.layout.max_window_frames * grid.tokens,
            lent={"head": lent, "tail": lent, "anchor": blocks.anchor_frames * grid.tokens},
            # Who lends is a whole block; the head lies behind what is fed in front of it.
            starts={
                "head": self.layout.fed_context(1) * grid.tokens,
                "tail": blocks.frames_per_block * grid.tokens - lent,
                "anchor": 0,
            },
            eight_bit=setup.config.attention_8bit,
            features_8bit=setup.config.features_8bit,
            refreshes=schedule.refresh_every is not None,
            patch=math.prod(model.patch_size) * (model.in_channels + model.condition_channels),
            velocity_patch=math.prod(model.patch_size) * model.in_channels,
            windows=schedule.windows,
            unequal_times=model.unequal_times,
            fixed_frames=self.request.fixed_frames,
            anchor_weight=blocks.anchor_weight,
        )

    def _first_stage(self, experts: Sequence[int], decoder: Delivery, keeper: Checkpointer | None) -> FirstStage:
        queues = [self._queue(video, experts) for video in range(len(self.spec.requests))]

        def emit(video: int, block: int, latents: torch.Tensor) -> None:
            if not self.schedule.is_anchored:  # block 0 may run again, in a resumed run
                self.prompts[video].forget(block + 1)
            if keeper is not None:
                keeper.emit(video, block, latents[:, :, : self.layout.kept_frames(block)])
            decoder.emit(video, block, latents)

        def on_snapshot_point(iteration: int) -> None:
            assert keeper is not None
            keeper.on_snapshot_point(iteration, lambda: [queue.state() for queue in queues])

        return FirstStage(
            queues,
            emit,
            decoder.decode,
            None if keeper is None else on_snapshot_point,
            self.setup.config.allow_nonfinite,
        )

    def _queue(self, index: int, experts: Sequence[int]) -> LatentQueue:
        """The queue of the blocks of video ``index``."""
        request, prompts, count = self.spec.requests[index], self.prompts[index], self.schedule.num_videos
        video, grid = request.video, request.grid
        second = video.guidance_scale if video.guidance_scale_2 is None else video.guidance_scale_2
        scales = (video.guidance_scale, second)
        shape = (self.setup.source.spec.in_channels, grid.height, grid.width)
        condition, clip = self.images[index], self.clips[index]
        if condition is not None:
            condition = condition.on(self.setup.mesh.device)
        pool = self.pools[index] if self.pools else None
        noise = BlockNoise(request.layout, shape, video.seed, request.latents, pool)
        return LatentQueue(
            self.schedule,
            request.layout,
            request.sampler,
            noise,
            lambda block: prompts.of(block) * count + index,  # ids of all videos' prompts are different
            lambda prompt: _with_images(prompts.embeds(prompt // count), condition),
            request.steps,
            [scales[e] for e in experts],
            self.setup.mesh.device,
            _step_callback(request, index),
            None if request.fixed_frames else condition,
            condition.first if condition is not None and request.fixed_frames else None,
            None if clip is None else KnownBlock(clip.own, noise(0), request.sampler.levels),
        )

    def _prompt_shape(self) -> tuple[int, int, int]:
        """The shape of a prompt's embeddings; ranks that do not lead have not seen any."""
        request = self.request
        tokens = request.video.max_sequence_length if request.embeds is None else request.embeds.shape[1]
        model = self.setup.source.spec
        return self.schedule.branches, model.image_tokens + tokens, model.text_dim

    def _prompt_channel(self) -> PromptChannel:
        mesh = self.setup.mesh
        return PromptChannel(
            self._prompt_shape(),
            self.setup.dtype,
            mesh.rank,
            mesh.stage_ranks if mesh.distributed else 1,
            local_readers=self.setup.num_stages - 1,
        )

    def _edges(self) -> tuple[dict[int, Inbound], dict[int, Outbound]]:
        """Both ends of the edges of the stages here, by stage. Edge k leads from stage k to k + 1, the last to 0."""
        setup, mesh, n = self.setup, self.setup.mesh, self.setup.num_stages
        lengths = [self._lengths(velocity=k == n - 1) for k in range(n)]
        where = f", place {mesh.place}" if mesh.distributed and mesh.places > 1 else ""
        names = [f"edge {k} -> {(k + 1) % n}{where}" for k in range(n)]
        depth, dtype = setup.config.depth, setup.dtype
        if not mesh.distributed:
            local = [LocalEdge(names[k], lengths[k], depth, dtype, mesh.device) for k in range(n)]
            return {k: local[k - 1] for k in range(n)}, dict(enumerate(local))
        groups, rank, before, after = self.parts.edge_groups, mesh.rank, mesh.before, mesh.after
        common = depth, self.schedule.num_units, dtype, mesh.device
        (stage,), back = mesh.stages, before // mesh.places
        inbound = ReceiveEdge(names[back], before, groups[before], lengths[back], *common)
        return {stage: inbound}, {stage: SendEdge(names[stage], after, groups[rank], lengths[stage], *common)}

    def _lengths(self, velocity: bool) -> Lengths:
        """The lengths of messages between stages, or of velocities to stage 0: those of a unit's window or own frames,
        of a place's tokens where ranks share a stage, and a mark (``nonfinite``)."""
        setup, mesh, tokens = self.setup, self.setup.mesh, self.request.grid.tokens
        model = setup.source.spec
        width = math.prod(model.patch_size) * model.in_channels if velocity else model.inner_dim

        @cache
        def length(block: int, refresh: bool) -> int:
            frames, fed = len(self.layout.window(block, refresh)), self.layout.fed_context(block, refresh)
            if not mesh.distributed or mesh.places == 1:
                return (frames - fed if velocity else frames) * tokens * width + 1
            cut = Cut(token_ranges(frames, tokens, mesh.places), fed * tokens)
            return len(cut.own(mesh.place) if velocity else cut.rows[mesh.place]) * width + 1

        refreshes = [False] if self.schedule.refresh_every is None else [False, True]
        blocks = range(1 if self.layout.num_blocks == 1 else 2)
        most = max(length(block, refresh) for block in blocks for refresh in refreshes)
        return Lengths(most, lambda unit: length(min(unit.block, 1), self.schedule.refreshes(unit)))

    def _reporter(self, index: int, clock: BusyClock, decoding: Callable[[], float] | None) -> Report | None:
        """The function that tells the caller's ``report`` of the actions of stage ``index``; None: nobody listens."""
        report, schedule, layers = self.spec.report, self.schedule, len(self.setup.layers[index])
        mesh = self.setup.mesh
        where = mesh.role if mesh.distributed else {"stage": index}
        if report is None:
            return None
        iteration, units, actions = -1, 0, 0

        def tell(phase: str, unit: Unit) -> None:
            nonlocal iteration, units, actions
            more: dict[str, Any] = {"action": actions}
            actions += 1
            if phase == "run" and (now := schedule.iteration(unit)) > iteration:
                iteration = now
                more |= {"iteration": iteration, "busy": clock.seconds / layers}
                if decoding is not None:
                    more["decoding"] = decoding() / layers
            if phase == "run" and mesh.is_leader and index == 0:
                more |= {"units": units, "total_units": schedule.num_units}
                units += 1
            name = {"recv": "wait_recv", "send": "wait_send"}.get(phase, phase)
            report(name, **where, block=unit.block, step=unit.step, **more)

        return tell


def _with_images(embeds: torch.Tensor, condition: ImageCondition | None) -> torch.Tensor:
    return embeds if condition is None else condition.before(embeds)


def _graphed(forward: Forward) -> Forward:
    return Graphed(forward, cuda_capture([]))


def _step_callback(request: Request, video: int) -> StepCallback | None:
    """The caller's callback in the form in which a queue calls it; None: there is none."""
    user, skipped = request.callback, request.video.skipped_blocks
    if user is None:
        return None

    def callback(block: int, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        result = user(step, timestep, {"latents": latents, "block": block - skipped, "video": video}) or {}
        replaced: torch.Tensor = result.get("latents", latents)
        return replaced

    return callback
