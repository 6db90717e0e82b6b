"""Captured twins of a stage's forward: one CUDA graph per ``StepShape``, static inputs, bit-identical replays.

Only compute is captured; transfers stay outside. The first unit of a shape runs eagerly, which warms up libraries and
is a real unit (a warm-up on the side would write features twice); the second one captures; from then on the unit's
tensors are copied into the graph's own and the graph is replayed. Text and time conditions are shared objects that
nobody writes to, so they are copied only when another one comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dualparal.models.base import Rotary, TimeCondition
from dualparal.runtime.stage import Forward, StepInputs, StepShape

Replay = Callable[[], None]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]


def cuda_capture(pool: list[Any]) -> Capture:
    """Makes a capture with torch.cuda.graph. Graphs of one stage share a memory pool: they never run at once.

    Args:
        pool: empty at first; gets the handle of the pool, and the stream of the captures, at the first one.
    """

    def capture(function: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        if not pool:
            # Without a stream of its own it would be that of the process's first capture, on whichever card.
            pool.extend((torch.cuda.graph_pool_handle(), torch.cuda.Stream()))
        with torch.cuda.graph(graph, pool=pool[0], stream=pool[1], capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result

    return capture


@dataclass
class _Entry:
    inputs: StepInputs
    replay: Replay
    result: torch.Tensor
    given: StepInputs  # what lies in ``inputs`` now


class Graphed:
    """Wrapper of ``Stage.forward``, one per stage. Its result is good until the next call.

    Args:
        forward: a function of shape and tensors alone.
        capture: turns a function without arguments into (replay, result); ``cuda_capture`` on a GPU.
    """

    def __init__(self, forward: Forward, capture: Capture) -> None:
        self._forward = forward
        self._capture = capture
        self._warm: set[StepShape] = set()
        self._entries: dict[StepShape, _Entry] = {}
        self._text: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # static copy, what lies in it

    def __call__(self, shape: StepShape, inputs: StepInputs) -> torch.Tensor:
        if shape not in self._warm:
            self._warm.add(shape)
            return self._forward(shape, inputs)
        entry = self._entries.get(shape)
        if entry is None:
            entry = self._entries[shape] = self._make(shape, inputs)
        self._fill(shape, entry, inputs)
        entry.replay()
        return entry.result

    def _make(self, shape: StepShape, inputs: StepInputs) -> _Entry:
        time = inputs.time
        static = StepInputs(
            inputs.hidden.clone(),
            self._static_text(shape, inputs.text),
            TimeCondition(time.layers.clone(), None if time.head is None else time.head.clone(), time.rows),
            Rotary(*(t.clone() for t in inputs.rotary)),
            tuple(t.clone() for t in inputs.read_at),
            tuple(t.clone() for t in inputs.write_at),
            tuple(t.clone() for t in inputs.mean_at),
            tuple(t.clone() for t in inputs.shift),
        )
        replay, result = self._capture(lambda: self._forward(shape, static))
        return _Entry(static, replay, result, inputs)

    def _static_text(self, shape: StepShape, text: torch.Tensor) -> torch.Tensor:
        """The one copy of a text for all shapes of an expert and branch: text is large."""
        key = shape.expert, shape.branch
        if key not in self._text:
            self._text[key] = text.clone(), text
        return self._text[key][0]

    def _fill(self, shape: StepShape, entry: _Entry, inputs: StepInputs) -> None:
        static, given = entry.inputs, entry.given
        static.hidden.copy_(inputs.hidden)
        key = shape.expert, shape.branch
        text, lies_in_it = self._text[key]
        if lies_in_it is not inputs.text:
            text.copy_(inputs.text)
            self._text[key] = text, inputs.text
        for mine, old, new in ((static.time, given.time, inputs.time), (static.rotary, given.rotary, inputs.rotary)):
            if old is not new:
                for target, source in zip(mine, new, strict=True):
                    if isinstance(target, torch.Tensor) and isinstance(source, torch.Tensor):
                        target.copy_(source)
        rows, new_rows = (i.read_at + i.write_at + i.mean_at + i.shift for i in (static, inputs))
        for target, source in zip(rows, new_rows, strict=True):
            target.copy_(source)
        entry.given = inputs._replace(hidden=static.hidden)  # the unit's own tensor may be reused or freed
