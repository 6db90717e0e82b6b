"""Parts of the picture's rows: each is decoded by decoders of its own, on a thread of this process or another rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from dualparal.config.video import OutputType
from dualparal.decoding.chunks import NonFiniteError
from dualparal.decoding.frames import to_output, to_uint8
from dualparal.decoding.worker import Worker
from dualparal.models.base import Decoder
from dualparal.trace.timeline import Track


class Part(Protocol):
    """One part of the rows, as who hands out blocks sees it. Methods return at once; work is done in their order."""

    @property
    def history(self) -> int:
        """Latent frames before a block that its decoding sees."""
        ...

    def decode(self, video: int, block: int, latents: torch.Tensor) -> Future[Any]:
        """The rows of a block's frames, as ``PartDecoder.decode`` makes them.

        Args:
            video, block: of the latents.
            latents: [1, C, f, h, w], all rows, on the device of stage 0.
        """
        ...

    def push(self, video: int, latents: torch.Tensor) -> Future[None]:
        """Decodes latents [1, C, f, h, w] whose frames nobody wants: later ones see them."""
        ...

    def warm_up(self, latents: torch.Tensor) -> Future[None]:
        """Decodes latents [1, C, f, h, w] of a video of their own, and forgets them."""
        ...

    def decoding(self) -> float:
        """Seconds that decoding has taken from the device of stage 0 so far."""
        ...

    def close(self, failed: bool = False) -> None:
        """Ends it, and waits until it is done with what it was given.

        Args:
            failed: something has, and this part may wait for that for ever: it ends with the process at the latest.
        """
        ...


class PartDecoder:
    """The decoders of all videos for one part of the rows.

    Args:
        decoders: one for each video.
        output_type: of the frames; "pil" pictures are made of whole frames, from bytes.
        device: the decoders'.
        name: for error messages.
        allow_nonfinite: frames with NaN are given out.
        stream: the one on which all of this is done, on a card; None: one of its own.
        track: rows of a timeline; None: nobody wants one.
    """

    def __init__(
        self,
        decoders: Sequence[Decoder],
        output_type: OutputType,
        device: torch.device,
        name: str = "the decoder",
        allow_nonfinite: bool = False,
        stream: torch.cuda.Stream | None = None,
        track: Track | None = None,
    ) -> None:
        self.name, self.track, self.allow_nonfinite = name, track, allow_nonfinite
        self.kind = "uint8" if output_type == "pil" else output_type
        self.stream = torch.cuda.Stream(device) if stream is None and device.type == "cuda" else stream
        self._decoders = decoders
        self._decoded = 0.0  # seconds, of blocks that are done
        self._since: float | None = None

    @property
    def history(self) -> int:
        """Latent frames before a block that its decoding sees."""
        return self._decoders[0].history

    def decode(self, ready: torch.cuda.Event | None, video: int, block: int, latents: torch.Tensor) -> Any:
        """Decodes the next block of a video.

            Args:
                ready: the event after which latents are there; None: they are.
                video, block: of the latents.
                latents: [1, C, f, h, w], all rows.

            Returns:
                The part's rows of the frames: "uint8" bytes and "np" float32 [F, rows, W, 3], "pt" [F, 3, rows, W].

            Raises:
        NonFiniteError: NaN in the frames, unless such are given out.
        """
        begin = self._since = time.perf_counter()
        with self._beside(ready):
            frames = self._frames(video, block, latents)
        end = time.perf_counter()
        self._since, self._decoded = None, self._decoded + end - begin
        if self.track is not None:
            self.track.decode(video, block, begin, end)
        return frames

    def push(self, ready: torch.cuda.Event | None, video: int, latents: torch.Tensor) -> None:
        """Decodes latents of a video whose frames nobody wants; arguments as in ``decode``."""
        with self._beside(ready):
            self._decoders[video].push(latents)

    def warm_up(self, ready: torch.cuda.Event | None, latents: torch.Tensor) -> None:
        """Decodes latents of a video of their own; arguments as in ``decode``."""
        with self._beside(ready):
            self._frames(0, 0, latents)
            self._decoders[0].reset()

    def decoding(self) -> float:
        """Seconds that it has spent decoding blocks so far."""
        since = self._since
        return self._decoded + (0.0 if since is None else time.perf_counter() - since)

    def _frames(self, video: int, block: int, latents: torch.Tensor) -> Any:
        made = self._decoders[video].push(latents)
        if not self.allow_nonfinite and not torch.isfinite(made).all():
            raise NonFiniteError(f"the frames of block {block} hold NaN, first in {self.name}; it is not given out")
        assert self.kind != "latent" and self.kind != "pil"
        return to_uint8(made) if self.kind == "uint8" else to_output(made, self.kind)

    @contextmanager
    def _beside(self, ready: torch.cuda.Event | None) -> Iterator[None]:
        """The decoders' stream from ``ready`` on; at the end all that it was given is done."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            if ready is not None:
                self.stream.wait_event(ready)
            try:
                yield
            finally:
                self.stream.synchronize()  # who waits for the thread may let go of what it was working on


class LocalPart:
    """A part that a thread of this process decodes.

    Args:
        decoder: its decoders.
        alone: there is no other part, which would wait for its rows.
        on_error: called when they have raised, for others that wait for their rows.
    """

    def __init__(self, decoder: PartDecoder, alone: bool, on_error: Callable[[], None] | None = None) -> None:
        self._decoder, self._alone, self._on_error = decoder, alone, on_error
        # Alone it waits for nobody, and is joined when Python ends, however that comes.
        name = "dualparal-decode"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name) if alone else Worker(name)

    @property
    def history(self) -> int:
        return self._decoder.history

    def decode(self, video: int, block: int, latents: torch.Tensor) -> Future[Any]:
        return self._submit(self._decoder.decode, video, block, latents)

    def push(self, video: int, latents: torch.Tensor) -> Future[None]:
        return self._submit(self._decoder.push, video, latents)

    def warm_up(self, latents: torch.Tensor) -> Future[None]:
        return self._submit(self._decoder.warm_up, latents)

    def decoding(self) -> float:
        return self._decoder.decoding()

    def close(self, failed: bool = False) -> None:
        # Of several parts the others have begun what is still to be done here, and wait for its rows.
        self._pool.shutdown(wait=self._alone or not failed, cancel_futures=self._alone)

    def _submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Calls a function on the thread, with an event behind all that the current stream has been given so far."""
        ready = None
        if self._decoder.stream is not None:
            ready = torch.cuda.Event()
            ready.record()
        return self._pool.submit(self._call, function, ready, *args)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except BaseException:
            if self._on_error is not None:
                self._on_error()
            raise


def join_rows(parts: Sequence[Any]) -> Any:
    """Whole frames of the rows of all parts, the topmost first: arrays [F, rows, W, 3] or tensors [F, 3, rows, W]."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts), dim=2)
    return np.concatenate(parts, axis=1)
