"""A backend of torch.distributed that holds the device as NCCL does, over gloo, on the CPU.

A transfer that was launched is work of the device until its other end is launched too, and each communicator does one
after the other. ``drain`` waits for all of it, as a capture, code that is loaded or memory that is given back would.
"""

from __future__ import annotations

import queue
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NAME = "virtual"


class Hang(RuntimeError):
    """The device was drained, and does not come back."""


class Device:
    """All that this process has launched.

    Attributes:
        busy: transfers that are under way.
        launched: transfers so far.
        drains: calls of ``drain``.
        free: the longest time in which no transfer held the device, in seconds.
    """

    def __init__(self) -> None:
        self.busy: set[_Work] = set()
        self.launched = self.drains = 0
        self.free, self._free_since = 0.0, time.monotonic()
        self._lock = threading.Lock()

    def launch(self, work: _Work) -> None:
        with self._lock:
            if not self.busy:
                self.free = max(self.free, time.monotonic() - self._free_since)
            self.busy.add(work)
            self.launched += 1

    def done(self, work: _Work) -> None:
        with self._lock:
            self.busy.remove(work)
            self._free_since = time.monotonic()

    def drain(self, seconds: float) -> None:
        """Waits for everything launched so far. Raises Hang."""
        with self._lock:
            before = list(self.busy)
            self.drains += 1
        for work in before:
            if not work.finished.wait(seconds):
                raise Hang(f"the device waits for {work.what}")


DEVICE = Device()


class _Work(dist.Work):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.finished = threading.Event()

    def wait(self, timeout: timedelta = timedelta(seconds=60)) -> bool:
        if not self.finished.wait(timeout.total_seconds()):
            raise RuntimeError(f"{self.what} did not end")
        return True

    def is_completed(self) -> bool:
        return self.finished.is_set()


class VirtualNccl(dist.ProcessGroup):
    """One communicator: a virtual stream, on a thread that does its transfers in order."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._stream: queue.SimpleQueue[tuple[_Work, torch.Tensor, int, bool]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def getBackendName(self) -> str:
        return NAME

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> _Work:
        return self._launch(tensors[0], peer, True)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> _Work:
        return self._launch(tensors[0], peer, False)

    def _launch(self, tensor: torch.Tensor, peer: int, sends: bool) -> _Work:
        work = _Work(f"a {'send to' if sends else 'receive from'} the other end that was posted")
        DEVICE.launch(work)
        self._stream.put((work, tensor, peer, sends))
        return work

    def _run(self) -> None:
        token = torch.zeros(1)
        while True:
            work, tensor, peer, sends = self._stream.get()
            # A send ends when the receive is launched, not when its bytes have left.
            for what, outwards in ((token, not sends), (tensor, sends)):
                if outwards:
                    self._gloo.send([what], peer, 0).wait()
                else:
                    self._gloo.recv([what], peer, 0).wait()
            DEVICE.done(work)
            work.finished.set()


def register() -> None:
    """Makes it known to torch under its name."""
    dist.Backend.register_backend(NAME, VirtualNccl, devices=["cpu"])
