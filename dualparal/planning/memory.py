"""Bytes on every rank, by what holds them, as the engine allocates them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualparal.planning.workload import Workload
from dualparal.schedule.actions import DECODE_BOUND
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.simulate import Sizes

# UniPC of order 2 keeps two velocities and the last sample beside the latents.
SAMPLER_COPIES = 4


def edge_elements(work: Workload) -> tuple[int, int]:
    """Elements of a message between stages, and of one from the last stage to stage 0."""
    hidden = work.layout.max_window_frames * work.tokens * work.model.inner
    return hidden, work.layout.first_frames * work.model.in_channels * work.pixels


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what holds them.

    Attributes:
        weights: the stage's layers of every transformer.
        features: of neighbours, in all slots.
        decode: VAE, its history and working set, and frames on their way out.
        load: bytes besides the weights while they are read.
        before: the text encoder, before the weights are loaded (rank 0).
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
        """Bytes held while units run."""
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
        """The most bytes held at any time, loading included."""
        return max(self.running, self.weights + self.load, self.before)


def stage_memory(work: Workload, schedule: Schedule, split: Sequence[int], stage: int, decodes: bool = True) -> Memory:
    """Bytes that the engine allocates on the rank of a stage.

    Args:
        work: the video and the model.
        schedule: the order of work.
        split: layers of every stage.
        stage: number of the stage.
        decodes: stage 0's card holds the VAE.
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
    means = blocks * layers * 4 * h if work.engine.attention_8bit.on else 0
    noise = videos * 4 * model.in_channels * work.pixels * (work.blocks.frames_per_block + work.blocks.context_frames)
    return Memory(
        weights=experts * slice_bytes(work, split, stage),
        features=(sum(slots.values()) * slot_bytes(work, layers) + means) * branches,
        workspace=2 * (window + sum(map(bool, slots.values())) * lent) * h * size,
        buffers=work.engine.depth * (inbound + outbound) * size if len(split) > 1 else 0,
        activations=window * model.layer_activations * size,
        conditions=(
            videos * experts * branches * layers * 2 * work.text_tokens * h * size
            + 4 * steps * (6 * layers + 2 * last) * h
            + (schedule.windows + 1) * 4 * window * model.head_dim  # and one being made
            + videos * branches * work.text_tokens * model.text_dim * size
        ),
        latents=(latents * SAMPLER_COPIES * (blocks + videos) + noise) if first else 0,
        decode=decode_bytes(work) if first and decodes and work.decode else 0,
        load=layers * model.joined_parameters * size,
        before=model.text_encoder * size if first else 0,
    )


def slice_bytes(work: Workload, split: Sequence[int], stage: int) -> int:
    """Bytes of the weights of a stage, for one transformer."""
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
    """Bytes of the features of one neighbour in ``layers`` layers, for one branch."""
    return layers * 2 * work.blocks.context_frames * work.tokens * work.model.inner * work.itemsize


def decode_bytes(work: Workload) -> int:
    """Bytes of decoding.

    Counted: the VAE in float32, its history of each video, its working set, and frames of the blocks in its hands.
    """
    vae, pixels = work.model.vae, work.pixels
    frames = work.layout.first_frames * vae.temporal_factor
    picture = 3 * 4 * frames * pixels * vae.spatial_factor**2
    history = work.num_videos * vae.cache_bytes(pixels)
    return 4 * vae.parameters + history + vae.working_bytes(pixels) + DECODE_BOUND * picture


def sizes(work: Workload, split: Sequence[int], stage: int, memory: Memory) -> Sizes:
    """Bytes on a stage's rank for ``Simulation.memory``: those held all the time, and those that come and go."""
    slot = slot_bytes(work, split[stage])
    latents = SAMPLER_COPIES * 4 * work.model.in_channels * work.pixels * work.blocks.frames_per_block
    fixed = memory.running - memory.features - memory.latents - memory.decode
    return Sizes(fixed, {"head": slot, "tail": slot}, latents if stage == 0 else 0, memory.decode)
