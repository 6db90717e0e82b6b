"""Keeps a run's snapshots while it runs: captures them, makes them durable in order, and removes older ones.

The order is: a block's final latents, then its frames (the consumer has asked for the next ones), then a snapshot in
which it is finished. Tensors are captured as they are, since nobody writes to latents or sampler states; a thread
copies and writes them beside the run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dualparal.checkpoint import snapshot
from dualparal.checkpoint.snapshot import Snapshot, SnapshotError
from dualparal.config.reuse import StepPlan
from dualparal.sampling.sampler import Sampler
from dualparal.sampling.state import BlockState
from dualparal.schedule.layout import Layout
from dualparal.schedule.schedule import Schedule

logger = logging.getLogger("dualparal")

# Of a run's time, at most a fiftieth goes into snapshots when nobody says how often.
_TIMES_AS_LONG = 50
_WAITING_BLOCKS = 4  # final latents that are not on disk yet


@dataclass(frozen=True)
class Checkpoint:
    """The folder of a run's snapshots, and the time from one to the next.

    Attributes:
        folder: empty or absent at the start of a run.
        every: iterations from one snapshot to the next, rounded up to one where a run can go on. None: writing takes
            at most 2 % of the time.
        notes: JSON values that whoever resumes wants to find again.
        keep_latents: keep the final latents of all blocks, not only of those that a resume needs.
        receipts: (block) -> JSON values on what was made of the blocks before, for whoever resumes; asked when the
            consumer has them all. None: there are none.

    Raises:
        ValueError: ``every`` is less than 1.
    """

    folder: Path
    every: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    keep_latents: bool = False
    receipts: Callable[[int], Any] | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"checkpoint_every={self.every}: iterations between snapshots; use 1 or more, or None")


class Checkpointer:
    """The leading rank's part of a checkpointed run: it captures and writes snapshots and final latents.

    Every method but ``begin`` may also raise what writing on the thread has raised since: OSError, or SnapshotError
    for latents with NaN or infinity.

    Args:
        checkpoint: the folder, the time between snapshots, and what is kept.
        run: description of the run, JSON values (``engine.identity.snapshot_info``).
        schedule, layout: the run's.
        history: latent frames before a block that its decoding needs.
        prompts: asked at every snapshot, for each video's first block -> embeddings [branches, tokens, text_dim].
        device: the device on which latents lie.
        resumed: the name of the snapshot that the run goes on from; empty: it begins.
        skipped: blocks at the beginning that the consumer does not get, and does not count.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        run: dict[str, Any],
        schedule: Schedule,
        layout: Layout,
        history: int,
        prompts: Callable[[], Sequence[Mapping[int, torch.Tensor]]],
        device: torch.device,
        resumed: str = "",
        skipped: int = 0,
    ) -> None:
        self.folder, self.every, self.keep_latents = checkpoint.folder, checkpoint.every, checkpoint.keep_latents
        receipts = checkpoint.receipts or (lambda block: None)
        self._receipts = lambda block: receipts(max(0, block - skipped))
        self._skipped = skipped
        self.run, self.schedule, self.layout, self.history, self.prompts = run, schedule, layout, history, prompts
        snapshot.remove_leftovers(self.folder, resumed)
        self._delivered = [max(schedule.first_block, skipped)] * schedule.num_videos  # blocks that the consumer has
        self._pending: Snapshot | None = None  # captured; blocks before it may still be on their way out
        self._ready: torch.cuda.Event | None = None
        self._last = schedule.start
        self._first_blocks = [schedule.first_block]  # of the snapshots on disk
        self._seconds = 0.0  # that the last one took
        self._idle_since = time.monotonic()
        self._writing: Future[None] | None = None
        self._closed = self._failed = False
        self._tasks: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dualparal-checkpoint")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self) -> None:
        """Writes the first snapshot, from which a run can be started anew. Raises OSError."""
        empty: list[dict[int, BlockState]] = [{} for _ in self._delivered]
        Snapshot(0, self.run, self.prompts(), empty).write(self.folder)

    def emit(self, video: int, block: int, latents: torch.Tensor) -> None:
        """Begins to write a block's final latents [1, C, F, H, W]. Waits while several others are not on disk yet."""
        self._collect(_WAITING_BLOCKS)
        ready = self._event()
        self._submit(lambda: self._write_block(video, block, latents, ready))

    def delivered(self, video: int, block: int) -> None:
        """Notes that the consumer has a block's frames: it has asked for the next ones. Blocks count as it has them."""
        self._delivered[video] = block + 1 + self._skipped
        self._collect()
        self._write_when_ready()

    def on_snapshot_point(self, iteration: int, blocks: Callable[[], Sequence[Mapping[int, BlockState]]]) -> None:
        """Captures a snapshot at the start of an iteration that can be restarted, if one is due.

        Args:
            iteration: the one that is about to begin.
            blocks: called if one is due; the state of each block in flight, by block, for each video.
        """
        self._collect()
        if self._pending is not None or self._writing is not None or not self._is_due(iteration):
            return
        in_flight = self.schedule.in_flight(iteration)
        if not in_flight:
            return  # the end
        # Stage 0 may have let in a block of this iteration already; it begins with its noise.
        begun = [block for block in in_flight if block * self.schedule.gap < iteration]
        states = [{block: video[block] for block in begun} for video in blocks()]
        self._pending = Snapshot(iteration, self.run, self.prompts(), states)
        self._ready = self._event()
        self._last = iteration
        self._write_when_ready()

    def close(self) -> None:
        """Writes what can be written, waits for it, and ends the thread. Once all blocks are delivered, that is a
        snapshot that says so."""
        blocks = self.schedule.num_blocks
        if not self._closed and blocks is not None and min(self._delivered) == blocks:
            self._collect(0)  # latents first: without them it would not be true
            nothing: list[dict[int, BlockState]] = [{} for _ in self._delivered]
            after = (blocks - 1) * self.schedule.gap + self.schedule.num_steps
            last = Snapshot(after, self.run, self.prompts(), nothing, snapshot.FINISHED, self._receipts(blocks))
            ready = self._event()  # the embeddings
            self._submit(lambda: self._write(last, blocks, ready))
        else:
            self._write_when_ready()
        self._closed = True
        self._pool.shutdown(wait=True)
        self._collect()

    def _is_due(self, iteration: int) -> bool:
        if self.every is not None:
            return iteration - self._last >= self.every
        return time.monotonic() - self._idle_since >= _TIMES_AS_LONG * self._seconds

    def _first(self, iteration: int) -> int:
        return self.schedule.in_flight(iteration).start

    def _write_when_ready(self) -> None:
        taken, first = self._pending, 0 if self._pending is None else self._first(self._pending.iteration)
        if taken is None or self._writing is not None or min(self._delivered) < first:
            return
        ready, self._pending = self._ready, None
        taken = replace(taken, receipts=self._receipts(first))
        self._writing = self._submit(lambda: self._write(taken, first, ready))

    def _write(self, taken: Snapshot, first: int, ready: torch.cuda.Event | None) -> None:
        begin = time.monotonic()
        with self._beside(ready):
            path = taken.write(self.folder)
        self._idle_since = time.monotonic()
        self._seconds = self._idle_since - begin
        size = path.stat().st_size
        logger.info("%s: %.1f MB in %.2f s", path.name, size / 1e6, self._seconds)
        self._first_blocks = [*self._first_blocks, first][-snapshot.KEEP :]
        if not self.keep_latents:
            oldest = self._first_blocks[0]
            for video in range(len(self._delivered)):
                needed = blocks_to_restore(self.layout, oldest, self.history).start
                snapshot.forget_blocks(self.folder, video, range(self.schedule.is_anchored, needed))

    def _write_block(self, video: int, block: int, latents: torch.Tensor, ready: torch.cuda.Event | None) -> None:
        with self._beside(ready):
            snapshot.write_block(self.folder, self.run["id"], video, block, latents)

    def _event(self) -> torch.cuda.Event | None:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _beside(self, ready: torch.cuda.Event | None) -> Any:
        """The context of the stream on which tensors go to the host, entered once they are made."""
        if ready is None:
            return nullcontext()
        ready.synchronize()
        return torch.cuda.stream(self._stream)

    def _submit(self, task: Callable[[], None]) -> Future[None]:
        future = self._pool.submit(partial(self._perform, task))  # tensors live as long as this does
        self._tasks.append(future)
        return future

    def _perform(self, task: Callable[[], None]) -> None:
        """Performs a task on the thread, unless one before has failed: a snapshot may rest on it."""
        if self._failed:
            return
        try:
            task()
        except BaseException:
            self._failed = True
            raise

    def _collect(self, waiting: int | None = None) -> None:
        """Raises what a finished task raised; waits until at most ``waiting`` are left."""
        while self._tasks and (self._tasks[0].done() or (waiting is not None and len(self._tasks) > waiting)):
            task = self._tasks.pop(0)
            if task is self._writing:
                self._writing = None
            task.result()


