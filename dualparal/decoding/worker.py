"""A thread that calls functions in their order, and does not keep a process from ending for long."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_LAST_SECONDS = 5.0  # that Python waits at its end for what a thread has in its hands

Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Worker:
    """One thread with the methods of an executor that are used here.

    An executor's threads are joined when Python ends. One of these may wait for another rank, which waits for this
    process to end; so it is waited for a little only.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        _workers.add(self)

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

    def leave(self) -> None:
        """Ends the thread when Python ends: one that is amid native code then would abort the process."""
        self.shutdown(wait=False, cancel_futures=True)
        self._thread.join(_LAST_SECONDS)

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


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    for worker in list(_workers):
        worker.leave()
