"""The thread that has the engine: it makes run after run, goes on from snapshots, and starts failed ranks anew."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator
from typing import Any

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.checkpoint.snapshot import SnapshotError
from dualparal.decoding.chunks import Chunk
from dualparal.io.files import make_folder
from dualparal.io.video import SegmentWriter, join
from dualparal.server.jobs import Jobs, Run, block_paths
from dualparal.server.reference import read_reference
from dualparal.server.requests import first_frame, layout_of
from dualparal.server.spans import Spans
from dualparal.server.store import Video
from dualparal.workers.engine import Engine, WorkerEngine
from dualparal.workers.ranks import RankFailed

logger = logging.getLogger("dualparal")

_MOST_FAILURES = 1  # of ranks, that a video lives through
_ASK_AGAIN_SECONDS = 0.1
_JOIN_SECONDS = 30.0  # in which the thread has ended when the server does


class Runner:
    """Makes the videos of a queue, one run after another, on one engine.

    Args:
        jobs: the queue.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs, self._settings = jobs, jobs.settings
        self._engine: WorkerEngine | None = None
        self._thread = threading.Thread(target=self._work, name="dualparal-runner", daemon=True)

    @property
    def is_up(self) -> bool:
        """True while the thread lives and the ranks have started."""
        return self._thread.is_alive() and self._engine is not None

    def start(self) -> None:
        """Starts the ranks, and the thread. Raises what ``Engine.from_pretrained`` raises."""
        self._start_engine()
        self._thread.start()

    def stop(self) -> None:
        """Ends the run under way, the thread and the ranks."""
        self._jobs.end()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)
        self._end_engine()

    def _start_engine(self) -> WorkerEngine:
        if self._engine is None:
            settings = self._settings
            self._engine = Engine.from_pretrained(settings.model, settings.engine, gpus=settings.gpus)
            self._jobs.metrics.starts.inc()
            self._jobs.metrics.up.set(1)
        return self._engine

    def _end_engine(self) -> None:
        engine, self._engine = self._engine, None
        self._jobs.metrics.up.set(0)
        if engine is not None:
            engine.close()

    def _work(self) -> None:
        while (run := self._jobs.take()) is not None:
            try:
                self._make(run)
            except Exception as error:
                self._failed(run, error)
            finally:
                self._jobs.finish(run)
            if run.killed:
                self._end_engine()
            if self._engine is None and not self._jobs.ended:
                with contextlib.suppress(ValueError, OSError, RuntimeError):  # whoever comes next is told
                    self._start_engine()

    def _failed(self, run: Run, error: Exception) -> None:
        """Has a run that was not made to its end begun again, or its videos fail with a line."""
        refused = isinstance(error, (ValueError, TypeError))
        if not refused:
            self._end_engine()  # its ranks are gone, or in an unknown state
        if run.stopping:
            return
        if refused and len(run.videos) > 1:
            self._jobs.again(run, apart=True)  # together they may need more memory than there is
        elif refused:
            self._jobs.failed(run, "invalid_request", _line(error))
        elif isinstance(error, OSError) and not isinstance(error, ConnectionError):
            logger.error("a run failed", exc_info=error)
            self._jobs.failed(run, "storage", "the server cannot read or write its files")
        else:
            self._jobs.metrics.failures.inc()
            known = isinstance(error, RankFailed)
            logger.warning("a run failed: %s", _line(error), exc_info=None if known else error)
            if any(video.failures >= _MOST_FAILURES for video in run.live()):
                kind = "rank_failed" if isinstance(error, RankFailed) else "engine_failed"
                self._jobs.failed(run, kind, _line(error))
            else:
                self._jobs.again(run)

    # One run -----------------------------------------------------------------------------------------------------

    def _make(self, run: Run) -> None:
        run.engine = engine = self._start_engine()
        if run.stopping:  # while the ranks started
            return
        stream = self._stream(run, engine)
        writers: dict[int, SegmentWriter] = {}
        try:
            while not run.stopping and (chunk := next(stream, None)) is not None:
                self._keep(run, writers, chunk)
        finally:
            stream.close()  # type: ignore[attr-defined]
        if not run.stopping:
            self._jobs.failed(run, "engine_failed", "the run ended before its last block")

    def _stream(self, run: Run, engine: WorkerEngine) -> Iterator[Chunk]:
        """The chunks of a run: from its last snapshot on, or from the beginning."""
        folder = self._jobs.store.run(run.name)
        snapshots, timeline = folder / "snapshots", folder / "timeline.json"
        if any(snapshots.glob("snapshot-*")):
            try:
                stream = engine.resume(snapshots, timeline=timeline)
            except SnapshotError as error:
                logger.warning("a video begins anew, since its snapshot is of another model or options: %s", error)
                for video in run.live():
                    shutil.rmtree(self._jobs.store.blocks(video), ignore_errors=True)
                    video.blocks = []
            else:
                run.spans = Spans(timeline)
                if any(video.changed is not None for video in run.live()):
                    threading.Thread(target=self._change_prompts, args=(run, engine), daemon=True).start()
                return stream
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder, 0o700)
        videos = run.live() or [video for video in run.videos if video is not None]  # who stops them tells ``_make``
        run.videos = list(videos)
        for place, video in enumerate(videos):
            video.place, video.changed = place, None
            self._jobs.store.save(video)
        request = videos[0].request
        layout = layout_of(request.num_frames, self._settings)
        images = [read_reference(self._jobs.store.reference(video)) for video in videos] if request.image else None
        stream = engine.stream(
            [{first_frame(layout, block): text for block, text in video.prompts} for video in videos],
            [video.request.negative_prompt or "" for video in videos],
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            seed=[video.request.seed for video in videos],
            image=images,
            output_type="uint8",
            checkpoint=Checkpoint(snapshots),
            timeline=timeline,
        )
        run.spans = Spans(timeline)
        return stream

    def _change_prompts(self, run: Run, engine: WorkerEngine) -> None:
        """Gives a run that was begun before the last change of each video's prompt, which its snapshot may not know.

        Called on a thread of its own: the ranks take a prompt as soon as the run has begun.
        """
        for video in [video for video in run.live() if video.changed is not None]:
            while not (run.over.is_set() or run.stopping or video.is_over):
                try:
                    engine.set_prompt(video.changed or "", video.request.negative_prompt, video=video.place)
                    break
                except ValueError as error:
                    logger.warning("a changed prompt is lost: %s", error)
                    break
                except (RuntimeError, OSError):
                    run.over.wait(_ASK_AGAIN_SECONDS)  # not yet; or the ranks are gone, and the run is over soon

    def _keep(self, run: Run, writers: dict[int, SegmentWriter], chunk: Chunk) -> None:
        """Writes a block of a video that somebody still wants."""
        video = run.videos[chunk.video]
        if video is None or video.is_over:
            return
        store = self._jobs.store
        if chunk.video not in writers:
            writers[chunk.video] = SegmentWriter(store.blocks(video), video.fps, resume=True)
        writers[chunk.video].write(chunk.block, chunk.frames)
        count = len(chunk.frames)
        self._jobs.block_done(run, chunk.video, chunk.block, chunk.start_frame, count)
        if chunk.start_frame + count >= video.request.num_frames:
            self._complete(video)

    def _complete(self, video: Video) -> None:
        store = self._jobs.store
        join(block_paths(store, video), store.file(video))
        self._jobs.completed(video)


def _line(error: Any) -> str:
    """The first line of an error, as a client may see it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
