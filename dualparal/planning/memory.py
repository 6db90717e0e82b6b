"""Bytes on every rank, by what holds them, as the engine allocates them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dualparal.planning.workload import Workload
from dualparal.schedule.actions import DECODE_BOUND
from dualparal.schedule.layout import TOKEN_TILE
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.simulate import Sizes

# Rows of 8-bit keys that share a scale, and from a multiple of which they are kept (kernels.attention_8bit.TILE).
KEY_TILE = 128
_ALIGNMENT = 16  # bytes: of what lies in a slot that can hold either format

# UniPC of order 2 keeps two velocities and the last sample beside the latents.
SAMPLER_COPIES = 4


def edge_elements(work: Workload) -> tuple[int, int]:
    """Elements of the largest message between stages, and of that from the last stage to stage 0; of one card of each,
    where cards share a stage."""
    hidden = work.place_tokens(work.layout.max_window_frames * work.tokens) * work.model.inner
    return hidden, -(-work.layout.first_frames * work.model.in_channels * work.pixels // work.places)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what holds them.

    Attributes:
        weights: the stage's layers of every transformer.
        features: of neighbours, in all slots.
        decode: VAE, history and working set of the rows that are decoded here, and frames on their way out.
        load: bytes besides the weights while they are read.
        before: text encoder or what encodes images, before the weights are loaded (rank 0); the text encoder may go to
            the CPU instead.
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


def place_memory(work: Workload, schedule: Schedule, split: Sequence[int], place: int, leads: bool = True) -> Memory:
    """Bytes that the engine allocates on the rank of a stage or, from their number on, of a place that only decodes.

    Args:
        work: the video and the model.
        schedule: the order of work.
        split: layers of every stage.
        place: number of the place.
        leads: of the ranks of a stage, the first.
    """
    if place < schedule.num_stages:
        return stage_memory(work, schedule, split, place, leads)
    if place not in schedule.decoders:  # latents are the result
        return Memory(0, 0, 0, 0, 0, 0, 0, 0)
    waiting = DECODE_BOUND * 4 * work.model.in_channels * work.pixels * work.layout.first_frames
    return Memory(0, 0, 0, 0, 0, 0, latents=waiting, decode=decode_bytes(work, len(schedule.decoders)))


def stage_memory(work: Workload, schedule: Schedule, split: Sequence[int], stage: int, leads: bool = True) -> Memory:
    """Bytes that the engine allocates on the rank of a stage; where ranks share it, with the most tokens and heads.

    Args:
        work: the video and the model.
        schedule: the order of work, which says whether the stage's place decodes.
        split: layers of every stage.
        stage: number of the stage.
        leads: of the ranks of a stage, the first, which alone has latents and decodes.
    """
    model, size, h, tokens = work.model, work.itemsize, work.model.inner, work.tokens
    layers, first, last = split[stage], stage == 0, stage == len(split) - 1
    in_8bit, linears = _layers_8bit(work, split, stage), model.linears
    branches, steps, experts = schedule.branches, schedule.num_steps, model.experts
    lent = work.blocks.context_frames * tokens
    window = work.layout.max_window_frames * tokens
    rows, heads = work.place_tokens(window), work.head_share
    slots = {side: schedule.slots(side) for side in ("head", "tail")}
    hidden, velocity = edge_elements(work)
    inbound, outbound = velocity if first else hidden, velocity if last else hidden
    latents = 4 * model.in_channels * work.pixels * work.layout.first_frames
    blocks, videos = schedule.places, work.num_videos
    owned = range(sum(split[:stage]), sum(split[: stage + 1]))
    means = blocks * sum(map(work.engine.attention_8bit.covers, owned)) * 4 * h
    lends = sum(count * slot_bytes(work, owned, side) for side, count in slots.items())
    leading, decodes = first and leads, leads and stage in schedule.decoders
    noise = videos * 4 * model.in_channels * work.pixels * (work.blocks.frames_per_block + work.blocks.context_frames)
    return Memory(
        weights=experts * slice_bytes(work, split, stage),
        features=int((lends * heads + means) * branches),
        workspace=int(2 * (window + sum(map(bool, slots.values())) * lent) * heads * h * size)
        + _exchange_bytes(work, window),
        buffers=work.engine.depth * (inbound + outbound) * size if len(split) > 1 else 0,
        activations=rows * (model.layer_activations * size + (linears.widest if in_8bit else 0)),
        conditions=(
            videos * experts * branches * layers * 2 * work.condition_tokens * h * size
            + 4 * steps * (6 * layers + 2 * last) * h
            + (schedule.windows * rows + window) * 4 * model.head_dim  # and one being made
            + videos * branches * work.condition_tokens * model.text_dim * size
        ),
        latents=(latents * (SAMPLER_COPIES * (blocks + videos) + work.steps.kept * blocks) + noise + _told(work))
        if leading
        else 0,
        decode=(decode_bytes(work, len(schedule.decoders)) if decodes else 0)
        + (_joined_bytes(work, schedule) if leading else 0),
        # A matrix to be quantised is there in float32 at the worst.
        load=((layers - in_8bit) * size + in_8bit) * model.joined_parameters
        + (4 * linears.widest * h if in_8bit else 0),
        before=max(0 if work.engine.encodes_elsewhere else model.text_encoder * size, _images_before(work))
        if leading
        else 0,
    )


def _told(work: Workload) -> int:
    """Bytes of what the model is told of images, of each video."""
    return work.num_videos * 4 * work.model.condition_channels * work.pixels * work.encoded_latents


def _images_before(work: Workload) -> int:
    """Bytes while images are encoded, one model after the other: the VAE, and CLIP in float32."""
    if not work.encoded_latents:
        return 0
    vae, size = work.model.vae, work.decode_itemsize
    return max(size * vae.parameters + vae.encode_bytes(work.pixels, size), 4 * work.model.image_encoder)


def _exchange_bytes(work: Workload, window: int) -> int:
    """Bytes with which a card of a stage gives its keys and values to others and takes theirs (``runtime.shares``):
    own ones of all heads, queries, keys and values packed, and as they come, whole queries, and the result."""
    if work.places == 1:
        return 0
    rows, columns = work.place_tokens(window), work.head_share * work.model.inner
    own = 2 * min(window, -(-window // work.places) + 2 * TOKEN_TILE) + 3 * rows + 2 * rows
    return int((own * work.model.inner + (3 + 2) * window * columns) * work.itemsize)


def slice_bytes(work: Workload, split: Sequence[int], stage: int) -> int:
    """Bytes of the weights of a stage, for one transformer."""
    model, size = work.model, work.itemsize
    narrow, wide = model.layer_parameters
    more, more_wide = model.condition_parameters
    total = split[stage] * (narrow * size + wide * 4)
    total -= _layers_8bit(work, split, stage) * (model.linears.parameters * (size - 1) - 4 * model.linears.channels)
    total += more * size + more_wide * 4
    if stage == 0:
        total += model.embed_parameters * size
    if stage == len(split) - 1:
        total += model.head_parameters[0] * size + model.head_parameters[1] * 4
    return total


def _layers_8bit(work: Workload, split: Sequence[int], stage: int) -> int:
    """Layers of a stage whose linears have 8 bits."""
    start = sum(split[:stage])
    return sum(map(work.engine.linear_8bit.covers, range(start, start + split[stage])))


def slot_bytes(work: Workload, layers: range, side: str) -> int:
    """Bytes of the features of one neighbour in ``layers``, for one branch.

    Args:
        work: the video and the model.
        layers: indices of the model's layers.
        side: "head" or "tail": rows in 8 bits begin with a whole tile, so it matters where they lie.
    """
    if work.blocks.context_frames == 0:
        return 0
    plain, eight, policy = _plain_slot(work), _slot_8bit(work, side), work.engine.attention_8bit
    steps = len(work.steps.runs)
    always = all(policy.at(step, steps) for step in range(steps)) and work.blocks.refresh_every is None
    total = 0
    for layer in layers:
        if not policy.covers(layer):
            total += sum(plain)
        elif always:
            total += sum(eight)
        else:  # room for the larger of each pair of tensors
            total += sum(_aligned(max(pair)) for pair in zip_longest(plain, eight, fillvalue=0))
    return total


def _plain_slot(work: Workload) -> list[int]:
    """Bytes of the tensors of a slot in one layer, as attention in 16 bits keeps it."""
    lent, h = work.blocks.context_frames * work.tokens, work.model.inner
    if work.engine.features_8bit:
        return [lent * h, lent * h, 4 * lent, 4 * lent]
    return [lent * h * work.itemsize] * 2


def _slot_8bit(work: Workload, side: str) -> list[int]:
    """The same as attention in 8 bits keeps it: keys, values, scales of both, and the mean."""
    lent, h = work.blocks.context_frames * work.tokens, work.model.inner
    start = work.layout.fed_context(1) * work.tokens
    if side == "tail":
        start = work.blocks.frames_per_block * work.tokens - lent
    rows = start % KEY_TILE + lent
    tiles = -(-rows // KEY_TILE)
    scales = 4 * tiles * (h // work.model.head_dim)
    if work.engine.attention_8bit.mode == "fp8":
        return [rows * h, tiles * KEY_TILE * h, scales, scales, 4 * h]
    return [rows * h, rows * h * work.itemsize, scales, 4 * h]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _joined_bytes(work: Workload, schedule: Schedule) -> int:
    """Bytes of whole frames on the card of stage 0 that come from parts of the rows: "pt" ones, in float32."""
    if (len(schedule.decoders) < 2 and not schedule.decode_ranks) or work.video.output_type != "pt":
        return 0
    frames = work.layout.first_frames * work.decoder.temporal_factor
    return (DECODE_BOUND + 1) * 3 * 4 * frames * work.pixels * work.decoder.spatial_factor**2


def decode_bytes(work: Workload, parts: int = 1) -> int:
    """Bytes of decoding on each place that decodes.

    Counted: the VAE, its history of each video, its working set, and frames of the blocks in its hands, which are
    float32 on their way out; all but the VAE of the place's rows only.

    Args:
        work: the video and the model.
        parts: into which the rows are cut.
    """
    vae, size = work.decoder, work.decode_itemsize
    pixels = work.pixels // work.rows * work.part_rows(parts)
    frames = work.layout.first_frames * vae.temporal_factor
    picture = 3 * 4 * frames * pixels * vae.spatial_factor**2
    history = work.num_videos * vae.cache_bytes(pixels, size)
    return size * vae.parameters + history + vae.working_bytes(pixels, size) + DECODE_BOUND * picture


def sizes(work: Workload, split: Sequence[int], stage: int, memory: Memory) -> Sizes:
    """Bytes on a stage's rank for ``Simulation.memory``: those held all the time, and those that come and go."""
    layers = range(sum(split[:stage]), sum(split[: stage + 1]))
    slots = {side: int(slot_bytes(work, layers, side) * work.head_share) for side in ("head", "tail")}
    copies = SAMPLER_COPIES + work.steps.kept
    latents = copies * 4 * work.model.in_channels * work.pixels * work.blocks.frames_per_block
    fixed = memory.running - memory.features - memory.latents - memory.decode
    return Sizes(fixed, slots, latents if stage == 0 else 0, memory.decode)
