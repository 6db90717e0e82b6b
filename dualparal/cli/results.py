"""The files that the chunks of a job go to, and the order in which everything is closed at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dualparal.checkpoint import snapshot
from dualparal.cli.job import Job
from dualparal.decoding.chunks import Chunk
from dualparal.decoding.worker import Worker
from dualparal.io.latents import write_latents
from dualparal.io.output import OutputError, open_output, remove_blocks
from dualparal.io.receipts import Receipt

if TYPE_CHECKING:
    from dualparal.io.output import Output

logger = logging.getLogger("dualparal")

DecodeAgain = Callable[[Path, Sequence[int], int], Iterator[tuple[int, Any]]]  # as ``Engine.decode_again``


class Results:
    """The files of a job, on the rank that leads. Blocks are written beside the run, one at a time.

    With a checkpoint every instant of the end can be gone on from. It comes in this order: a snapshot says that all
    blocks are finished (the engine's); segments that are missing, latents and videos are made; a snapshot says that
    they are; latents of blocks go, then segments, then that snapshot.
    """

    def __init__(self, job: Job) -> None:
        """Opens the outputs. Raises OutputError, ValueError, OSError."""
        self._job = job
        self._latents: list[list[torch.Tensor]] = [[] for _ in job.prompts]  # without a checkpoint, which has them
        self._receipts = [dict(each) for each in job.receipts or [{} for _ in job.prompts]]
        self._writer = Worker("dualparal-writer")
        self._writing: Future[None] | None = None
        known = self._receipts if job.resume else [None for _ in job.prompts]
        self._outputs: list[Output] = [
            open_output(out, job.fps, receipts) for out, receipts in zip(job.outs, known, strict=bool(job.outs))
        ]
        for output in self._outputs:
            if output.missing:
                logger.warning(
                    "%s: what blocks %s became is missing or was changed; made again from their latents at the end",
                    output.path,
                    output.missing,
                )

    def take(self, chunk: Chunk, tell: Callable[[], None]) -> None:
        """Has a block's frames written, once those of the one before are, and keeps its latents if they are wanted.

        Args:
            tell: called when they are on disk, by the thread that writes.

        Raises:
            OSError, ValueError: the one before could not be written.
        """
        self.settle()
        if self._job.latents_out is not None and self._job.checkpoint is None:
            self._latents[chunk.video].append(chunk.latents.cpu())
        self._writing = self._writer.submit(self._write, chunk, tell)

    def _write(self, chunk: Chunk, tell: Callable[[], None]) -> None:
        receipt = Receipt(chunk.latents.shape[2], "")
        if self._outputs:
            receipt = self._outputs[chunk.video].write(chunk.block, chunk.frames)
        self._receipts[chunk.video][chunk.block] = receipt
        tell()

    def settle(self) -> None:
        """Waits until the block that was taken last is on disk. Raises OSError, ValueError: it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def receipts(self, end: int) -> list[list[Receipt]]:
        """The receipts of each video's blocks before ``end``, for a snapshot, which so comes after their frames.

        Raises OSError, ValueError: the last one could not be written.
        """
        self.settle()
        return [[video[block] for block in range(end)] for video in self._receipts]

    @property
    def written(self) -> bool:
        """True when the blocks that were taken are on disk."""
        return bool(self._outputs) and any(self._receipts)

    def close(self, complete: bool, decode_again: DecodeAgain) -> list[str]:
        """Makes what was asked for of the blocks, and removes what nobody will go on with.

        Args:
            complete: the video has come to its end; a run that was stopped keeps what ``--resume`` needs.
            decode_again: makes the frames of finished blocks from their latents.

        Returns:
            The names of what is there now.

        Raises:
            OutputError, OSError: it cannot be made; it can be gone on with.
            SnapshotError: latents that are needed are damaged.
        """
        job, names = self._job, [str(out) for out in self._job.outs]
        self.settle()
        self._writer.shutdown()
        if job.checkpoint is not None and not complete:
            self._join()
            return names
        if job.checkpoint is not None:
            self._make_missing(job.checkpoint, decode_again)
        if job.latents_out is not None and self._write_latents():
            names.append(str(job.latents_out))
        self._join()
        if job.checkpoint is not None:
            _note_end(job.checkpoint)
        self._tidy()
        return names

    def close_after_failure(self, join: bool) -> None:
        """Waits for the last block, and joins what is finished if asked to.

        Errors become warnings: a failure must not be hidden by another one.
        """
        try:
            self.settle()
        except Exception as error:
            logger.warning("the last block was not written: %s", error)
        for output in self._outputs if join else ():
            try:
                output.close()
            except (OSError, ValueError) as error:
                logger.warning("%s: finished blocks were not joined: %s", output.path, error)
        self._writer.shutdown()

    def _make_missing(self, folder: Path, decode_again: DecodeAgain) -> None:
        """Makes the files again that an earlier run has made and that are not there. Raises as ``close``."""
        for video, output in enumerate(self._outputs):
            missing = list(output.missing)
            for block, frames in decode_again(folder, missing, video) if missing else ():
                if output.write(block, frames) != self._receipts[video][block]:
                    logger.warning("block %d was made again with other bits: other versions or another card?", block)

    def _write_latents(self) -> bool:
        """Writes the final latents of all videos, as far as all of them go. False: there are none."""
        job, whole = self._job, []
        assert job.latents_out is not None
        run = "" if job.checkpoint is None else snapshot.newest(job.checkpoint).snapshot.id
        for video, parts in enumerate(self._latents):
            if job.checkpoint is not None:
                first = job.video.skipped_blocks
                blocks = range(first, first + len(self._receipts[video]))
                parts = snapshot.read_blocks(job.checkpoint, run, video, blocks)
            if not parts:
                return False
            whole.append(torch.cat(parts, dim=2))
        shortest = min(part.shape[2] for part in whole)  # after an interruption they are not all as long
        latents = torch.cat([part[:, :, :shortest] for part in whole])
        write_latents(job.latents_out, latents, replace=job.overwrite or not job.resume)
        return True

    def _join(self) -> None:
        for output in self._outputs:
            output.close()

    def _tidy(self) -> None:
        """Removes what nobody will go on with, once everything else is there. Raises OSError."""
        job = self._job
        if job.checkpoint is not None:
            snapshot.close(job.checkpoint, keep=True)
        for output in self._outputs if not job.keep_blocks else ():
            output.remove_blocks()
        if job.checkpoint is not None and not job.restartable:
            snapshot.close(job.checkpoint)


def tidy_again(job: Job) -> list[str]:
    """Does what ``Results.close`` had still to do when it was killed at its very end, or nothing.

    Returns:
        The names of what is there.

    Raises:
        OutputError: a file that was made is gone.
        OSError: a file cannot be removed.
    """
    assert job.checkpoint is not None
    made = [*job.outs, *([] if job.latents_out is None else [job.latents_out])]
    for path in made:
        if not path.exists():
            raise OutputError(f"{job.checkpoint} says that {path} is finished, and it is gone; remove it to start anew")
    snapshot.close(job.checkpoint, keep=True)
    for out in job.outs if not job.keep_blocks else ():
        remove_blocks(out)
    if not job.restartable:
        snapshot.close(job.checkpoint)
    return list(map(str, made))


def _note_end(folder: Path) -> None:
    """Writes the snapshot that says: what was to be made of the blocks is there. Raises OSError."""
    last = snapshot.newest(folder).snapshot
    if last.end != snapshot.JOINED:
        nothing: list[dict[int, torch.Tensor]] = [{} for _ in last.prompts]
        replace(last, iteration=last.iteration + 1, end=snapshot.JOINED, prompts=nothing).write(folder)
