"""What a video costs: arithmetic and bytes of every unit, seconds on a card, gigabytes on a rank. No torch.

Everything follows from the model's config, the request, and how the layers are cut. Seconds are predictions: stated
rates of the cards times assumed shares of them (``devices``). Memory counts what the engine allocates, by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from dualparal.config.blocks import BlockConfig
from dualparal.config.video import VideoConfig
from dualparal.devices import Device, Link
from dualparal.model_shape import ModelShape, tokens_per_frame
from dualparal.schedule.actions import DECODE_BOUND, Unit
from dualparal.schedule.layout import Layout
from dualparal.schedule.replay import Costs
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.simulate import Sizes

# Passes over a unit's hidden states in a layer with fused kernels: docs/gpu.md, "22 passes".
PASSES = 22
# Passes over C frames of keys and values to lend and to borrow them, per neighbour: docs/gpu.md, "features moved".
FEATURE_PASSES = 4
# A sampler step: Python of diffusers' UniPC on the host, ahead of which stage 0 cannot run. Assumption.
UPDATE_SECONDS = 1.5e-3
# UniPC of order 2 keeps two velocities and the last sample beside the latents.
SAMPLER_COPIES = 4


@dataclass(frozen=True)
class Workload:
    """One or several videos and the model that makes them.

    itemsize: bytes of the transformer's dtype. decode: False for latents only. depth: messages between two stages.
    num_videos: independent videos of this kind, made in turns. key_means: whether 8-bit attention keeps a mean of
    every block's keys.
    """

    model: ModelShape
    video: VideoConfig = field(default_factory=VideoConfig)
    blocks: BlockConfig = field(default_factory=BlockConfig)
    itemsize: int = 2
    decode: bool = True
    depth: int = 2
    num_videos: int = 1
    key_means: bool = False

    def __post_init__(self) -> None:
        side = self.model.vae.spatial_factor * self.model.patch
        self.video.check_size(side, side)
        self.video.num_latents(self.model.vae.temporal_factor)

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.blocks, self.video.num_latents(self.model.vae.temporal_factor))

    @cached_property
    def tokens(self) -> int:
        """Per latent frame."""
        return tokens_per_frame(self.model, self.video.height, self.video.width)

    @property
    def text_tokens(self) -> int:
        """Of a prompt; padded to this length."""
        return self.video.max_sequence_length

    @property
    def pixels(self) -> int:
        """Of a latent frame."""
        return self.tokens * self.model.patch**2

    def schedule(self, num_stages: int) -> Schedule:
        """The very schedule that the engine walks."""
        return Schedule.of(
            self.blocks,
            num_stages=num_stages,
            num_steps=self.video.num_inference_steps,
            num_blocks=self.layout.num_blocks,
            guidance=self.video.guidance,
            decode=self.decode,
            depth=self.depth,
            num_videos=self.num_videos,
            key_means=self.key_means,
        )


class Arithmetic(NamedTuple):
    """Of one layer (or a whole stage) for one unit: multiply-adds times two, and bytes of passes over memory."""

    attention: float
    linear: float
    moved: float

    def seconds(self, device: Device) -> float:
        return self.attention / device.attention + self.linear / device.linear + self.moved / device.copy


def layer_arithmetic(work: Workload, queries: int, keys: int, borrowed: int = 0, lent: int = 0) -> Arithmetic:
    """One layer for so many tokens.

    borrowed, lent: tokens of neighbours' keys that are copied in, and of own ones that are copied out.
    """
    h, f = work.model.inner, work.model.ffn_dim
    return Arithmetic(
        4.0 * queries * (keys + work.text_tokens) * h,
        2.0 * queries * h * (6 * h + 2 * f),
        work.itemsize * h * (PASSES * queries + FEATURE_PASSES * borrowed + FEATURE_PASSES / 2 * lent),
    )


def unit_arithmetic(work: Workload, schedule: Schedule, unit: Unit) -> Arithmetic:
    """One layer for one unit."""
    queries = len(work.layout.window(unit.block, schedule.refreshes(unit))) * work.tokens
    lent = work.blocks.context_frames * work.tokens
    reads, writes = len(schedule.reads(unit)), len(schedule.writes(unit))
    return layer_arithmetic(work, queries, queries + reads * lent, reads * lent, writes * lent)


class Costing:
    """Seconds of everything in a schedule, for ``simulate``.

    Args:
        split: layers of every stage. devices: one per stage. links: edge k leads from stage k to the next one, the
            last back to stage 0.
        decode_on: a card of its own for the VAE; None: stage 0's, beside its units.
    """

    def __init__(
        self,
        work: Workload,
        schedule: Schedule,
        split: Sequence[int],
        devices: Sequence[Device],
        links: Sequence[Link],
        decode_on: Device | None = None,
    ) -> None:
        self.work, self.schedule, self.split, self.devices, self.links = work, schedule, split, devices, links
        self.decode_on = decode_on
        self._kinds: dict[Unit, tuple[int, int, int]] = {}
        self._seconds: dict[tuple[int, tuple[int, int, int]], float] = {}

    @property
    def costs(self) -> Costs:
        return Costs(
            run=self.run,
            transfer=self.transfer,
            latency=lambda edge: self.links[edge].latency,
            update=UPDATE_SECONDS,
            decode=self.decode,
            decode_shares=self.decode_on is None,
            send_buffers=self.work.depth,
        )

    def run(self, stage: int, unit: Unit) -> float:
        kind = self._kinds.get(unit)
        if kind is None:  # all that its cost depends on
            frames = len(self.work.layout.window(unit.block, self.schedule.refreshes(unit)))
            kind = frames, len(self.schedule.reads(unit)), len(self.schedule.writes(unit))
            self._kinds[unit] = kind
        seconds = self._seconds.get((stage, kind))
        if seconds is None:
            seconds = self._seconds[stage, kind] = self._run(stage, unit)
        return seconds

    def _run(self, stage: int, unit: Unit) -> float:
        device = self.devices[stage]
        seconds = self.split[stage] * unit_arithmetic(self.work, self.schedule, unit).seconds(device)
        frames = len(self.work.layout.window(unit.block, self.schedule.refreshes(unit)))
        return seconds + self.ends(stage, frames, device)

    def ends(self, stage: int, frames: int, device: Device) -> float:
        """Seconds of what the first stage (embedding) and the last one (head) do besides their layers."""
        model, tokens = self.work.model, frames * self.work.tokens
        first, last = stage == 0, stage == len(self.split) - 1
        flops = 2.0 * tokens * model.inner * model.patch**2 * (first * model.in_channels + last * model.out_channels)
        moved = self.work.itemsize * tokens * model.inner * (2 * first + 3 * last)
        return Arithmetic(0.0, flops, moved).seconds(device)

    def transfer(self, edge: int, unit: Unit) -> float:
        """Buffers travel whole: the largest window's hidden states, or the largest block's velocity."""
        elements = edge_elements(self.work)[edge == len(self.split) - 1]
        return elements * self.work.itemsize / self.links[edge].bandwidth

    def decode(self, block: int) -> float:
        device = self.decode_on or self.devices[0]
        return self.work.layout.kept_frames(block) * self.work.model.vae.flops(self.work.pixels) / device.conv


def edge_elements(work: Workload) -> tuple[int, int]:
    """Of a message between stages, and of one from the last stage to stage 0."""
    hidden = work.layout.max_window_frames * work.tokens * work.model.inner
    return hidden, work.layout.first_frames * work.model.in_channels * work.pixels


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what holds them.

    load: what exists besides the weights while they are read. before: the text encoder, before the weights are
    loaded (rank 0). decode: VAE, its history and working set, and frames on their way out.
    """

    weights: int
    features: int
    workspace: int
    buffers: int  # message rings of both edges
    activations: int  # of a layer at its largest
    conditions: int  # text keys and values, modulations, rotary angles
    latents: int = 0  # with sampler states
    decode: int = 0
    load: int = 0
    before: int = 0

    @property
    def running(self) -> int:
        return (
            self.weights
            + self.features
            + self.workspace
            + self.buffers
            + self.activations
            + self.conditions
            + self.latents
            + self.decode
        )

    @property
    def peak(self) -> int:
        return max(self.running, self.weights + self.load, self.before)