def check_fits(
    found: Snapshot,
    schedule: Schedule,
    layout: Layout,
    sampler: Sampler,
    steps: StepPlan,
    shape: tuple[int, int, int],
    text_dim: int,
) -> None:
    """Checks that a snapshot holds what a run needs at the start of its schedule.

    Args:
        found: the snapshot that was read.
        schedule: the resumed run's; its ``start`` is the snapshot's iteration.
        layout, sampler, steps: the resumed run's.
        shape: channels, height and width of a latent frame.
        text_dim: width of a prompt's embeddings [branches, tokens, text_dim].

    Raises:
        SnapshotError: other blocks, shapes, dtypes, sampler states or kept velocities than the run would have there.
    """
    expected = {block for block in schedule.in_flight(schedule.start) if schedule.steps_done(block)}
    for prompts, blocks in zip(found.prompts, found.blocks, strict=True):
        if set(blocks) != expected:
            raise SnapshotError(f"a snapshot of blocks {sorted(blocks)}: iteration {schedule.start} has others")
        if min(prompts, default=math.inf) > schedule.first_block:
            raise SnapshotError("a snapshot without the first block's prompt")
        for embeds in prompts.values():
            tokens = next(iter(found.prompts[0].values())).shape[1]
            if list(embeds.shape) != [schedule.branches, tokens, text_dim]:
                raise SnapshotError(f"a snapshot with prompt embeddings of shape {list(embeds.shape)}")
        for block, state in blocks.items():
            size = (1, shape[0], layout.frames(block), *shape[1:])
            if state.latents.shape != size or state.latents.dtype != torch.float32:
                raise SnapshotError(f"a snapshot with latents of shape {list(state.latents.shape)}, not {list(size)}")
            done = schedule.steps_done(block)
            _check_sampler(state.sampler, sampler.start(block).state(), steps.first_step(done), state.latents)
            kept = [len(steps.known(done - 1, branch)) for branch in range(schedule.branches if steps.kept else 0)]
            fits = all(v.shape == size and v.dtype == torch.float32 for branch in state.velocities for v in branch)
            if list(map(len, state.velocities)) != kept or not fits:
                raise SnapshotError(f"a snapshot without the velocities that block {block} goes on from")


