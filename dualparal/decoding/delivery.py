"""Finished blocks on their way out: given to whoever decodes them, and given out as they were finished."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from dualparal.config.video import VideoConfig
from dualparal.decoding.chunks import Chunk, Progress
from dualparal.decoding.parts import Part, join_rows
from dualparal.distributed.messages import PeerLost
from dualparal.schedule.actions import DECODE_BOUND
from dualparal.schedule.layout import Layout
from dualparal.trace.timeline import Track

_CAUSE_SECONDS = 1.0  # after a part has lost another one, until that has told why


class _Pending(NamedTuple):
    video: int
    block: int
    latents: torch.Tensor
    rows: list[Future[Any]]  # of each part


class Delivery:
    """Takes final latents from stage 0, has at most ``DECODE_BOUND`` blocks decoded at once, and gives out chunks.

    Methods are called from the thread of stage 0; only the decoding itself goes on elsewhere.

    Args:
        layout: the places of blocks, the same in all videos.
        video: the request for any of the videos, which have one length and one output type.
        temporal_factor: frames that a latent frame becomes, apart from the first of a video.
        num_videos: videos that are made together.
        parts: who decodes, the topmost rows first; None when latents are wanted.
        busy: called for the seconds that stage 0 has spent in units.
        track: stage 0's rows in the timeline.
        waiting: called with a block before the host waits for its frames; None: nobody listens.

    Attributes:
        progress: the run's, with the chunk that was given out last.
        before: the progress with which a resumed run began.
        waited: seconds that stage 0 was blocked by decoding, so far.
        consumed: seconds that the consumer had a chunk in its hands while stage 0 waited, so far.
    """

    def __init__(
        self,
        layout: Layout,
        video: VideoConfig,
        temporal_factor: int,
        num_videos: int,
        parts: Sequence[Part] | None,
        busy: Callable[[], float],
        track: Track | None = None,
        waiting: Callable[[int], None] | None = None,
    ) -> None:
        self.layout = layout
        self.output_type = video.output_type
        self.temporal_factor = temporal_factor
        self.busy = busy
        self.track = track
        self.started = time.perf_counter()
        self.waited = self.consumed = 0.0
        self.skipped = video.skipped_blocks
        blocks = None if layout.num_blocks is None else num_videos * (layout.num_blocks - self.skipped)
        frames = None if video.num_frames is None else num_videos * video.num_frames
        self.progress = self.before = Progress(0, 0, blocks, frames, 0.0, 0.0, 0.0)
        self._parts = parts
        self._waiting = waiting or (lambda block: None)
        self._frames_of = [0] * num_videos  # given out so far
        self._latents: dict[tuple[int, int], torch.Tensor] = {}  # by video and block
        self._pending: deque[_Pending] = deque()
        self._done: deque[tuple[int, int, torch.Tensor, Any]] = deque()
        self._failed = False

    @property
    def history(self) -> int:
        """Latent frames before a block that its decoding sees; 0 when latents are wanted."""
        return 0 if self._parts is None else self._parts[0].history

    def resume(self, block: int, videos: Sequence[Sequence[torch.Tensor]]) -> None:
        """Goes on with a block: latents before it go through the decoders again.

        Args:
            block: the first one that is still to be finished, in every video.
            videos: for each video, latents [1, C, f, h, w] of the blocks just before, as far as decoding sees them.
        """
        for video, latents in enumerate(videos):
            done = self.layout.start(block) - self.layout.start(self.skipped)
            self._frames_of[video] = self._made(self.skipped, done) if block > self.skipped else 0
            for seen in latents if self._parts is not None else ():
                if seen.shape[2]:
                    self._result([part.push(video, seen) for part in self._parts or ()])
        blocks = max(0, block - self.skipped) * len(videos)
        self.before = replace(self.progress, blocks=blocks, frames=sum(self._frames_of))
        self.progress = self.before

    def warm_up(self, latents: torch.Tensor) -> None:
        """Decodes latents [1, C, f, h, w] of a video of their own: nothing is loaded when the first block comes.

        Raises what decoding has raised.
        """
        if self._parts is not None:
            self._result([part.warm_up(latents) for part in self._parts])

    def _made(self, block: int, latents: int) -> int:
        """Frames that so many latent frames become, from ``block`` on; the first of a video becomes one frame."""
        return self.temporal_factor * latents - (self.temporal_factor - 1 if block == 0 else 0)

    def emit(self, video: int, block: int, latents: torch.Tensor) -> None:
        """Takes a block's final latents [1, C, f, h, w]; what is beyond the end of the video is cut off."""
        kept = latents[:, :, : self.layout.kept_frames(block)]
        if self._parts is None:
            self._finish(video, block, kept, None)
        else:
            self._latents[video, block] = kept

    def decode(self, video: int, block: int) -> None:
        """Starts decoding a block that was emitted; waits while ``DECODE_BOUND`` others are not decoded yet.

        Raises what decoding has raised.
        """
        assert self._parts is not None
        while len(self._pending) >= DECODE_BOUND:
            self._take()
        latents = self._latents.pop((video, block))
        rows = [part.decode(video, block, latents) for part in self._parts]
        self._pending.append(_Pending(video, block, latents, rows))

    def _result(self, futures: Sequence[Future[Any]]) -> list[Any]:
        """The results of all parts. Raises what the first part that failed has raised, though others still wait."""
        try:
            if len(futures) > 1:
                errors = _errors(wait(futures, return_when=FIRST_EXCEPTION).done)
                if errors and all(isinstance(error, PeerLost) for error in errors):  # a consequence: the cause may come
                    errors = _errors(wait(futures, _CAUSE_SECONDS).done)
                for error in sorted(errors, key=lambda error: isinstance(error, PeerLost)):
                    raise error
            return [future.result() for future in futures]
        except BaseException:
            self._failed = True
            self._pending.clear()  # what comes after a block that is broken is not given out
            raise

    def decoding(self) -> float:
        """Seconds that decoding beside stage 0 has taken so far."""
        return sum(part.decoding() for part in self._parts or ())

    def _take(self) -> None:
        pending = self._pending.popleft()
        begin = time.perf_counter()
        if not all(future.done() for future in pending.rows):
            self._waiting(pending.block)
        rows = self._result(pending.rows)
        self.waited += time.perf_counter() - begin
        for part in rows:
            if isinstance(part, torch.Tensor) and part.is_cuda:
                # Made on another stream, whose next frames may take their place as soon as they are let go.
                part.record_stream(torch.cuda.current_stream(part.device))
        frames = join_rows(rows)
        if self.output_type == "pil":
            from PIL import Image

            frames = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
        self._finish(pending.video, pending.block, pending.latents, frames)

    def _finish(self, video: int, block: int, latents: torch.Tensor, frames: Any) -> None:
        """Has a block given out, unless it is a clip's end, which the consumer has."""
        if block >= self.skipped:
            self._done.append((video, block, latents, frames))

    def ready(self) -> Iterator[Chunk]:
        """Yields the chunks that are finished, without waiting. Raises what decoding has raised."""
        while self._pending and _settled(self._pending[0].rows):
            self._take()
        while self._done:
            chunk = self._chunk(*self._done.popleft())
            begin = time.perf_counter()
            try:
                yield chunk
            finally:
                end = time.perf_counter()
                self.consumed += end - begin
                if self.track is not None:
                    self.track.consumer(chunk.video, chunk.block, begin, end)

    def drain(self) -> Iterator[Chunk]:
        """Yields all chunks that are still to come. Raises what decoding has raised."""
        while self._pending:
            self._take()
            yield from self.ready()
        yield from self.ready()

    def _chunk(self, video: int, block: int, latents: torch.Tensor, frames: Any) -> Chunk:
        start = self._frames_of[video]
        made = self._made(block, latents.shape[2])
        self._frames_of[video] += made
        seconds = time.perf_counter() - self.started
        done = self.progress
        self.progress = replace(
            done,
            blocks=done.blocks + 1,
            frames=done.frames + made,
            seconds=seconds,
            first=done.first or seconds,
            bubble=1 - self.busy() / seconds,
        )
        return Chunk(block - self.skipped, start, frames, latents, self.progress, video)

    def close(self, failed: bool = False) -> None:
        """Ends the decoders once they are done with what they were given; frames of it are dropped.

        Raises what ending one of them has raised, after all were told.

        Args:
            failed: something has. Then, and after one of them has, nobody waits for those that may wait for another.
        """
        first: Exception | None = None
        for part in self._parts or ():
            try:
                part.close(failed or self._failed)
            except Exception as error:
                self._failed, first = True, first or error
        if first is not None:
            raise first


def _settled(futures: Sequence[Future[Any]]) -> bool:
    """True when all parts are done, or one has failed, for which the others may wait."""
    done = [future for future in futures if future.done()]
    return len(done) == len(futures) or any(future.exception() is not None for future in done)


def _errors(futures: Iterable[Future[Any]]) -> list[BaseException]:
    """The errors of futures that are done."""
    return [error for future in futures if (error := future.exception()) is not None]
