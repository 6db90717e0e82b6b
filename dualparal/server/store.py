"""Videos on disk: a folder for each with a JSON record that is replaced whole, its blocks and the finished file.

Names of folders are ids that were made here; what a client calls an id is only ever looked up among these.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dualparal.io.files import make_folder, whole_file
from dualparal.io.locks import Locks
from dualparal.server.requests import VideoRequest

logger = logging.getLogger("dualparal")

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
_ID = re.compile(r"video_[0-9a-f]{24}")
_RECORD, _FILE, _BLOCKS, _REFERENCE = "video.json", "video.mp4", "blocks", "reference"
_RUN = re.compile(r"[0-9a-f]{16}")
_MOST_TOGETHER = 4096  # videos of a run


@dataclass
class Video:
    """A video and how far it is. Changed under the lock of ``jobs`` alone.

    Attributes:
        id: generated, and the name of its folder.
        request: what was asked for.
        fps: frames per second.
        number: in the order in which they came.
        created_at, started_at, completed_at: seconds since 1970; completed_at: of any end.
        status: as OpenAI's API has them; one that was cancelled has failed with the code "cancelled".
        progress: 0 to 100.
        error: code and message of a failed one.
        prompts: [first block, text] of every prompt.
        changed: the last text that somebody gave while it was made; None: nobody did.
        blocks: [first frame, frames] of the blocks that are finished.
        run, place: of the run that makes it, and its index among the videos of that.
        failures: of ranks, that it has lived through.
        deleted: gone for clients; its folder goes when nobody writes there.
    """

    id: str
    request: VideoRequest
    fps: int
    number: int
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    status: str = QUEUED
    progress: int = 0
    error: dict[str, str] | None = None
    prompts: list[tuple[int, str]] = field(default_factory=list)
    changed: str | None = None
    blocks: list[tuple[int, int]] = field(default_factory=list)
    run: str | None = None
    place: int = 0
    failures: int = 0
    deleted: bool = False

    @property
    def is_over(self) -> bool:
        """True when nothing more will happen to it."""
        return self.status in (COMPLETED, FAILED)


class Store:
    """The folder of a server. One process at a time has it.

    Args:
        folder: made where it is missing, for its owner alone.

    Raises:
        OSError: it cannot be made or read.
        OutputError: another server has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder.absolute(), 0o700)
        self._locks = Locks()
        self._locks.hold(folder.absolute() / "server", "--out-dir")
        for name in ("videos", "runs"):
            make_folder(folder / name, 0o700)
        self.videos: dict[str, Video] = {}
        for path in sorted((folder / "videos").iterdir()):
            if (video := self._read(path)) is not None:
                self.videos[video.id] = video

    def close(self) -> None:
        """Gives the folder back."""
        self._locks.release()

    def _read(self, folder: Path) -> Video | None:
        """The video of a folder; None: it is none of ours, or was deleted, or nobody was told of it yet."""
        if not _ID.fullmatch(folder.name):
            return None
        if not (folder / _RECORD).exists():  # the process ended while it made or removed it
            shutil.rmtree(folder, ignore_errors=True)
            return None
        try:
            found = json.loads((folder / _RECORD).read_bytes())
            video = Video(**{**found, "request": VideoRequest(**found["request"])})
            _check(video, folder.name)
        except (OSError, ValueError, TypeError, LookupError) as error:
            logger.warning("%s is left out of the list: %s", folder, type(error).__name__)
            return None
        if video.deleted:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        video.blocks = [(start, count) for start, count in video.blocks]
        video.prompts = [(block, text) for block, text in video.prompts]
        scenes = tuple((block, text) for block, text in video.request.scenes)
        video.request = replace(video.request, scenes=scenes)
        return video

    def add(self, request: VideoRequest, fps: int, image: bytes | None = None) -> Video:
        """Makes a new video and its folder, with the image that it begins with. Raises OSError."""
        number = 1 + max((video.number for video in self.videos.values()), default=0)
        prompts = [(0, request.prompt), *request.scenes]
        video = Video(f"video_{secrets.token_hex(12)}", request, fps, number, time.time(), prompts=prompts)
        make_folder(self.path(video), 0o700)
        if image is not None:
            with whole_file(self.reference(video), mode=0o600) as file:
                file.write(image)
        self.save(video)
        self.videos[video.id] = video
        return video

    def save(self, video: Video) -> None:
        """Writes a record, whole or not at all. Raises OSError."""
        with whole_file(self.path(video) / _RECORD, mode=0o600) as file:
            file.write(json.dumps(asdict(video)).encode())

    def remove(self, video: Video) -> None:
        """Removes a video and all that is its own."""
        self.forget(video)
        self.erase(video)

    def forget(self, video: Video) -> None:
        """Takes a video off the list."""
        self.videos.pop(video.id, None)

    def erase(self, video: Video) -> None:
        """Removes all that is a video's own."""
        shutil.rmtree(self.path(video), ignore_errors=True)

    def path(self, video: Video) -> Path:
        """The folder of a video."""
        return self.folder / "videos" / video.id

    def blocks(self, video: Video) -> Path:
        """The folder of its segments."""
        return self.path(video) / _BLOCKS

    def file(self, video: Video) -> Path:
        """The finished file."""
        return self.path(video) / _FILE

    def reference(self, video: Video) -> Path:
        """The image that it begins with."""
        return self.path(video) / _REFERENCE

    def run(self, name: str) -> Path:
        """The folder of a run: snapshots and timeline."""
        return self.folder / "runs" / name


def _check(video: Video, name: str) -> None:
    """Checks a record where a wrong value would lead out of the folder or end the server. Raises ValueError."""
    numbers = (video.number, video.place, video.failures, video.fps, video.request.num_frames, video.request.steps)
    known = video.status in (QUEUED, RUNNING, COMPLETED, FAILED) and isinstance(video.request.prompt, str)
    run = video.run is None or (isinstance(video.run, str) and _RUN.fullmatch(video.run))
    whole = all(isinstance(number, int) and number >= 0 for number in numbers)
    if video.id != name or not (known and run and whole and video.prompts and video.place < _MOST_TOGETHER):
        raise ValueError("this is no record of a video")


def as_openai(video: Video, model: str) -> dict[str, Any]:
    """A video as OpenAI's API tells of it, and what ours adds."""
    request = video.request
    return {
        "id": video.id,
        "object": "video",
        "model": model,
        "status": video.status,
        "progress": video.progress,
        "created_at": int(video.created_at),
        "completed_at": None if video.completed_at is None else int(video.completed_at),
        "expires_at": None,
        "size": f"{request.width}x{request.height}",
        "seconds": request.seconds,
        "prompt": request.prompt,
        "remixed_from_video_id": None,
        "error": video.error,
        "fps": video.fps,
        "num_frames": request.num_frames,
        "steps": request.steps,
        "seed": request.seed,
        "prompts": [{"block": block, "prompt": text} for block, text in video.prompts],
        "blocks": [{"start_frame": start, "frames": count} for start, count in video.blocks],
    }
