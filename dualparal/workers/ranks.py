"""The ranks of an engine as its parent has them: started under the supervisor, spoken to, and ended."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dualparal.distributed.private import caller, listen
from dualparal.launch.blame import Failure
from dualparal.launch.exit_codes import BAD_INPUT
from dualparal.launch.folder import run_folder, swept
from dualparal.launch.supervisor import Kept, Result, Supervisor
from dualparal.workers.line import Line, Message
from dualparal.workers.rank import ADDRESS

# The program of a rank. "python -m" would let modules in the current folder, perhaps a model's, stand in for ours.
_PROGRAM = "import sys; sys.path[:1] = filter(None, sys.path[:1]); from dualparal.workers.rank import main; main()"
_POLL_SECONDS = 0.1
_QUIT_SECONDS = 20.0  # in which ranks that were told to leave have left
_CLOSED = "this engine is closed: its ranks are gone; make another one"


class RankFailed(RuntimeError):
    """A rank has failed, and all of them are gone. The text is what the command would print.

    Attributes:
        failure: which rank, where, and why: the fields that the command writes into ``error.json``.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Ranks:
    """Rank processes that wait for requests. Made in any thread; the supervisor has one of its own.

    Args:
        count: their number.
        hello: the first message to each, see ``workers.rank``.
        kept: asked when a rank fails, see ``launch.supervisor.supervise``.

    Attributes:
        ready: the answer of rank 0 to ``hello``.
        all: their numbers.

    Raises:
        ValueError: the ranks refuse ``hello``.
        RankFailed: one of them failed.
        OSError: they cannot be started.
    """

    def __init__(self, count: int, hello: Mapping[str, Any], kept: Callable[[], Kept]) -> None:
        self.ready: dict[str, Any] = {}
        self.all = range(count)
        self._answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._inboxes: list[queue.SimpleQueue[Message | None]] = [queue.SimpleQueue() for _ in range(count)]
        self._lines: dict[int, Line] = {}
        self._listeners: list[threading.Thread] = []
        self._result: Result | OSError | None = None
        self._closed = False
        self._owner = os.getpid()
        try:
            with run_folder() as folder, swept(folder), listen(folder, count) as (server, path):
                # Code that CUDA loads at its first use makes the host wait for the device, in the middle of a run.
                loading = os.environ.get("CUDA_MODULE_LOADING", "EAGER")
                env = {ADDRESS: path, "OMP_NUM_THREADS": str(hello["threads"]), "CUDA_MODULE_LOADING": loading}
                self._supervisor = Supervisor([sys.executable, "-c", _PROGRAM], count, env=env, kept=kept)
                self._thread = threading.Thread(target=self._supervise, name="dualparal-supervisor", daemon=True)
                self._thread.start()
                self._accept(server, count)
            self.tell_all(hello)
            answers = [self.receive(rank) for rank in self.all]
            self.ready = answers[0][0]
        except BaseException:
            self.close()
            raise

    def _supervise(self) -> None:
        try:
            self._result = self._supervisor.run()
        except OSError as error:
            self._result = error

    def _accept(self, server: socket.socket, count: int) -> None:
        """Takes the calls of all ranks, until one has failed."""
        server.settimeout(_POLL_SECONDS)
        while len(self._lines) < count:
            if not self._thread.is_alive():
                raise self.failed()
            try:
                link, _ = server.accept()
            except TimeoutError:
                continue
            link.setblocking(True)
            rank = caller(link, range(count))
            if rank is None or rank in self._lines:
                link.close()
                continue
            self._lines[rank] = Line(link)
            self._listeners.append(
                threading.Thread(target=self._listen, args=(rank,), name=f"dualparal-line-{rank}", daemon=True)
            )
            self._listeners[-1].start()

    def _listen(self, rank: int) -> None:
        line, inbox = self._lines[rank], self._inboxes[rank]
        while (message := line.receive()) is not None:
            (self._answers if message[0]["kind"] == "prompt" else inbox).put(message)
        inbox.put(None)
        if rank == 0:
            self._answers.put(None)

    def tell(self, rank: int, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Sends a message to a rank. Signal-safe. Raises as ``failed`` says when it is gone."""
        if self._closed:
            raise RuntimeError(_CLOSED)
        try:
            self._lines[rank].send(fields, tensors)
        except OSError:
            raise self.failed() from None

    def tell_all(self, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Sends a message to every rank. Raises as ``tell`` does."""
        for rank in self.all:
            self.tell(rank, fields, tensors)

    def receive(self, rank: int) -> Message:
        """Waits for the next message of a rank. Raises as ``failed`` says when it is gone."""
        message = self._inboxes[rank].get()
        if message is None:
            self._inboxes[rank].put(None)  # for whoever asks again
            raise self.failed()
        return message

    def answer(self, number: int) -> dict[str, Any]:
        """Waits for rank 0's answer to the change of a prompt of this number. Raises as ``failed`` says."""
        while (message := self._answers.get()) is not None:
            if message[0]["id"] == number:  # else of one that was not waited for to the end
                return message[0]
        self._answers.put(None)
        raise self.failed()

    def failed(self) -> Exception:
        """The error to raise when a rank does not answer any more; waits until all are gone."""
        if self._closed:
            return RuntimeError(_CLOSED)
        self._thread.join()
        if isinstance(self._result, OSError):
            return self._result
        failure = None if self._result is None else self._result.failure
        if failure is None:
            return RuntimeError("the ranks have ended before their work was done")
        if failure.exit_code == BAD_INPUT and not self.ready:
            return ValueError(failure.cause)
        return RankFailed(failure)

    def kill(self) -> None:
        """Ends the ranks without asking them; ``close`` returns when they are gone."""
        self._supervisor.interrupt()  # the first asks, the second ends
        self._supervisor.interrupt()

    def close(self) -> None:
        """Ends the ranks, also in the middle of a run, and returns when all are gone.

        In a fork of the process that started them it does nothing: they are that one's.
        """
        if os.getpid() != self._owner:
            return
        if self.ready:
            for line in self._lines.values():
                with contextlib.suppress(OSError):
                    line.send({"kind": "quit"})
            self._thread.join(_QUIT_SECONDS)
        self._closed = True
        if self._thread.is_alive():
            self.kill()
            self._thread.join()
        for line in self._lines.values():
            line.end()
        for thread in self._listeners:
            thread.join()
        for line in self._lines.values():
            line.close()
