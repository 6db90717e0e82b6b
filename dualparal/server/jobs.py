"""The queue: videos that wait, the run that is under way, and what clients may do to either. Any thread may call.

``runner`` takes runs from here and makes them; nothing here knows how.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from dualparal.io.video import segments_in
from dualparal.server.errors import ApiError
from dualparal.server.metrics import Metrics
from dualparal.server.requests import VideoRequest, layout_of
from dualparal.server.settings import Settings
from dualparal.server.spans import Spans
from dualparal.server.store import COMPLETED, FAILED, QUEUED, RUNNING, Store, Video

logger = logging.getLogger("dualparal")

SOFT_SECONDS = 0.5  # from the wish to stop, which the unit under way is waited for, to the end of the ranks
_CANCELLED = {"code": "cancelled", "message": "it was stopped on request"}


@dataclass
class Run:
    """Videos that one call of the engine makes.

    Attributes:
        name: of its folder.
        videos: by their place in the call; None: nobody wants that one any more.
        engine: that makes it, while it does.
        spans: of its timeline, while it is made.
        stopping: nobody wants any of it any more, or the server ends.
        over: the engine is free again.
        killed: its ranks were ended.
        changing: a prompt is being encoded.
    """

    name: str
    videos: list[Video | None]
    engine: Any = None
    spans: Spans | None = None
    stopping: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    killed: bool = False
    changing: bool = False
    _letting_go: threading.Lock = field(default_factory=threading.Lock)

    def live(self) -> list[Video]:
        """The videos that are still wanted and not finished."""
        return [video for video in self.videos if video is not None and not video.is_over]

    def stop(self) -> None:
        """Frees the cards: asks the run to end after the unit under way, and ends the ranks if that takes long."""
        if self.stopping:
            return
        self.stopping = True
        if (engine := self.engine) is not None:
            engine.interrupt()
            timer = threading.Timer(SOFT_SECONDS, self._end)
            timer.daemon = True
            timer.start()

    def _end(self) -> None:
        with self._letting_go:  # the next run has the same engine
            if not self.over.is_set() and self.engine is not None:
                logger.warning("a unit takes longer than %g s: the ranks are ended and started anew", SOFT_SECONDS)
                self.killed = True
                self.engine.close(now=True)

    def let_go(self) -> None:
        """The engine is free again, or of no use any more."""
        with self._letting_go:
            self.over.set()
            self.engine = None


class Jobs:
    """All videos of a server, and the order in which they are made."""

    def __init__(self, store: Store, settings: Settings, metrics: Metrics) -> None:
        self.store, self.settings, self.metrics = store, settings, metrics
        self._changed = threading.Condition(threading.RLock())
        self._again: deque[Run] = deque()  # begun, and to be gone on with
        self._current: Run | None = None
        self._ended = False
        self._take_up()

    def _take_up(self) -> None:
        """Puts what an earlier process had begun before what waits, and removes runs that nobody needs."""
        begun: dict[str, list[Video]] = {}
        for video in self.store.videos.values():
            if video.run is not None and not video.is_over:
                begun.setdefault(video.run, []).append(video)
        for name in begun:
            members = [video for video in self.store.videos.values() if video.run == name]
            videos: list[Video | None] = [None] * (1 + max(video.place for video in members))
            for video in members:
                videos[video.place] = video
            self._again.append(Run(name, videos))
        for path in (self.store.folder / "runs").iterdir():
            if path.name not in begun:
                shutil.rmtree(path, ignore_errors=True)

    # For clients -------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Video:
        """The video of this id. Raises ApiError (404)."""
        with self._changed:
            video = self.store.videos.get(name)
            if video is None or video.deleted:
                raise ApiError(404, "there is no video with this id", param="video_id", code="video_not_found")
            self._refresh(video)
            return video

    def all(self) -> list[Video]:
        """All videos, the newest first."""
        with self._changed:
            found = [video for video in self.store.videos.values() if not video.deleted]
            for video in found:
                self._refresh(video)
            return sorted(found, key=lambda video: -video.number)

    def waiting(self) -> list[Video]:
        """The videos that no run has begun, the first first."""
        with self._changed:
            waiting = [video for video in self.store.videos.values() if video.status == QUEUED and video.run is None]
            return sorted(waiting, key=lambda video: video.number)

    def submit(self, request: VideoRequest, image: bytes | None = None) -> Video:
        """Appends a video to the queue, with the image that it begins with.

        Raises:
            ApiError: the queue is full (429), or the server ends (503).
            OSError: it cannot be written down.
        """
        with self._changed:
            if self._ended:
                raise ApiError(503, "this server is ending; ask again when it is back", code="ending")
            if len(self.waiting()) >= self.settings.max_queue:
                self.metrics.refused.inc()
                raise ApiError(
                    429,
                    f"{self.settings.max_queue} videos wait, which is this server's limit; ask again later",
                    code="queue_full",
                )
            self._make_room()
            video = self.store.add(request, self.settings.fps, image)
            self._count()
            self._changed.notify_all()
            return video

    def cancel(self, name: str) -> Video:
        """Ends a video; one that is over stays as it is. Raises ApiError (404)."""
        with self._changed:
            video = self.get(name)
            if not video.is_over:
                self._end(video, FAILED, dict(_CANCELLED))
            return video

    def delete(self, name: str) -> None:
        """Removes a video, ending it first. Raises ApiError (404)."""
        with self._changed:
            video = self.cancel(name)
            video.deleted = True
            self._note(video)
            if self._current is not None and video in self._current.videos:
                return  # its folder goes when the run has let go of it
            self.store.forget(video)
        self.store.erase(video)

    def set_prompt(self, name: str, text: str) -> int:
        """Changes a video's prompt from the next block that can take it; returns that block. Slow: it is encoded.

        Raises:
            ApiError: no such video (404), it is over, begins only now or takes another prompt (409), or the engine
                cannot (400).
            OSError: it waits, and its record cannot be written.
        """
        with self._changed:
            video, run = self.get(name), self._current
            if video.is_over:
                raise ApiError(409, f"this video is {video.status}: its prompt cannot change", code="video_over")
            if run is None or video not in run.videos:
                self._prompt(video, len(video.blocks), text)
                self.store.save(video)
                return len(video.blocks)
            engine = run.engine
            if engine is None:
                raise ApiError(409, "the ranks are starting: ask again in some seconds", code="not_yet")
            if run.changing:  # one at a time: who waits would keep a thread from others
                raise ApiError(409, "another prompt is being taken: ask again in some seconds", code="not_yet")
            run.changing = True
        try:
            block = int(engine.set_prompt(text, video.request.negative_prompt, video=video.place))
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from None
        except (RuntimeError, OSError):
            raise ApiError(
                409, "this video is not under way just now: ask again in some seconds", code="not_yet"
            ) from None
        finally:
            run.changing = False
        with self._changed:
            self._prompt(video, block, text)
            if not video.deleted:
                self._note(video)
        return block

    def _prompt(self, video: Video, block: int, text: str) -> None:
        video.prompts = [*(each for each in video.prompts if each[0] < block), (block, text)]
        if video.run is not None:  # else its run will have them all
            video.changed = text

    def spans(self, video: Video, seen: int) -> tuple[int, list[list[Any]]]:
        """The spans of the run that makes a video, see ``Spans.after``; none when nothing makes it."""
        run = self._current
        if run is None or run.spans is None or video not in run.videos:
            return 0, []
        return run.spans.after(seen)

    # For the runner ----------------------------------------------------------------------------------------------

    def take(self) -> Run | None:
        """Waits for the next run; None: the server ends."""
        with self._changed:
            while not self._ended:
                run = self._again.popleft() if self._again else self._next()
                if run is not None and run.live():
                    self._current = run
                    for video in run.live():
                        self._begin(run, video)
                    self._count()
                    return run
                if run is not None:
                    self._clear(run)
                else:
                    self._changed.wait()
            return None

    def _next(self) -> Run | None:
        waiting = self.waiting()
        if not waiting:
            return None
        first, most = waiting[0], together(self.settings, waiting[0].request.steps)
        alike = [video for video in waiting if _kind(video) == _kind(first) and not (video.failures or first.failures)]
        videos: list[Video | None] = [first, *(video for video in alike if video is not first)]
        return Run(secrets.token_hex(8), videos[:most])

    def _begin(self, run: Run, video: Video) -> None:
        video.status, video.run, video.place = RUNNING, run.name, run.videos.index(video)
        video.started_at = video.started_at or time.time()
        self._note(video)

    def block_done(self, run: Run, place: int, block: int, start: int, count: int) -> None:
        """Notes a block that is safe on disk."""
        with self._changed:
            video = run.videos[place]
            if video is None or video.is_over:
                return
            video.blocks[block:] = [(start, count), *video.blocks[block + 1 :]]
            self.metrics.blocks.inc()
            self.metrics.frames.inc(count)
            self._refresh(video)
            self.store.save(video)

    def completed(self, video: Video) -> None:
        """Notes that a video's file is there."""
        with self._changed:
            if not video.is_over:
                self._end(video, COMPLETED, None)

    def failed(self, run: Run, code: str, message: str) -> None:
        """Ends the videos of a run that are not finished."""
        with self._changed:
            for video in run.live():
                self._end(video, FAILED, {"code": code, "message": message[:1000]})

    def again(self, run: Run, *, apart: bool = False) -> None:
        """Puts a run in front of all others, from its last snapshot on, or each of its videos alone and anew."""
        with self._changed:
            for video in run.live():
                video.failures += 1
                if apart:
                    video.run, video.status = None, QUEUED
                self._note(video)
            if not apart:
                self._again.appendleft(Run(run.name, run.videos))

    def finish(self, run: Run) -> None:
        """Lets go of a run. What it has left stays on disk while somebody may go on with it."""
        run.let_go()
        with self._changed:
            if run.spans is not None:
                run.spans.close()
            self._current = None
            if not any(video.run == run.name for video in run.live()):
                self._clear(run)
            for video in run.videos:
                if video is not None and video.deleted:
                    self.store.remove(video)
            self._count()

    def end(self) -> None:
        """Ends the queue; what is under way can be gone on with by the next process."""
        with self._changed:
            self._ended = True
            if self._current is not None:
                self._current.stop()
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """True when the server ends."""
        return self._ended

    # ---------------------------------------------------------------------------------------------------------------

    def _note(self, video: Video) -> None:
        """Writes a record where a full disk must not keep the queue from going on: clients are told all the same."""
        try:
            self.store.save(video)
        except OSError as error:
            logger.error("the record of %s is not on disk: %s", video.id, error.strerror)

    def _clear(self, run: Run) -> None:
        shutil.rmtree(self.store.run(run.name), ignore_errors=True)

    def _end(self, video: Video, status: str, error: dict[str, str] | None) -> None:
        video.status, video.error, video.completed_at = status, error, time.time()
        if status == COMPLETED:
            video.progress = 100
        self._note(video)
        code = (error or {}).get("code")
        self.metrics.videos.labels("cancelled" if code == "cancelled" else status).inc()
        if video.started_at is not None and status == COMPLETED:
            self.metrics.seconds.observe(video.completed_at - video.started_at)
        run = self._current
        if run is not None and video in run.videos and code == "cancelled" and not run.live():
            run.stop()
        self._count()

    def _refresh(self, video: Video) -> None:
        """Brings the progress of a running video up to date: steps of blocks, which its timeline counts."""
        run = self._current
        if video.status != RUNNING or run is None or video not in run.videos:
            return
        done = sum(count for _, count in video.blocks) / video.request.num_frames
        if run.spans is not None:
            run.spans.look()
            blocks = layout_of(video.request.num_frames, self.settings).num_blocks or 1
            steps = min(1.0, run.spans.updates.get(video.place, 0) / (blocks * video.request.steps))
            done = (done + steps) / 2  # decoding, which comes after the last step, takes its time, too
        video.progress = max(video.progress, min(99, int(100 * done)))

    def _make_room(self) -> None:
        """Removes the oldest finished videos beyond those that are kept."""
        over = sorted((video for video in self.store.videos.values() if video.is_over), key=lambda video: video.number)
        for video in over[: max(0, len(self.store.videos) + 1 - self.settings.keep)]:
            if self._current is None or video not in self._current.videos:
                self.store.remove(video)

    def _count(self) -> None:
        self.metrics.queue.set(len(self.waiting()))
        self.metrics.busy.set(self._current is not None)
        self.metrics.running.set(0 if self._current is None else len(self._current.live()))


def together(settings: Settings, steps: int) -> int:
    """Videos of so many steps that are made at once: as many as give every stage a block to work on."""
    most = settings.engine.blocks.max_blocks_in_flight or steps
    return max(1, -(-(settings.gpus - settings.engine.decode_ranks) // min(steps, most)))


def _kind(video: Video) -> tuple[object, ...]:
    """The properties that videos share which are made together."""
    request = video.request
    return request.width, request.height, request.num_frames, request.steps, request.guidance_scale, request.image


def block_paths(store: Store, video: Video) -> list[Any]:
    """The segments of a video in order. Raises OSError."""
    found = segments_in(store.blocks(video))
    return [found[block] for block in sorted(found) if block < len(video.blocks)]
