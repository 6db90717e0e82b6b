"""Work of the host that is done when the device has got to a point, without the main thread waiting for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch


def event_on(device: torch.device) -> Any:
    """An event behind all that the current stream has been given; None where the host itself has done it."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


class AfterDevice:
    """Calls functions in order, each once its event has happened: on a thread, which it needs from the first event on.

    Args:
        name: of the thread.
        device: current there.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._name, self._device = name, device
        self._tasks: queue.SimpleQueue[tuple[Any, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def call(self, event: Any, function: Callable[[], None]) -> None:
        """Calls the function when all before it have been called and the event has happened; None: at once.

        Raises what an earlier one has raised.
        """
        if self._error is not None:
            raise self._error
        if event is not None and self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"dualparal {self._name}", daemon=True)
            self._thread.start()
        if self._thread is None:
            function()
        else:
            self._tasks.put((event, function))

    def finish(self) -> None:
        """Waits for all of them. Raises what they have raised."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while (task := self._tasks.get()) is not None:
                event, function = task
                if event is not None:
                    event.synchronize()
                function()
        except BaseException as error:
            self._error = error
