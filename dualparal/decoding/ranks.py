"""Parts of the picture's rows that other ranks decode: the leading rank's side of them, and theirs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from dualparal.decoding.chunks import NonFiniteError
from dualparal.decoding.parts import PartDecoder
from dualparal.decoding.worker import Worker
from dualparal.distributed.messages import PeerLost, TransportError
from dualparal.distributed.parcels import Parcel, ParcelLink, Sign, to_bytes, to_text
from dualparal.schedule.actions import Action

Report = Callable[..., None]


class RankPart:
    """A part that another rank decodes (``serve``). Frames come as arrays or, for "pt", as tensors on ``device``.

    A thread sends and another one receives: a rank has the next block before it has given back the last.

    Args:
        link: to that rank.
        device: of stage 0.
        as_tensor: frames are wanted as tensors.
    """

    def __init__(self, link: ParcelLink, device: torch.device, as_tensor: bool) -> None:
        self._link, self._device, self._as_tensor = link, device, as_tensor
        self._sender, self._receiver = Worker("dualparal-to-decoder"), Worker("dualparal-from-decoder")
        self._history: int | None = None
        self._stopped = False

    @property
    def history(self) -> int:
        if self._history is None:
            self._history = self._link.receive().block  # the first thing that it says, once its decoder is loaded
        return self._history

    def decode(self, video: int, block: int, latents: torch.Tensor) -> Future[Any]:
        return self._ask(Sign.DECODE, video, block, latents)

    def push(self, video: int, latents: torch.Tensor) -> Future[None]:
        return self._ask(Sign.PUSH, video, 0, latents)

    def warm_up(self, latents: torch.Tensor) -> Future[None]:
        return self._ask(Sign.WARM_UP, 0, 0, latents)

    def decoding(self) -> float:
        return 0.0  # on another device

    def close(self, failed: bool = False) -> None:
        if self._stopped:
            return
        if failed:  # the rank learns it when this process ends
            self._sender.shutdown(wait=False)
            self._receiver.shutdown(wait=False)
            return
        self._stopped = True
        _ = self.history
        stopping = self._sender.submit(self._link.send, Sign.STOP)
        self._sender.shutdown()
        self._receiver.shutdown()  # the rank gives back all that it was sent
        stopping.result()
        self._link.finish()

    def _ask(self, sign: Sign, video: int, block: int, latents: torch.Tensor) -> Future[Any]:
        _ = self.history
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        sent = self._sender.submit(self._send, ready, sign, video, block, latents)
        return self._receiver.submit(self._answer, sent, video, block)

    def _send(self, ready: torch.cuda.Event | None, sign: Sign, video: int, block: int, latents: torch.Tensor) -> None:
        if ready is not None:
            ready.synchronize()
        self._link.send(sign, video, block, latents)

    def _answer(self, sent: Future[None], video: int, block: int) -> Any:
        """Waits for what a rank has made. Raises NonFiniteError, PeerLost, TransportError."""
        sent.result()
        found = self._link.receive()
        if found.sign is Sign.NONFINITE:
            raise NonFiniteError(to_text(found.tensor))
        if found.sign is Sign.FAILED:
            raise PeerLost(f"{self._link.name}: it failed: {to_text(found.tensor)}")
        if found.sign is not Sign.DONE or (found.video, found.block) != (video, block):
            raise TransportError(f"{self._link.name}: {found.sign.name} of block {found.block}, not of {block}")
        return found.tensor.to(self._device) if self._as_tensor else found.tensor.numpy()


class Service(threading.Thread):
    """``serve`` on a thread, beside this rank's stage if it has one.

    Args:
        link, part, actions, report: as in ``serve``.
        on_error: called with what it has raised.

    Attributes:
        error: what it has raised.
    """

    def __init__(
        self,
        link: ParcelLink,
        part: PartDecoder,
        actions: Iterator[Action],
        report: Report | None,
        on_error: Callable[[BaseException], None],
    ) -> None:
        # Nobody can wake a thread out of gloo: after an error it ends with the process.
        super().__init__(name="dualparal-decode", daemon=True)
        self._link, self.part, self._actions, self._report, self._on_error = link, part, actions, report, on_error
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            serve(self._link, self.part, self._actions, self._report)
        except BaseException as error:
            self.error = error
            self._on_error(error)

    def finish(self) -> None:
        """Waits until the leading rank has said STOP. Raises what ``serve`` has raised."""
        self.join()
        if self.error is not None:
            raise self.error


def serve(link: ParcelLink, part: PartDecoder, actions: Iterator[Action], report: Report | None = None) -> None:
    """Decodes what the leading rank sends, in the order of the schedule, until it says STOP.

    Args:
        link: to the leading rank.
        part: the decoders of this rank.
        actions: its DECODE actions.
        report: called with ("wait_latents",) and ("decode", block=); None: nobody listens.

    Raises:
        PeerLost: the leading rank is gone.
        TransportError: it sends another block than the schedule says.
        Exception: what decoding has raised; the leading rank has been told. NaN is told only.
    """
    tell = report or (lambda phase, **where: None)
    link.send(Sign.DONE, block=part.history)
    while True:
        tell("wait_latents")
        wanted = link.receive()
        if wanted.sign is Sign.STOP:
            link.finish()
            return
        if wanted.sign is Sign.DECODE:
            unit = next(actions).unit
            if (unit.video, unit.block) != (wanted.video, wanted.block):
                raise TransportError(f"{link.name}: block {wanted.block} arrives, and the schedule says {unit.block}")
        tell("decode", block=wanted.block)
        try:
            made = _make(part, wanted)
        except NonFiniteError as error:
            link.send(Sign.NONFINITE, wanted.video, wanted.block, to_bytes(str(error)))
        except Exception as error:
            with contextlib.suppress(PeerLost):  # what it raised says more
                link.send(Sign.FAILED, wanted.video, wanted.block, to_bytes(f"{type(error).__name__}: {error}"))
                link.finish()
            raise
        else:
            link.send(Sign.DONE, wanted.video, wanted.block, made)


def _make(part: PartDecoder, wanted: Parcel) -> torch.Tensor | None:
    if wanted.sign is Sign.DECODE:
        made = part.decode(None, wanted.video, wanted.block, wanted.tensor)
        return torch.from_numpy(made) if isinstance(made, np.ndarray) else made
    if wanted.sign is Sign.PUSH:
        part.push(None, wanted.video, wanted.tensor)
    else:
        part.warm_up(None, wanted.tensor)
    return None
