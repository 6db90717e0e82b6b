"""A rank that waits for requests of its parent: it keeps its engine, and with it weights, groups and embeddings.

The parent speaks first: ``start``, with the model, the options and the threads, answered by ``ready``. Then

* ``stream`` or ``resume``, to every rank: it checks the request and answers ``checked`` or ``refused``;
* ``go``, to every rank: the run begins. Any other message instead, and it is forgotten;
* ``next`` or ``close``, to rank 0, which answers with ``chunk`` or ``end``, and meanwhile with ``step`` where the
  caller has a callback, which the parent answers with ``step`` or ``close``;
* ``interrupt``, ``prompt`` (answered by ``prompt``) and ``quit`` at any time.

Every answer has the request's ``id``: a parent that was interrupted (ctrl-C in a notebook) knows by it those that it
did not wait for.

torch is imported late, so that the heartbeat starts before it.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.launch.exit_codes import BAD_INPUT, NUMERICS, RANK_FAILED, STORAGE
from dualparal.launch.heartbeat import Heartbeat

if TYPE_CHECKING:
    import torch

    from dualparal.decoding.chunks import Chunk
    from dualparal.workers.line import Line, Message

logger = logging.getLogger("dualparal")

ADDRESS = "DUALPARAL_WORKERS"  # the parent's socket
FILLED_IN = "device", "dtype", "vae_dtype"  # options that an engine chooses where they are left open
_IDLE_SECONDS = 30.0  # from one sign of life to the next while the parent asks for nothing


def main() -> None:
    """Serves the parent until it has had enough. The program of a rank."""
    heartbeat = Heartbeat.from_env()  # first of all
    sys.exit(_work(heartbeat))


def _work(heartbeat: Heartbeat) -> int:
    """Serves the parent; errors are told, not raised. Returns the exit code."""
    from dualparal.distributed.private import call
    from dualparal.workers.line import Line

    line = Line(call(Path(os.environ.pop(ADDRESS)), int(os.environ["RANK"])))
    try:
        _Server(line, heartbeat).run()
    except Exception as error:
        return _tell(error, heartbeat)
    heartbeat.done()
    return 0


def _tell(error: Exception, heartbeat: Heartbeat) -> int:
    """Tells the supervisor why this rank ends. Returns the exit code."""
    from dualparal.decoding.chunks import NonFiniteError
    from dualparal.distributed.messages import PeerLost

    if isinstance(error, (PeerLost, TimeoutError)):  # another rank is gone, or did not come
        heartbeat.error(error, peer=True, exit_code=RANK_FAILED)
        return RANK_FAILED
    codes = {NonFiniteError: NUMERICS, ValueError: BAD_INPUT, OSError: STORAGE}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), RANK_FAILED)
    heartbeat.error(str(error) if code == BAD_INPUT else error, exit_code=code)
    if code == RANK_FAILED:
        logger.error("this rank failed", exc_info=error)
    return code


class _Server:
    """One rank's engine, and the line to the parent.

    A thread receives: it acts at once on what must not wait for the run, and leaves the rest to the main thread.
    """

    def __init__(self, line: Line, heartbeat: Heartbeat) -> None:
        self._line, self._heartbeat = line, heartbeat
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._running = False
        self._closing = False  # the parent wants no more of this run
        self._id = 0  # of the request

    def run(self) -> None:
        """Makes the engine and serves requests until the parent says that it is enough. Raises what they raise."""
        import torch

        from dualparal.config.engine import EngineConfig
        from dualparal.distributed.mesh import role_of
        from dualparal.engine.engine import Engine

        first = self._line.receive()
        assert first is not None, "the life pipe ends with the parent, and this process with it"
        hello, _ = first
        torch.set_num_threads(hello["threads"])
        config = EngineConfig.from_json(hello["config"])
        assert config.stages is not None, "the parent has counted them"
        self._heartbeat.phase("start", **role_of(int(os.environ["RANK"]), config.stages, config.sequence_parallel))
        self._engine = engine = Engine.from_pretrained(hello["model"], config, report=self._heartbeat.phase)
        threading.Thread(target=self._listen, name="dualparal-line", daemon=True).start()
        self._line.send({"kind": "ready", **{name: getattr(engine.config, name) for name in FILLED_IN}})
        message = self._wait("wait_request")
        while (kind := message[0]["kind"]) != "quit":
            # A word on a run that had ended when it came is too late.
            message = self._serve(*message) if kind in ("stream", "resume") else self._wait("wait_request")

    # The thread that receives ------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while (message := self._line.receive()) is not None:
            kind = message[0]["kind"]
            if kind == "prompt":
                self._change_prompt(message[0])
            elif kind == "quit" and self._running:
                self._heartbeat.done()  # enough; nobody waits for what is under way
                os._exit(0)
            else:
                if kind in ("interrupt", "close"):
                    self._closing |= kind == "close"
                    self._engine.interrupt()
                if kind != "interrupt":
                    self._messages.put(message)

    def _change_prompt(self, fields: Mapping[str, Any]) -> None:
        from dualparal.workers.content import pack_refusal

        answer: dict[str, Any]
        try:
            answer = {"block": self._engine.set_prompt(fields["prompt"], fields["negative"], video=fields["video"])}
        except Exception as error:
            answer = pack_refusal(error)
        self._line.send({"kind": "prompt", "id": fields["id"], **answer})

    # The main thread ---------------------------------------------------------------------------------------------

    def _wait(self, phase: str) -> Message:
        """Waits for the parent. A sign of life now and then says that it is not this rank which hangs."""
        while True:
            self._heartbeat.phase(phase, **self._engine.mesh.role)
            try:
                return self._messages.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                continue

    def _answer(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self._line.send({"kind": kind, "id": self._id, **fields}, tensors)

    def _serve(self, fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Message:
        """Answers a request. Returns the message that came after it."""
        from dualparal.workers.content import pack_refusal, unpack_arguments, unpack_scheduler

        engine = self._engine
        self._closing, self._id = False, fields["id"]
        callback = self._callback if fields["callback"] and engine.mesh.is_leader else None
        try:
            engine.scheduler = unpack_scheduler(fields["scheduler"])
            arguments = unpack_arguments(fields["arguments"], tensors)
            make = engine.resume if fields["kind"] == "resume" else engine.stream
            chunks: Any = make(**arguments, callback_on_step_end=callback)
        except Exception as error:  # of any kind: a request can be wrong in every way, and this rank is as it was
            self._answer("refused", pack_refusal(error))
            return self._wait("wait_request")
        self._answer("checked", {})
        message = self._wait("wait_request")
        if message[0]["kind"] != "go":
            chunks.close()
            return message
        self._running = True
        self._heartbeat.phase("start run", **engine.mesh.role)
        if engine.mesh.is_leader:
            self._lead(chunks)
        else:
            for _ in chunks:
                pass
        self._running = False
        return self._wait("wait_request")

    def _lead(self, chunks: Iterator[Chunk]) -> None:
        """Gives the parent chunk after chunk, as it asks for them."""
        from dualparal.workers.content import pack_chunk, pack_stats

        begun = False  # else the other ranks would wait for a run that was closed before its beginning
        while self._wait("wait_consumer")[0]["kind"] == "next" or not begun:
            begun = True
            self._heartbeat.phase("start run" if self._engine.stats is None else "run", **self._engine.mesh.role)
            chunk = next(chunks, None)
            if chunk is None:
                break
            fields, tensors = pack_chunk(chunk)
            self._answer("chunk", fields, tensors)
        chunks.close()  # type: ignore[attr-defined]
        self._answer("end", {"stats": pack_stats(self._engine.stats)})

    def _callback(
        self, engine: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The caller's callback, in the parent."""
        if self._closing:
            return None
        where = {"step": step, "block": values["block"], "video": values["video"]}
        latents = values["latents"]
        self._answer("step", where, {"timestep": timestep, "latents": latents})
        fields, tensors = self._wait("wait_consumer")
        if fields["kind"] == "close" or "latents" not in tensors:
            return None
        return {"latents": tensors["latents"].to(latents.device)}