def stage_memory(work: Workload, schedule: Schedule, split: Sequence[int], stage: int, decodes: bool = True) -> Memory:
    """What the engine allocates on the rank of a stage.

    decodes: whether stage 0's card holds the VAE.
    """
    model, size, h, tokens = work.model, work.itemsize, work.model.inner, work.tokens
    layers, first, last = split[stage], stage == 0, stage == len(split) - 1
    branches, steps, experts = schedule.branches, schedule.num_steps, model.experts
    lent = work.blocks.context_frames * tokens
    window = work.layout.max_window_frames * tokens
    slots = {side: schedule.slots(side) for side in ("head", "tail")}
    hidden, velocity = edge_elements(work)
    inbound, outbound = velocity if first else hidden, velocity if last else hidden
    latents = 4 * model.in_channels * work.pixels * work.layout.first_frames
    blocks, videos = schedule.places, work.num_videos
    means = blocks * layers * 4 * h if work.key_means else 0
    noise = videos * 4 * model.in_channels * work.pixels * (work.blocks.frames_per_block + work.blocks.context_frames)
    return Memory(
        weights=experts * slice_bytes(work, split, stage),
        features=(sum(slots.values()) * slot_bytes(work, layers) + means) * branches,
        workspace=2 * (window + sum(map(bool, slots.values())) * lent) * h * size,
        buffers=work.depth * (inbound + outbound) * size if len(split) > 1 else 0,
        # residual stream old and new, y, normed, qkv, query, attended; the feed-forward's inside twice
        activations=window * (9 * h + 2 * model.ffn_dim) * size,
        conditions=(
            videos * experts * branches * layers * 2 * work.text_tokens * h * size
            + 4 * steps * (6 * layers + 2 * last) * h
            + 2 * 4 * window * model.head_dim
            + videos * branches * work.text_tokens * model.text_dim * size
        ),
        latents=(latents * SAMPLER_COPIES * (blocks + videos) + noise) if first else 0,
        decode=decode_bytes(work) if first and decodes and work.decode else 0,
        load=layers * 3 * h * h * size,  # Q, K and V are joined while both forms are there
        before=model.text_encoder * size if first else 0,
    )


