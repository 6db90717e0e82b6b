"""The files that the chunks of a job go to, and the order in which everything is closed at the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from dualparal.checkpoint.snapshot import clear, read_blocks
from dualparal.cli.job import Job
from dualparal.decoding.chunks import Chunk
from dualparal.io.latents import write_latents
from dualparal.io.output import open_output

if TYPE_CHECKING:
    from dualparal.io.output import PictureOutput, VideoOutput

logger = logging.getLogger("dualparal")


class Results:
    """The files of a job, on the rank that leads. The first chunk of a resumed job opens them."""

    def __init__(self, job: Job) -> None:
        """Opens the outputs of a job that begins. Raises OutputError, OSError."""
        self._job = job
        self._latents: list[list[torch.Tensor]] = [[] for _ in job.prompts]
        self._outputs: list[VideoOutput | PictureOutput] = []
        if not job.resume:
            self._outputs = [open_output(out, job.fps) for out in job.outs]

    def take(self, chunk: Chunk) -> None:
        """Writes a block's frames, and keeps its latents if they are wanted. Raises OSError."""
        job = self._job
        if not self._outputs:  # resumed
            self._outputs = [open_output(out, job.fps, chunk.block, chunk.start_frame) for out in job.outs]
        if self._outputs:
            self._outputs[chunk.video].write(chunk.block, chunk.frames)
        if job.latents_out is not None:
            parts = self._latents[chunk.video]
            if job.resume and not parts and job.checkpoint is not None and chunk.block > 0:
                parts += read_blocks(job.checkpoint, chunk.video, range(chunk.block))  # an earlier run finished them
            parts.append(chunk.latents.cpu())

    @property
    def written(self) -> bool:
        """True when the blocks that were taken are on disk."""
        return bool(self._outputs)

    def close(self, complete: bool) -> list[str]:
        """Joins what was written, and removes what nobody will go on with. Raises OSError.

        Args:
            complete: the video has come to its end; a run that was stopped keeps what ``--resume`` needs.

        Returns:
            The names of what is there now.
        """
        job = self._job
        finished = job.checkpoint is None or complete
        for output in self._outputs:
            output.close()
        if finished and not job.keep_blocks:
            for output in self._outputs:
                output.remove_blocks()
        names = [str(out) for out in job.outs]
        if finished and job.latents_out is not None and all(self._latents):
            whole = [torch.cat(parts, dim=2) for parts in self._latents]
            shortest = min(part.shape[2] for part in whole)  # after an interruption they are not all as long
            write_latents(job.latents_out, torch.cat([part[:, :, :shortest] for part in whole]))
            names.append(str(job.latents_out))
        if complete and job.checkpoint is not None:
            clear(job.checkpoint)
        return names

    def close_after_failure(self) -> None:
        """Joins what is finished. Errors become warnings: a failure must not be hidden by another one."""
        for output in self._outputs:
            try:
                output.close()
            except (OSError, ValueError) as error:
                logger.warning("%s: finished blocks were not joined: %s", output.path, error)
