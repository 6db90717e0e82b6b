"""A loaded pipeline whose own call makes long video, until it is switched back."""

from __future__ import annotations

import contextlib
import inspect
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualparal.engine.engine import Engine as LocalEngine
from dualparal.models.defaults import FILE as DEFAULTS
from dualparal.workers.engine import Engine, WorkerEngine

_KEPT = "_dualparal"  # the attribute of a pipeline that is switched over


class Enabled:
    """A pipeline that was switched over by ``enable``. A context manager, which switches it back.

    Attributes:
        pipeline: diffusers' object; its call is the engine's.
        stock: the pipeline's own class.
        engine: what makes the video: for ``stream``, ``set_prompt``, ``interrupt``, ``stats``.
    """

    def __init__(self, pipeline: Any, engine: LocalEngine | WorkerEngine, copied: Path | None) -> None:
        self.pipeline, self.engine = pipeline, engine
        self.stock, self._copied = type(pipeline), copied
        # A call is looked up in the class, not in the object. The name stays: families go by it, and so does saving.
        pipeline.__class__ = type(self.stock.__name__, (self.stock,), {"__call__": _call})
        vars(pipeline)[_KEPT] = self

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        self.disable()

    def disable(self) -> None:
        """Gives the pipeline its own call back and ends the ranks, if there are any. Again, it does nothing."""
        if vars(self.pipeline).get(_KEPT) is self:
            del vars(self.pipeline)[_KEPT]
            self.pipeline.__class__ = self.stock
        if isinstance(self.engine, WorkerEngine):
            self.engine.close()
        if self._copied is not None:
            shutil.rmtree(self._copied, ignore_errors=True)


def enable(pipeline: Any, *, gpus: int | None = None, model: str | Path | None = None, **options: Any) -> Enabled:
    """Has a loaded pipeline's own call make long video: ``pipeline(prompt, num_frames=1025)``.

    The call takes what ``WanPipeline.__call__`` and ``Engine.stream`` take, and returns what the pipeline returns. A
    callback gets the pipeline as its first argument, and ``pipeline._interrupt = True`` in it ends the video.

    Args:
        pipeline: diffusers' object.
        gpus: ranks that are started, each with a part of the model; None: stages in this process.
        model: with ``gpus``, the folder or the hub id from which the ranks read the weights. None: they are saved to
            a temporary folder first, which takes as much disk as the model until the pipeline is switched back.
        options: as of ``Engine.from_pretrained``; ``dtype`` is the transformer's own, ``device`` the pipeline's.

    Raises:
        ValueError: it is switched over already, or cannot be: see ``Engine.from_pretrained``; LoRA weights that are
            not fused, with ``gpus``.
        RankFailed, OSError: ranks cannot be started, or weights not saved.
    """
    if _KEPT in vars(pipeline):
        raise ValueError(f"enable: this {type(pipeline).__name__} is switched over already; disable it first")
    if model is not None and gpus is None:
        raise ValueError(
            f"model={str(model)!r} without gpus: in this process the loaded weights are used; leave it out"
        )
    transformer = pipeline.transformer
    options.setdefault("device", pipeline.device.type)
    options.setdefault("dtype", transformer.dtype)
    copied = None
    if gpus is None:
        engine: LocalEngine | WorkerEngine = Engine.from_pretrained(pipeline, **options)
    else:
        if getattr(transformer, "peft_config", None):
            raise ValueError(
                "enable with gpus: LoRA weights are loaded and not fused; fuse them (pipe.fuse_lora(); "
                "pipe.unload_lora_weights()), or give their files as loras=[...]"
            )
        try:
            if model is None:
                model = copied = Path(tempfile.mkdtemp(prefix="dualparal-"))
                pipeline.save_pretrained(copied)
                name = getattr(pipeline, "name_or_path", None)
                if name and (own := Path(name) / DEFAULTS).is_file():  # diffusers does not save it
                    shutil.copy(own, copied)
            engine = Engine.from_pretrained(model, gpus=gpus, **options)
        except BaseException:
            if copied is not None:
                shutil.rmtree(copied, ignore_errors=True)
            raise
    if copied is not None:
        weakref.finalize(pipeline, shutil.rmtree, copied, ignore_errors=True)  # also at the end of this process
    return Enabled(pipeline, engine, copied)


def disable(pipeline: Any) -> None:
    """Gives a pipeline its own call back; one that has it is left alone."""
    found = vars(pipeline).get(_KEPT)
    if found is not None:
        found.disable()


def _call(pipeline: Any, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
    """Makes a video with the engine; see ``enable``."""
    from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

    own = vars(pipeline)[_KEPT]
    named = list(inspect.signature(own.stock.__call__).parameters)[1 : len(args) + 1]
    kwargs |= dict(zip(named, args))
    engine = own.engine
    engine.scheduler = pipeline.scheduler
    pipeline._interrupt = False
    if callable(callback := kwargs.get("callback_on_step_end")):
        kwargs["callback_on_step_end"] = _Told(pipeline, callback)
    found = engine(**kwargs)
    return WanPipelineOutput(frames=found.frames) if return_dict else (found.frames,)


class _Told:
    """The caller's callback: it gets the pipeline, and may interrupt as diffusers' callbacks do."""

    def __init__(self, pipeline: Any, callback: Any) -> None:
        self._pipeline, self._callback = pipeline, callback
        with contextlib.suppress(AttributeError):
            self.tensor_inputs = callback.tensor_inputs

    def __call__(self, engine: Any, step: int, timestep: Any, values: dict[str, Any]) -> Mapping[str, Any] | None:
        result: Mapping[str, Any] | None = self._callback(self._pipeline, step, timestep, values)
        if getattr(self._pipeline, "_interrupt", False):
            engine.interrupt()
        return result
