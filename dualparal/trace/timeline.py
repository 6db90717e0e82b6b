"""The timeline of a run: every action with its times, as Chrome's JSON trace format, which ui.perfetto.dev opens.

Every rank appends its spans to a part of its own, a line and a write each, so that memory does not grow and a rank that
is killed leaves what it did; ``merge`` joins the parts to one file. A part can be opened as it is, too. Nothing here
knows tensors or devices: ``clock`` measures, ``picture`` draws.

A process row is a stage; in it lie the rows of ``ROWS``. Times are microseconds on rank 0's monotonic clock.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dualparal.io.files import WholeFile, whole_file
from dualparal.schedule.actions import Action, Op

logger = logging.getLogger("dualparal")

STAGE, HOST, DECODER, CONSUMER = 0, 1, 2, 3
ROWS = {STAGE: "stage", HOST: "host", DECODER: "decode", CONSUMER: "consumer"}
KINDS = {
    Op.RECV: "receive",
    Op.RUN: "compute",
    Op.SEND: "send",
    Op.UPDATE: "update",
    Op.EMIT: "emit",
    Op.DECODE: "queue",  # to the decoder, which has a row of its own
}
_SHORTEST_WAIT = 20e-6  # seconds; to learn that there is nothing to wait for takes some of them
_PART = re.compile(r"rank-(\d+)-of-(\d+)\.json")
_encode = json.JSONEncoder(separators=(",", ":")).encode


class TimelineError(ValueError):
    """A timeline file that cannot be used."""


def parts_of(path: Path) -> Path:
    """The folder in which the ranks write while the run lasts."""
    return path.with_name(path.name + ".parts")


def check_name(path: Path) -> None:
    """Raises TimelineError unless ``path`` can be a .json or .json.gz file."""
    if not path.name.endswith((".json", ".json.gz")):
        raise TimelineError(f"timeline {path}: a trace is a .json or .json.gz file; give it such an ending")
    if os.path.isdir(path):
        raise TimelineError(f"timeline {path} is a folder; give the name of a file")


def prepare(path: Path) -> None:
    """Makes an empty folder for the parts of a new run, and removes an older timeline. Rank 0, before the others write.

    Raises:
        TimelineError: ``path`` is no name for a timeline (``check_name``).
        OSError: the folder cannot be made.
    """
    check_name(path)
    folder = parts_of(path)
    if folder.exists():
        shutil.rmtree(folder)  # of a run that was killed: its parts would be joined to ours
    folder.mkdir(parents=True)
    path.unlink(missing_ok=True)


def ids(stage: int, row: int = STAGE) -> dict[str, int]:
    """The "pid" and "tid" of a row. Perfetto takes a tid for one thread of the whole file, and 0 for the idle one."""
    return {"pid": stage + 1, "tid": 10 * (stage + 1) + row}


def place(event: dict[str, Any]) -> tuple[int, int]:
    """Stage and row of an event: the inverse of ``ids``."""
    stage = event["pid"] - 1
    return stage, event["tid"] - 10 * (stage + 1)


class Recorder:
    """Writer of one rank's part of the timeline at ``path``. Spans may come from any thread.

    Args:
        path: of the timeline; the part lies in ``parts_of(path)``.
        rank, world_size: of the run.
        offset: seconds to add to this rank's ``time.perf_counter`` to have rank 0's.

    Raises:
        OSError: the part cannot be made.
    """

    def __init__(self, path: Path, rank: int = 0, world_size: int = 1, offset: float = 0.0) -> None:
        self.path = path
        self.rank, self.world_size = rank, world_size
        self.offset = offset
        folder = parts_of(path)
        folder.mkdir(parents=True, exist_ok=True)  # on another node than rank 0's
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW
        self._file: int | None = os.open(folder / f"rank-{rank:05d}-of-{world_size:05d}.json", flags, 0o644)
        os.write(self._file, b"[\n")

    def track(self, stage: int, num_stages: int) -> Track:
        """Makes the rows of one stage, or, from number ``num_stages`` on, of one place that only decodes."""
        role = f"stage {stage}" if stage < num_stages else f"decoder {stage - num_stages}"
        name = role + (f" (rank {self.rank})" if self.world_size > 1 else "")
        self._write({"ph": "M", **ids(stage), "name": "process_name", "args": {"name": name}})
        self._write({"ph": "M", **ids(stage), "name": "process_sort_index", "args": {"sort_index": stage}})
        if self.offset:
            self._write({"ph": "M", **ids(stage), "name": "clock_offset", "args": {"seconds": self.offset}})
        return Track(self, stage, num_stages)

    def name_row(self, stage: int, row: int) -> None:
        """Writes the name of a row, one of ``ROWS``."""
        self._write({"ph": "M", **ids(stage, row), "name": "thread_name", "args": {"name": ROWS[row]}})

    def span(
        self, stage: int, row: int, kind: str, name: str, begin: float, end: float, args: dict[str, Any], **more: Any
    ) -> None:
        """Writes a span.

        Args:
            stage, row: the row in which it lies.
            kind: category, such as the values of ``KINDS``.
            name: text on the span.
            begin, end: seconds of this rank's ``time.perf_counter``.
            args: shown when the span is selected.
            more: further keys of the event, such as those of an arrow.
        """
        self._write(
            {
                "ph": "X",
                **ids(stage, row),
                "cat": kind,
                "name": name,
                "ts": round(1e6 * (begin + self.offset), 3),
                "dur": round(1e6 * (end - begin), 3),
                "args": args,
                **more,
            }
        )

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            os.write(self._file, f"{_encode(event)},\n".encode())  # one write: lines of threads do not mix
        except OSError as error:
            logger.warning("the timeline of rank %d ends here: cannot write %s: %s", self.rank, self.path, error)
            self.close()

    def close(self) -> None:
        """Closes the part; later spans are dropped."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Track:
    """The rows of one stage. Messages are numbered in their order, which ties a SEND to its RECV by an arrow."""

    def __init__(self, recorder: Recorder, stage: int, num_stages: int) -> None:
        self.recorder = recorder
        self.stage = stage
        self.num_stages = num_stages
        self._messages = {Op.SEND: 0, Op.RECV: 0}
        self._named: set[int] = set()

    def action(
        self, row: int, action: Action, begin: float, end: float, waited: float = 0.0, error: str | None = None
    ) -> None:
        """Writes an action from begin to end, of which the first ``waited`` seconds were a wait for another rank.

        Args:
            row: one of ``ROWS``.
            action: the action.
            begin, end: seconds of this rank's ``time.perf_counter``.
            waited: seconds.
            error: name of the exception that ended it.
        """
        args: dict[str, Any] = action.unit._asdict()
        more: dict[str, Any] = {}
        if error is not None:
            args["error"] = error
        elif row == STAGE and action.op in self._messages:
            number, self._messages[action.op] = self._messages[action.op], self._messages[action.op] + 1
            edge = self.stage if action.op is Op.SEND else (self.stage - 1) % self.num_stages
            way = "flow_out" if action.op is Op.SEND else "flow_in"
            more = {"bind_id": hex(1 + number * self.num_stages + edge), way: True}
        self._span(row, KINDS[action.op], str(action), begin, end, args, more)
        if waited >= _SHORTEST_WAIT:
            self._span(row, "wait", "wait", begin, begin + waited, {})

    def decode(self, video: int, block: int, begin: float, end: float) -> None:
        """Writes the span in which a block was decoded; begin, end: seconds of ``time.perf_counter``."""
        self._span(DECODER, "decode", f"decode {_block(video, block)}", begin, end, {"block": block, "video": video})

    def consumer(self, video: int, block: int, begin: float, end: float) -> None:
        """Writes the span in which the consumer of the chunks had one, and the host of stage 0 stood still."""
        self._span(
            CONSUMER, "consumer", f"consumer {_block(video, block)}", begin, end, {"block": block, "video": video}
        )

    def _span(
        self, row: int, kind: str, name: str, begin: float, end: float, args: dict[str, Any],
        more: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if row not in self._named:
            self._named.add(row)
            self.recorder.name_row(self.stage, row)
        self.recorder.span(self.stage, row, kind, name, begin, end, args, **(more or {}))


def _block(video: int, block: int) -> str:
    return (f"v{video}" if video else "") + f"b{block}"


def merge(path: Path) -> list[int]:
    """Joins the parts beside ``path`` to one file there and removes them, in little memory.

    Returns:
        The ranks that left no part: on other nodes, unless they share the folder.

    Raises:
        TimelineError: there are no parts.
        OSError: the file cannot be written; the parts stay.
    """
    folder = parts_of(path)
    parts = {part: found for part in sorted(folder.glob("rank-*")) if (found := _PART.fullmatch(part.name))}
    if not parts:
        raise TimelineError(f"timeline {path}: no parts in {folder}")
    with whole_file(path) as file, _writer(path, file) as out:
        out.write('{"displayTimeUnit":"ms","traceEvents":[')
        separator = "\n"
        for part in parts:
            with open(part) as lines:
                for line in lines:
                    if line.endswith("},\n"):  # the first is a bracket, the last may be cut
                        out.write(separator + line[:-2])
                        separator = ",\n"
        out.write("\n]}\n")
    shutil.rmtree(folder)
    world_size = max(int(found[2]) for found in parts.values())
    return sorted(set(range(world_size)) - {int(found[1]) for found in parts.values()})


def _writer(path: Path, file: WholeFile) -> TextIO:
    return gzip.open(file, "wt") if path.suffix == ".gz" else open(file.fileno(), "w", closefd=False)


def merge_left(path: Path) -> None:
    """Joins the parts that a run left at ``path``, if there are any, and says in the log which are missing."""
    if not parts_of(path).is_dir():
        return
    try:
        missing = merge(path)
    except (OSError, TimelineError) as error:
        logger.warning("the timeline is left in parts: %s", error)
        return
    if missing:
        logger.warning(
            "%s: no part of ranks %s; if they ran on other nodes, theirs lie there in %s, and open as they are",
            path,
            missing,
            parts_of(path),
        )


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the events of a merged timeline, one by one.

    Raises:
        TimelineError: not a file that ``merge`` wrote.
    """
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as lines:
        if "traceEvents" not in next(lines, ""):
            raise TimelineError(f"{path} is not a timeline of ours")
        for line in lines:
            if line.startswith("{"):
                yield json.loads(line.rstrip(",\n"))
