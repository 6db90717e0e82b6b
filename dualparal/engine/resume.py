"""The way from a snapshot to a run: the requests that it describes, and the state that it restores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dualparal.checkpoint import given, snapshot
from dualparal.checkpoint.checkpointer import blocks_to_restore, check_fits
from dualparal.checkpoint.snapshot import Snapshot, SnapshotError
from dualparal.config.video import VideoConfig
from dualparal.decoding.delivery import Delivery
from dualparal.decoding.parts import PartDecoder
from dualparal.engine.identity import check_same_run
from dualparal.engine.images import kept_images
from dualparal.engine.inputs import VideoInputs
from dualparal.engine.parts import Parts
from dualparal.engine.request import Request, UserCallback, check_request, schedule_of
from dualparal.engine.setup import Setup
from dualparal.runtime.latents import LatentQueue
from dualparal.sampling.continued import Clip
from dualparal.schedule.layout import Layout
from dualparal.schedule.schedule import Schedule


def requests_of(
    setup: Setup, scheduler: Any, found: Snapshot, folder: Path, callback: UserCallback | None
) -> list[Request]:
    """The request of every video in a snapshot; none where all blocks are finished.

    Args:
        setup: the engine's.
        scheduler: diffusers' sampler object.
        found: the snapshot.
        folder: its folder, where initial noise may lie too.
        callback: called after every step, see ``Request``.

    Raises:
        SnapshotError: it is of another run, or does not describe one that this engine could make; or the latents
            beside it are damaged or another run's.
    """
    try:
        check_same_run(setup, scheduler, found)
        if found.end:
            return []
        requests = _read_requests(setup, scheduler, found, folder, callback)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise SnapshotError(f"iteration {found.iteration} of {folder} does not describe a run ({error!r})") from None
    if len({replace(request.video, seed=0) for request in requests}) != 1:
        raise SnapshotError("a snapshot of videos that are not alike")
    grid, spec = requests[0].grid, setup.source.spec
    shape = spec.in_channels, grid.height, grid.width
    schedule = schedule_of(setup, requests, found.iteration)
    check_fits(found, schedule, requests[0].layout, requests[0].sampler, requests[0].steps, shape, spec.text_dim)
    if setup.mesh.is_leader:
        snapshot.check_blocks(found, folder, schedule.first_block)
    return requests


def _read_requests(
    setup: Setup, scheduler: Any, found: Snapshot, folder: Path, callback: UserCallback | None
) -> list[Request]:
    """The requests as the snapshot describes them; embeddings take the place of texts."""
    noise = found.run["noise"]
    latents = None if noise is None else given.read_noise(folder, noise)
    clips = _read_clips(found, folder)
    requests = []
    for number, (fields, prompts) in enumerate(zip(found.run["videos"], found.prompts, strict=True)):
        video, rows, clip = VideoConfig(**fields), prompts[min(prompts)], clips[number]
        inputs = VideoInputs(
            latents=None if latents is None else latents[number : number + 1],
            prompt_embeds=rows[:1],
            negative_prompt_embeds=rows[1:] if len(rows) > 1 else None,
            clip=None if clip is None else clip[0],
            seed=video.seed,
        )
        request = check_request(setup, scheduler, video, inputs, callback, encoded=True)
        if clip is not None:
            request = replace(request, pool=_fitting_pool(clip, request, folder))
        requests.append(request)
    images = found.run.get("images")
    model = setup.source.spec
    if (0 not in model.image_counts) if images is None else max(model.image_counts) == 0:
        raise SnapshotError(f"{folder}: what came of the video's images is missing, or none was taken")
    kept_frames = int(images is not None and model.keeps_first_frame)
    requests = [replace(request, fixed_frames=kept_frames) for request in requests]
    if images is None or not setup.mesh.is_leader:
        return requests
    kept = kept_images(setup, requests, folder, images)
    return [replace(request, condition=condition) for request, condition in zip(requests, kept, strict=True)]


def _fitting_pool(clip: tuple[torch.Tensor, torch.Tensor], request: Request, folder: Path) -> torch.Tensor:
    """The noise of a clip, as the request takes it. Raises SnapshotError."""
    latents, noise = clip
    if noise.shape != latents[:, :, -request.inverted_frames :].shape or noise.dtype != torch.float32:
        raise SnapshotError(f"{folder}: the noise of the clip is {noise.dtype} {list(noise.shape)}")
    return noise


def _read_clips(found: Snapshot, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """The ends of the clips that a run's videos go on from, and their noise; None where they begin.

    Raises SnapshotError.
    """
    name, count = found.run.get("clips"), len(found.run["videos"])
    if (name is None) == VideoConfig(**found.run["videos"][0]).continues:
        raise SnapshotError(f"{folder}: the end of the clip that the video goes on from is missing, or none was taken")
    return [None] * count if name is None else [*given.read_clips(folder, name, count)]


def check_restartable(setup: Setup, requests: Sequence[Request]) -> None:
    """Checks that there are iterations at which a snapshot can be taken. Raises ValueError when there is none."""
    blocks, schedule = setup.config.blocks, schedule_of(setup, requests)
    least = schedule.num_steps if schedule.is_anchored else 1
    if not any(map(schedule.is_restartable, range(least, least + max(1, blocks.refresh_every or 1)))):
        raise ValueError(
            f"checkpoint with context={blocks.context!r}"
            + (", attention_8bit" if setup.config.attention_8bit.on else "")
            + " and no refresh_every: what blocks in flight left behind is too large to keep; give the engine "
            "refresh_every, such as half the steps, or use context='paper' without 8-bit attention"
        )


def restore(
    queues: Sequence[LatentQueue],
    decoder: Delivery,
    folder: Path,
    found: Snapshot,
    schedule: Schedule,
    clips: Sequence[Clip | None],
) -> None:
    """Puts latents and samplers as they are in the snapshot, and the decoders as far as they see back.

    Args:
        queues: one for each video, empty.
        folder: the snapshot's, where the final latents of finished blocks lie too.
        schedule: the resumed run's.
        clips: those that the videos go on from.

    Raises:
        SnapshotError: final latents of a block that is needed are missing or damaged.
    """
    first = schedule.first_block
    before: list[list[torch.Tensor]] = []
    for video, (queue, blocks, clip) in enumerate(zip(queues, found.blocks, clips, strict=True)):
        seen = blocks_to_restore(queue.layout, first, decoder.history)
        before.append(snapshot.read_blocks(folder, found.id, video, seen))
        finished = dict(zip(seen, before[-1], strict=True))
        if schedule.is_anchored and first > 0 and 0 not in finished:
            (finished[0],) = snapshot.read_blocks(folder, found.id, video, range(1))
        queue.restore(blocks, {block: finished[block] for block in {0, first - 1} & set(finished)})
        if clip is not None and seen.start == 0:
            before[-1].insert(0, clip.before)
    decoder.resume(first, before)


def decode_again(
    setup: Setup, parts: Parts, found: Snapshot, folder: Path, video: int, blocks: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """Decodes finished blocks again, from their latents, with the bits that they had.

    Args:
        setup, parts: the engine's.
        found: the last snapshot in ``folder``, where all latents lie.
        video: index of the video.
        blocks: in their order, counted as they were given out.

    Yields:
        A block and its frames, as the run's ``output_type`` has them.

    Raises:
        SnapshotError: latents that are needed are missing or damaged.
    """
    asked = VideoConfig(**found.run["videos"][video])
    layout, skipped = Layout.of(setup.config.blocks, asked, setup.source.spec.temporal_factor), asked.skipped_blocks
    clip = _read_clips(found, folder)[video]
    decoder, device = parts.decoders(1)[0], setup.mesh.device
    part = PartDecoder([decoder], asked.output_type, device, allow_nonfinite=setup.config.allow_nonfinite)
    last = -1
    for block in (given_out + skipped for given_out in blocks):
        if last < 0 or block != last + 1:
            decoder.reset()
            before = blocks_to_restore(layout, block, part.history) if block else range(0)
            if clip is not None and before.start == 0:
                part.push(None, 0, Clip.of(clip[0], layout.frames(0)).before.to(device))
            for seen in before:
                part.push(None, 0, snapshot.read_blocks(folder, found.id, video, range(seen, seen + 1))[0].to(device))
        (latents,) = snapshot.read_blocks(folder, found.id, video, range(block, block + 1))
        yield block - skipped, part.decode(None, 0, block, latents.to(device))
        last = block
