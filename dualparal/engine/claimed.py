"""An iterator that has an engine to itself, from the moment it was asked for until it has ended."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from dualparal.decoding.chunks import Chunk


class Claimed(Iterator[Chunk]):
    """The chunks of a generator; the engine is free again when they have ended, or nobody has this object any more.

    A generator that was never begun would not notice that it is dropped.

    Args:
        chunks: not begun.
        claim: acquired; released once.
    """

    def __init__(self, chunks: Generator[Chunk, None, None], claim: threading.Lock) -> None:
        self._chunks = chunks
        self._claim: threading.Lock | None = claim
        self._reading = threading.Lock()

    def __next__(self) -> Chunk:
        with self._alone():
            try:
                return next(self._chunks)
            except BaseException:  # the end, too
                self._release()
                raise

    def close(self) -> None:
        """Ends the run. Raises what ending it has raised, or RuntimeError while another thread waits for a chunk."""
        with self._alone():
            try:
                self._chunks.close()
            finally:
                self._release()

    def __del__(self) -> None:
        self.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._reading.acquire(blocking=False):
            raise RuntimeError("another thread waits for this stream's next chunk: one thread reads a stream")
        try:
            yield
        finally:
            self._reading.release()

    def _release(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()
