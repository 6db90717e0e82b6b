"""One engine on a GPU with streams of its own, under torch's sanitizer.

    TORCH_CUDA_SANITIZER=1 python sanitized_streams.py MODEL

Our ops go through torch's dispatcher here, where the sanitizer sees what they read and write.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.cuda import _sanitizer

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.engine.engine import Engine
from dualparal.kernels import backend

calls = []


def recorded(*tensors: object) -> bool:
    calls.append(tensors)
    return True


backend.recorded = recorded  # type: ignore[assignment]


# A mode of the dispatcher is its thread's own: the threads that decode and write snapshots need it as well.
submit, lock = ThreadPoolExecutor.submit, threading.RLock()
dispatch = _sanitizer.cuda_sanitizer.dispatch
see = type(dispatch).__torch_dispatch__


def seen(*arguments: Any, **more: Any) -> Any:
    with lock:
        return see(*arguments, **more)


def submitted(pool: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
    def watched() -> Any:
        with dispatch:
            return function(*arguments)

    return submit(pool, watched)


type(dispatch).__torch_dispatch__ = seen
ThreadPoolExecutor.submit = submitted  # type: ignore[method-assign,assignment]
CALL = {"height": 64, "width": 96, "num_frames": 45, "num_inference_steps": 2, "output_type": "pt"}
OPTIONS = {"frames_per_block": 4, "context_frames": 2, "device": "cuda", "refresh_every": 2}

with tempfile.TemporaryDirectory() as folder:
    engine = Engine.from_pretrained(sys.argv[1], stages=2, **OPTIONS)
    chunks = engine.stream("a cat", **CALL, checkpoint=Checkpoint(folder, every=1))  # type: ignore[arg-type]
    total = sum(float(next(chunks).frames.sum()) for _ in range(2))
    chunks.close()  # type: ignore[attr-defined]
    for chunk in Engine.from_pretrained(sys.argv[1], **OPTIONS).resume(folder):
        total += float(chunk.frames.sum())
assert calls, "the ops were not seen"
print(total)
