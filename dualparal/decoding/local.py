"""Finished blocks on their way out: decoded on a thread beside the stages, and given out as they were finished."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dualparal.config.video import VideoConfig
from dualparal.decoding.chunks import Chunk, Progress
from dualparal.decoding.frames import to_output, to_uint8
from dualparal.models.base import Decoder
from dualparal.schedule.actions import DECODE_BOUND
from dualparal.schedule.layout import Layout
from dualparal.trace.timeline import Track


class LocalDecoder:
    """Takes final latents from stage 0, decodes at most ``DECODE_BOUND`` blocks at once, and gives out chunks.

    Methods are called from the thread of stage 0; only the decoding itself runs on a thread of its own.

    Args:
        layout: the places of blocks, the same in all videos.
        video: the request for any of the videos, which have one length and one output type.
        temporal_factor: frames that a latent frame becomes, apart from the first of a video.
        num_videos: videos that are made together.
        decoders: one for each video; None when latents are wanted.
        device: the device of latents and decoders.
        busy: called for the seconds that stage 0 has spent in units.
        track: stage 0's rows in the timeline.

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
        decoders: Sequence[Decoder] | None,
        device: torch.device,
        busy: Callable[[], float],
        track: Track | None = None,
    ) -> None:
        self.layout = layout
        self.output_type = video.output_type
        self.temporal_factor = temporal_factor
        self.busy = busy
        self.track = track
        self.started = time.perf_counter()
        self.waited = self.consumed = 0.0
        self._decoded = 0.0  # seconds, of blocks that are done
        self._decoding_since: float | None = None
        blocks = None if layout.num_blocks is None else num_videos * layout.num_blocks
        frames = None if video.num_frames is None else num_videos * video.num_frames
        self.progress = self.before = Progress(0, 0, blocks, frames, 0.0, 0.0, 0.0)
        self._decoders = decoders
        self._frames_of = [0] * num_videos  # given out so far
        self._latents: dict[tuple[int, int], torch.Tensor] = {}  # by video and block
        self._pending: deque[tuple[int, int, torch.Tensor, Future[Any]]] = deque()
        self._done: deque[tuple[int, int, torch.Tensor, Any]] = deque()
        self._pool = None if decoders is None else ThreadPoolExecutor(1, thread_name_prefix="dualparal-decode")
        self._stream = torch.cuda.Stream(device) if decoders is not None and device.type == "cuda" else None

    @property
    def history(self) -> int:
        """Latent frames before a block that its decoding sees; 0 when latents are wanted."""
        return 0 if self._decoders is None else self._decoders[0].history

    def resume(self, block: int, videos: Sequence[Sequence[torch.Tensor]]) -> None:
        """Goes on with a block: latents before it go through the decoders again.

        Args:
            block: the first one that is still to be given out, in every video.
            videos: for each video, latents [1, C, f, h, w] of the blocks just before, as far as decoding sees them.
        """
        for video, latents in enumerate(videos):
            self._frames_of[video] = self._made(0, self.layout.start(block)) if block else 0
            if self._pool is not None:  # on the thread too: what a decoder keeps is its stream's memory
                for part in latents:
                    self._submit(self._push, video, part).result()
        self.before = replace(self.progress, blocks=block * len(videos), frames=sum(self._frames_of))
        self.progress = self.before

    def warm_up(self, latents: torch.Tensor) -> None:
        """Decodes latents [1, C, f, h, w] of a video of their own: nothing is loaded when the first block comes.

        Raises what decoding has raised.
        """
        if self._pool is not None:
            self._submit(self._try, latents).result()

    def _made(self, block: int, latents: int) -> int:
        """Frames that so many latent frames become, from ``block`` on; the first of a video becomes one frame."""
        return self.temporal_factor * latents - (self.temporal_factor - 1 if block == 0 else 0)

    def emit(self, video: int, block: int, latents: torch.Tensor) -> None:
        """Takes a block's final latents [1, C, f, h, w]; what is beyond the end of the video is cut off."""
        kept = latents[:, :, : self.layout.kept_frames(block)]
        if self._pool is None:
            self._done.append((video, block, kept, None))
        else:
            self._latents[video, block] = kept

    def decode(self, video: int, block: int) -> None:
        """Starts decoding a block that was emitted; waits while ``DECODE_BOUND`` others are not decoded yet.

        Raises what decoding has raised.
        """
        assert self._pool is not None
        while len(self._pending) >= DECODE_BOUND:
            self._take()
        latents = self._latents.pop((video, block))
        self._pending.append((video, block, latents, self._submit(self._decode, video, latents, block)))

    def _submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Calls a function on the thread, with an event behind all that the current stream has been given so far."""
        assert self._pool is not None
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        return self._pool.submit(function, ready, *args)

    @contextmanager
    def _beside(self, ready: torch.cuda.Event | None) -> Iterator[None]:
        """The thread's stream from ``ready`` on; at the end all that it was given is done."""
        if self._stream is None or ready is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            try:
                yield
            finally:
                self._stream.synchronize()  # who waits for the thread may let go of what it was working on

    def _push(self, ready: torch.cuda.Event | None, video: int, latents: torch.Tensor) -> None:
        assert self._decoders is not None
        with self._beside(ready):
            self._decoders[video].push(latents)

    def _try(self, ready: torch.cuda.Event | None, latents: torch.Tensor) -> None:
        assert self._decoders is not None
        with self._beside(ready):
            self._frames(0, latents)
            self._decoders[0].reset()

    def _frames(self, video: int, latents: torch.Tensor) -> Any:
        assert self._decoders is not None and self.output_type != "latent"
        made = self._decoders[video].push(latents)
        return to_uint8(made) if self.output_type == "uint8" else to_output(made, self.output_type)

    def _decode(self, ready: torch.cuda.Event | None, video: int, latents: torch.Tensor, block: int) -> Any:
        begin = self._decoding_since = time.perf_counter()
        with self._beside(ready):
            frames = self._frames(video, latents)
        end = time.perf_counter()
        self._decoding_since, self._decoded = None, self._decoded + end - begin
        if self.track is not None:
            self.track.decode(video, block, begin, end)
        return frames

    def decoding(self) -> float:
        """Seconds that the thread has spent decoding blocks so far, beside stage 0."""
        since = self._decoding_since
        return self._decoded + (0.0 if since is None else time.perf_counter() - since)

    def _take(self) -> None:
        video, block, latents, future = self._pending.popleft()
        begin = time.perf_counter()
        frames = future.result()
        self.waited += time.perf_counter() - begin
        if self._stream is not None and isinstance(frames, torch.Tensor):
            # Made on the thread's stream, whose next frames may take their place as soon as they are let go.
            frames.record_stream(torch.cuda.current_stream(frames.device))
        self._done.append((video, block, latents, frames))

    def ready(self) -> Iterator[Chunk]:
        """Yields the chunks that are finished, without waiting. Raises what decoding has raised."""
        while self._pending and self._pending[0][-1].done():
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
        return Chunk(block, start, frames, latents, self.progress, video)

    def close(self) -> None:
        """Ends the thread once it is done with the block in its hands; the others are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
