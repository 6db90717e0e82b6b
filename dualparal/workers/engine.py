"""The public engine with ``gpus=``: the same calls, made on ranks that this process starts and keeps."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any, overload

import torch

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.config.engine import EngineConfig
from dualparal.decoding.chunks import Chunk
from dualparal.distributed.mesh import in_distributed_run
from dualparal.engine.claimed import Claimed
from dualparal.engine.engine import BUSY
from dualparal.engine.engine import Engine as LocalEngine
from dualparal.engine.inputs import Prompt, callback_of, split_videos
from dualparal.engine.result import EngineOutput, whole_videos
from dualparal.launch.supervisor import Kept
from dualparal.models.defaults import model_defaults
from dualparal.models.source import resolve_model
from dualparal.trace.stats import RunStats
from dualparal.workers.content import (
    pack_arguments,
    pack_scheduler,
    unpack_chunk,
    unpack_refusal,
    unpack_stats,
)
from dualparal.workers.line import Message
from dualparal.workers.rank import FILLED_IN
from dualparal.workers.ranks import Ranks

_ARGUMENTS = inspect.signature(LocalEngine.stream)
_NO_VIDEO = "set_prompt: no video is running; give the prompt to stream()"

Callback = Callable[["WorkerEngine", int, torch.Tensor, dict[str, Any]], Mapping[str, Any] | None]


class Engine(LocalEngine):
    """Makes long videos from a stock Wan model, in this process or, with ``gpus``, on ranks that it starts."""

    @overload
    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Any,
        config: EngineConfig | None = None,
        *,
        gpus: None = None,
        report: Callable[..., None] | None = None,
        **options: Any,
    ) -> LocalEngine: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, model: str | Path, config: EngineConfig | None = None, *, gpus: int, **options: Any
    ) -> WorkerEngine: ...

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | Any,
        config: EngineConfig | None = None,
        *,
        gpus: int | None = None,
        report: Callable[..., None] | None = None,
        **options: Any,
    ) -> LocalEngine | WorkerEngine:
        """An engine for a model: in this process, or on ranks that are started here.

        Args:
            model, config, report, options: as ``dualparal.engine.engine.Engine.from_pretrained`` takes them.
            gpus: the number of rank processes, also with ``device="cpu"``; those that decode and those that share a
                stage count among them. Then a ``WorkerEngine`` comes back, to be closed or used as a context manager.
                None: all of it in this process, or this process is itself a rank of several.

        Raises:
            ValueError: bad values, or a model that is not supported (``ModelError``), before weights are read.
            RankFailed: a rank failed while it started.
            OSError: ranks cannot be started.
        """
        if gpus is None:
            return super().from_pretrained(model, config, report=report, **options)
        if config is not None and options:
            raise ValueError(f"config and {', '.join(options)} were both given; say it in one place")
        if report is not None:
            raise ValueError(f"report with gpus={gpus!r}: the ranks' supervisor has their reports; leave one out")
        return WorkerEngine(model, config or EngineConfig.of(model_defaults(model).blocks, **options), gpus)


class WorkerEngine:
    """An engine on rank processes of its own, which stay warm between calls: weights, groups, embeddings of texts.

    A context manager. ``close`` ends the ranks; so does the end of this process, however it comes.

    Args:
        model: a directory in diffusers format, a hub id, or the name of the package's model.
        config: the options.
        gpus: the number of ranks.

    Attributes:
        config: the options, with nothing left open.
        scheduler: diffusers' sampler object; assign another one of diffusers.
        stats: cost of the last run; None before the end of the first.

    Raises:
        ValueError, RankFailed, OSError: see ``Engine.from_pretrained``.
    """

    def __init__(self, model: str | Path, config: EngineConfig, gpus: int) -> None:
        if not isinstance(model, (str, Path)):
            raise ValueError(
                f"gpus={gpus!r} with a loaded pipeline: its weights are in this process; give the model as a directory"
            )
        config = replace(config, stages=_stages(config, gpus))
        source = resolve_model(model, config.loras, config.transformers)
        _check_layers(config, gpus, source.spec.num_layers)
        self.scheduler: Any = source.load_scheduler()
        self.stats: RunStats | None = None
        self._claim = threading.Lock()  # held from a stream's being asked for to its end
        self._prompt_lock = threading.Lock()  # one change at a time waits for its answer
        self._ids = count()  # of requests and changes of a prompt
        self._id = -1  # of the request under way
        self._begun = self._interrupted = False
        kept: list[Path] = []  # the folder of the last run's snapshots, for the message of a failure
        self._kept = kept
        hello = {"kind": "start", "model": str(model), "config": asdict(config), "threads": _threads()}
        self._ranks = ranks = Ranks(gpus, hello, lambda: _what_is_kept(kept))
        self._end = weakref.finalize(self, ranks.close)
        self.config = replace(config, **{name: ranks.ready[name] for name in FILLED_IN})

    def __enter__(self) -> WorkerEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self, *, now: bool = False) -> None:
        """Ends the ranks, also in the middle of a video, and returns when they are gone. Again, it does nothing.

        now: they are not asked to leave first.
        """
        if now:
            self._ranks.kill()
        self._end()

    def __call__(self, prompt: Prompt | Sequence[Prompt] | None = None, **kwargs: Any) -> EngineOutput:
        """Makes whole videos at once; as ``dualparal.engine.engine.Engine.__call__``. Raises as ``stream`` does."""
        return whole_videos(self, prompt, kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Chunk]:
        """Yields every block as soon as it is finished; arguments as of ``dualparal.engine.engine.Engine.stream``.

        Every rank has checked the request before this returns. Tensors of chunks are on the CPU. Files are read and
        written by the ranks, on this machine. A callback gets copies: what it is to change it returns.

        Raises:
            TypeError: an argument that there is not.
            ValueError: a request that cannot be run, or a value that does not travel to ranks; names it.
            RuntimeError: this engine is making a video, or is closed.
            RankFailed: a rank has failed: now, or while the iterator runs. The engine is of no use any more.
        """
        arguments = _ARGUMENTS.bind(self, *args, **kwargs).arguments
        del arguments["self"]
        names = arguments.pop("callback_on_step_end_tensor_inputs", None)
        callback = callback_of(arguments.pop("callback_on_step_end", None), names, self)
        if arguments.get("generator") is not None:
            arguments["seed"] = _seeds(arguments)
        arguments.pop("generator", None)
        return self._ask("stream", arguments, callback)

    def resume(
        self,
        checkpoint: str | Path | Checkpoint,
        *,
        callback_on_step_end: Callback | None = None,
        timeline: str | Path | None = None,
    ) -> Iterator[Chunk]:
        """Goes on with a run from its last snapshot, on any number of ranks; as
        ``dualparal.engine.engine.Engine.resume``. Raises SnapshotError, and as ``stream`` does."""
        arguments = {"checkpoint": checkpoint, "timeline": timeline}
        return self._ask("resume", arguments, callback_of(callback_on_step_end, None, self))

    def _ask(self, kind: str, arguments: Mapping[str, Any], callback: Callable[..., Any] | None) -> Iterator[Chunk]:
        """Has a request checked by all ranks, and returns the chunks that come of it."""
        fields, tensors = pack_arguments(arguments)
        scheduler = pack_scheduler(self.scheduler)
        if not self._claim.acquire(blocking=False):
            raise RuntimeError(BUSY)
        try:
            self._id = next(self._ids)
            request = {"kind": kind, "id": self._id, "arguments": fields, "scheduler": scheduler}
            self._ranks.tell_all({**request, "callback": callback is not None}, tensors)
            answers = [self._receive(rank)[0] for rank in self._ranks.all]
            for answer in answers:
                if answer["kind"] == "refused":
                    raise unpack_refusal(answer)
        except BaseException:
            self._claim.release()
            raise
        self._kept[:] = [Path(fields["checkpoint"]["folder"])] if "checkpoint" in fields else []
        self._begun, self._interrupted = True, False
        return Claimed(self._follow(callback), self._claim)

    def _receive(self, rank: int) -> Message:
        """The next message of a rank about this request. Those of one that an exception ended here are dropped."""
        while True:
            message = self._ranks.receive(rank)
            if message[0]["id"] == self._id:
                return message

    def _follow(self, callback: Callable[..., Any] | None) -> Generator[Chunk, None, None]:
        """Begins the run on all ranks and asks for chunk after chunk."""
        ended = False
        try:
            self._ranks.tell_all({"kind": "go"})
            while True:
                self._ranks.tell(0, {"kind": "next"})
                fields, tensors = self._receive(0)
                while fields["kind"] == "step":
                    assert callback is not None, "which the request said"
                    self._ranks.tell(0, {"kind": "step"}, self._step(callback, fields, tensors))
                    fields, tensors = self._receive(0)
                if fields["kind"] == "end":
                    ended = True
                    self.stats = unpack_stats(fields["stats"])
                    return
                yield unpack_chunk(fields, tensors)
        finally:
            if not ended:
                self._leave()

    def _step(
        self, callback: Callable[..., Any], fields: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        values = {"latents": tensors["latents"], "block": fields["block"], "video": fields["video"]}
        result = callback(fields["step"], tensors["timestep"], values) or {}
        return {"latents": result["latents"]} if "latents" in result else {}

    def _leave(self) -> None:
        """Ends the run before its end, unless the ranks are gone."""
        with contextlib.suppress(RuntimeError, OSError):
            self._ranks.tell(0, {"kind": "close"})
            fields: Mapping[str, Any] = {"kind": ""}
            while fields["kind"] != "end":
                fields, _ = self._receive(0)
            self.stats = unpack_stats(fields["stats"])

    def set_prompt(self, prompt: str, negative_prompt: str | None = None, *, video: int = 0) -> int:
        """Changes a video's prompt while it runs; as ``dualparal.engine.engine.Engine.set_prompt``, from any thread.

        Raises:
            RuntimeError: no video is running, or the engine is closed.
            ValueError: no such video, or no room for the text encoder beside the run.
            RankFailed: a rank has failed.
        """
        if not self._claim.locked():
            raise RuntimeError(_NO_VIDEO)
        with self._prompt_lock:
            number = next(self._ids)
            change = {"prompt": prompt, "negative": negative_prompt, "video": video}
            self._ranks.tell(0, {"kind": "prompt", "id": number, **change})
            answer = self._ranks.answer(number)
        if "error" in answer:
            raise unpack_refusal(answer)
        return int(answer["block"])

    @property
    def interrupted(self) -> bool:
        """True when ``interrupt`` was called for the last run, which may have ended early by it."""
        return self._interrupted

    def interrupt(self) -> None:
        """Ends the running videos after the unit under way; finished blocks are still given out. Signal-safe."""
        if self._begun:
            self._interrupted = True
            with contextlib.suppress(RuntimeError, OSError):  # the ranks are gone, and the stream says so
                self._ranks.tell(0, {"kind": "interrupt"})


def _stages(config: EngineConfig, gpus: int) -> int:
    """The number of stages that ``gpus`` ranks make. Raises ValueError: they do not fit ``config`` or this machine."""
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise ValueError(f"gpus={gpus!r}: use the number of ranks, from 1 on")
    if in_distributed_run():
        raise ValueError(f"gpus={gpus} in a rank of a distributed run: it has its ranks; leave gpus out")
    places, decoders = config.sequence_parallel, config.decode_ranks
    stages, rest = divmod(gpus - decoders, places)
    wanted = config.stages or (len(config.layers_per_stage) if config.layers_per_stage else stages)
    if stages < 1 or rest or wanted != stages:
        raise ValueError(
            f"gpus={gpus} with stages={config.stages}, decode_ranks={decoders}, sequence_parallel={places}: use "
            f"gpus={max(1, wanted) * places + decoders}, or leave stages out"
        )
    on_cards = (config.device is None and torch.cuda.is_available()) or str(config.device).startswith("cuda")
    if on_cards and torch.cuda.device_count() < gpus:
        raise ValueError(
            f"gpus={gpus} and torch sees {torch.cuda.device_count()}: each rank has one of its own; use fewer, or "
            "device='cpu'"
        )
    return stages


def _check_layers(config: EngineConfig, gpus: int, layers: int) -> None:
    """Checks that a model has a layer for every stage, before any rank starts. Raises ValueError."""
    if (config.stages or 1) > layers:
        most = layers * config.sequence_parallel + config.decode_ranks
        raise ValueError(
            f"gpus={gpus} with a model of {layers} layers: every stage owns at least one layer; use {most} or fewer"
        )


def _threads() -> int:
    """CPU threads of each rank, by torchrun's rule: ``OMP_NUM_THREADS``, or one."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) else 1


def _seeds(arguments: Mapping[str, Any]) -> list[int]:
    """The seed of each video that the generators of a call draw, as in ``Engine.stream``. Raises ValueError."""
    names = "prompt", "seed", "generator", "prompt_embeds", "num_videos_per_prompt"
    return [each.seed for each in split_videos(**{name: arguments[name] for name in names if name in arguments})]


def _what_is_kept(folders: Sequence[Path]) -> Kept:
    """The call that goes on after a failure, if there are snapshots."""
    there = [folder for folder in folders if any(folder.glob("snapshot-*"))]
    return Kept(resume_command=f"engine.resume({str(there[0])!r})" if there else None)