def _check_sampler(state: Mapping[str, Any], fresh: Mapping[str, Any], steps: int, latents: torch.Tensor) -> None:
    """Checks that a state has the names and kinds of values of a fresh one, and tensors shaped as the latents.

    Raises:
        SnapshotError: another name, kind, length, shape or step.
    """

    def fits(value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.shape in (latents.shape, ()) and value.device == latents.device
        return value is None or (type(value) is int and 0 <= value <= steps)

    for name, value in state.items():
        wanted = fresh.get(name)
        items = value if isinstance(value, list) else [value]
        if isinstance(wanted, list) != isinstance(value, list) or not all(map(fits, items)):
            raise SnapshotError(f"a snapshot with a sampler state that has another {name}")
        if isinstance(wanted, list) and len(items) != len(wanted):
            raise SnapshotError(f"a snapshot with a sampler state of another order ({name})")
    at = state.get("_step_index")
    if type(at) is not int or at != steps or set(fresh) - set(state):
        raise SnapshotError("a snapshot with a sampler state of another step")


def blocks_to_restore(layout: Layout, first: int, history: int) -> range:
    """The finished blocks whose latents a run needs that goes on with block ``first``.

    They cover the decoder's ``history`` (latent frames), and at least the block before, whose end is fed to the model.
    """
    block, wanted = first, history
    while block > 0 and (wanted > 0 or block == first):
        block -= 1
        wanted -= layout.frames(block)
    return range(block, first)
