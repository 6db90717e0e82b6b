"""A thread that calls functions in their order, and never keeps a process from ending."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Worker:
    """One thread with the methods of an executor that are used here.

    An executor's threads are joined when Python ends. One of these may wait for another rank, which waits for this
    process to end.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Calls a function after those that were submitted before."""
        future: Future[Any] = Future()
        self._calls.put((future, function, args))
        return future

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Ends the thread after what was submitted.

        Args:
            wait: until it has ended.
            cancel_futures: all that has not begun is dropped.
        """
        while cancel_futures and not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                call[0].cancel()
        self._calls.put(None)
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, args = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function(*args)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, function, args, call  # what they hold is not kept until the next one
