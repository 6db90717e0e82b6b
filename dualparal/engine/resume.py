"""The way from a snapshot to a run: the requests that it describes, and the state that it restores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualparal.checkpoint import snapshot
from dualparal.checkpoint.checkpointer import blocks_to_restore, check_fits
from dualparal.checkpoint.snapshot import Snapshot, SnapshotError
from dualparal.config.video import VideoConfig
from dualparal.decoding.delivery import Delivery
from dualparal.engine.identity import check_same_run
from dualparal.engine.request import Request, UserCallback, VideoInputs, check_request, schedule_of
from dualparal.engine.setup import Setup
from dualparal.runtime.latents import LatentQueue
from dualparal.schedule.schedule import Schedule


def requests_of(
    setup: Setup, scheduler: Any, found: Snapshot, folder: Path, callback: UserCallback | None
) -> list[Request]:
    """The request of every video in a snapshot.

    Args:
        setup: the engine's.
        scheduler: diffusers' sampler object.
        found: the snapshot.
        folder: its folder, where initial noise may lie too.
        callback: called after every step, see ``Request``.

    Raises:
        SnapshotError: it is of another run, or does not describe one that this engine could make.
    """
    try:
        check_same_run(setup, scheduler, found)
        requests = _read_requests(setup, scheduler, found, folder, callback)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise SnapshotError(f"iteration {found.iteration} of {folder} does not describe a run ({error!r})") from None
    if len({replace(request.video, seed=0) for request in requests}) != 1:
        raise SnapshotError("a snapshot of videos that are not alike")
    grid, spec = requests[0].grid, setup.source.spec
    shape = spec.in_channels, grid.height, grid.width
    schedule = schedule_of(setup, requests, found.iteration)
    check_fits(found, schedule, requests[0].layout, requests[0].sampler, requests[0].steps, shape, spec.text_dim)
    return requests


def _read_requests(
    setup: Setup, scheduler: Any, found: Snapshot, folder: Path, callback: UserCallback | None
) -> list[Request]:
    """The requests as the snapshot describes them; embeddings take the place of texts."""
    noise = found.run["noise"]
    latents = None if noise is None else snapshot.read_noise(folder, noise)
    requests = []
    for number, (fields, prompts) in enumerate(zip(found.run["videos"], found.prompts, strict=True)):
        video, rows = VideoConfig(**fields), prompts[min(prompts)]
        inputs = VideoInputs(
            latents=None if latents is None else latents[number : number + 1],
            prompt_embeds=rows[:1],
            negative_prompt_embeds=rows[1:] if len(rows) > 1 else None,
            seed=video.seed,
        )
        requests.append(check_request(setup, scheduler, video, inputs, callback))
    return requests


def check_restartable(setup: Setup, requests: Sequence[Request]) -> None:
    """Checks that there are iterations at which a snapshot can be taken. Raises ValueError when there is none."""
    blocks, schedule = setup.config.blocks, schedule_of(setup, requests)
    if not any(map(schedule.is_restartable, range(1, 1 + max(1, blocks.refresh_every or 1)))):
        raise ValueError(
            f"checkpoint with context={blocks.context!r}"
            + (", attention_8bit" if setup.config.attention_8bit.on else "")
            + " and no refresh_every: what blocks in flight left behind is too large to keep; give the engine "
            "refresh_every, such as half the steps, or use context='paper' without 8-bit attention"
        )


def restore(
    queues: Sequence[LatentQueue], decoder: Delivery, folder: Path, found: Snapshot, schedule: Schedule
) -> None:
    """Puts latents and samplers as they are in the snapshot, and the decoders as far as they see back.

    Args:
        queues: one for each video, empty.
        folder: the snapshot's, where the final latents of finished blocks lie too.
        schedule: the resumed run's.

    Raises:
        SnapshotError: final latents of a block that is needed are missing or damaged.
    """
    first = schedule.first_block
    before = [
        snapshot.read_blocks(folder, video, blocks_to_restore(queue.layout, first, decoder.history))
        for video, queue in enumerate(queues)
    ]
    for queue, blocks, latents in zip(queues, found.blocks, before, strict=True):
        queue.restore(blocks, latents[-1] if latents else None)
    decoder.resume(first, before)