def slice_bytes(work: Workload, split: Sequence[int], stage: int) -> int:
    """Weights of a stage, of one transformer."""
    model, size = work.model, work.itemsize
    narrow, wide = model.layer_parameters
    more, more_wide = model.condition_parameters
    total = split[stage] * (narrow * size + wide * 4) + more * size + more_wide * 4
    if stage == 0:
        total += model.embed_parameters * size
    if stage == len(split) - 1:
        total += model.head_parameters[0] * size + model.head_parameters[1] * 4
    return total


def slot_bytes(work: Workload, layers: int) -> int:
    """Features of one neighbour in so many layers, for one branch."""
    return layers * 2 * work.blocks.context_frames * work.tokens * work.model.inner * work.itemsize


def decode_bytes(work: Workload) -> int:
    """VAE in float32, its history of each video, its working set, and frames of the blocks in its hands."""
    vae, pixels = work.model.vae, work.pixels
    frames = work.layout.first_frames * vae.temporal_factor
    picture = 3 * 4 * frames * pixels * vae.spatial_factor**2
    history = work.num_videos * vae.cache_bytes(pixels)
    return 4 * vae.parameters + history + vae.working_bytes(pixels) + DECODE_BOUND * picture


def sizes(work: Workload, split: Sequence[int], stage: int, memory: Memory) -> Sizes:
    """The same for ``Simulation.memory``: what is there all the time, and what comes and goes."""
    slot = slot_bytes(work, split[stage])
    latents = SAMPLER_COPIES * 4 * work.model.in_channels * work.pixels * work.blocks.frames_per_block
    fixed = memory.running - memory.features - memory.latents - memory.decode
    return Sizes(fixed, {"head": slot, "tail": slot}, latents if stage == 0 else 0, memory.decode)


def balance(costs: Sequence[float], extra: Sequence[float], most: Sequence[int], num_layers: int) -> list[int] | None:
    """Layers per stage so that the slowest stage is as fast as can be; every stage has one at least.

    costs: seconds of a layer on each stage. extra: what a stage does besides. most: layers that fit.
    Returns None when they do not fit. Giving every layer to the stage that then ends first is best, because all
    layers cost the same.
    """
    if num_layers < len(costs) or sum(most) < num_layers or min(most) < 1:
        return None
    split = [1] * len(costs)
    for _ in range(num_layers - len(costs)):
        open_ = [k for k in range(len(costs)) if split[k] < most[k]]
        best = min(open_, key=lambda k: ((split[k] + 1) * costs[k] + extra[k], k))
        split[best] += 1
    return split


def closed_form(
    schedule: Schedule, stages: Sequence[float], hop: float, decode: float = 0.0, decode_shares: bool = True
) -> tuple[float, float]:
    """(seconds, seconds to the first frame) without a replay, for units that all cost the same.

    An iteration takes the slowest stage's time for all of its units, or a whole round of the pipe when there are too
    few of them: a block's next step needs its last one, and with ``paper`` that of the block before, which comes
    later in an iteration. From the T-th on blocks are decoded, in what stage 0 has to
    spare (``decode_shares``) or beside it, and when ``DECODE_BOUND`` of them wait, everything waits.

    Args:
        stages: seconds of a unit. hop: of all edges together. decode: of a block.
    """
    slowest, around = max(stages), sum(stages) + hop
    least = around + (schedule.branches * schedule.policy.blocks_awaited - 1) * slowest
    now = backlog = first = 0.0
    for iteration, count in enumerate(_in_flight_counts(schedule)):
        units = count * schedule.branches
        duration = max(units * slowest, least)
        backlog = max(0.0, backlog - (duration - units * stages[0] if decode_shares else duration))
        now += duration
        if iteration >= schedule.num_steps - 1 and (iteration - schedule.num_steps + 1) % schedule.gap == 0:
            first = first or now + decode
            backlog += decode
            wait = max(0.0, backlog - DECODE_BOUND * decode)
            now, backlog = now + wait, backlog - wait
    return now + backlog, first


def _in_flight_counts(schedule: Schedule) -> list[int]:
    counts = []
    iteration = 0
    while blocks := schedule.in_flight(iteration):
        counts.append(len(blocks))
        iteration += 1
    return counts
