"""Layers that compute nothing and take a known time: what remains is the schedule, the engine and the transport."""

from __future__ import annotations

import time
from typing import Any

import torch

from dualparal.config.decoding import row_ranges
from dualparal.engine.engine import Engine
from dualparal.models.base import AttentionStrategy, Pending, RowExchange, TimeCondition, attend_here


class SleepingLayers:
    """A slice of layers: the right shapes, made once, and a sleep per unit. A sleep takes no core, so that there may
    be more processes than cores.
    """

    def __init__(self, inner: Any, seconds: float = 0.0) -> None:
        self._inner = inner
        self._seconds = seconds
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _zeros(self, name: str, key: int, shape: tuple[int, ...]) -> torch.Tensor:
        if (name, key) not in self._made:
            self._made[name, key] = torch.zeros(shape, dtype=self._inner.dtype)
        return self._made[name, key]

    def embed(self, patches: torch.Tensor) -> torch.Tensor:
        return self._zeros("hidden", len(patches), (len(patches), self._inner.inner_dim))

    def layer(
        self, index: int, hidden: torch.Tensor, pending: Any, times: Any, text: Any, rotary: Any, context: Any,
        lends: Any = (), attend: AttentionStrategy = attend_here,
    ) -> tuple[torch.Tensor, Pending]:  # fmt: skip
        if index == 0 and self._seconds:
            time.sleep(self._seconds)
        if attend is not attend_here:  # places of a stage wait for each other
            attend(lambda queries, keys, heads: queries, hidden, context, self._inner.heads)
        return hidden, (hidden, None)

    def finish(self, hidden: torch.Tensor, pending: Pending | None) -> torch.Tensor:
        return hidden

    def head(self, hidden: torch.Tensor, pending: Pending | None, time: TimeCondition) -> torch.Tensor:
        return self._zeros("velocity", len(hidden), (len(hidden), 4 * self._inner.config["in_channels"]))


class SleepingDecoder:
    """Decodes nothing and takes a known time for each latent frame of its part of the rows."""

    history, state_bytes = 0, 0

    def __init__(self, seconds: float, rows: RowExchange | None) -> None:
        self._count, self._index = (1, 0) if rows is None else (rows.count, rows.index)
        self._seconds = seconds / self._count
        self.reset()

    def reset(self) -> None:
        self._first = True

    def push(self, latents: torch.Tensor) -> torch.Tensor:
        _, _, frames, height, width = latents.shape
        time.sleep(self._seconds * frames)
        made = 4 * frames - 3 * self._first
        self._first = False
        return torch.zeros(made, 3, 8 * len(row_ranges(height, self._count)[self._index]), 8 * width)


def synthetic_engine(model: str, seconds: float, stages: int | None = None, **options: Any) -> Engine:
    """An engine on the CPU whose every stage takes so many seconds per unit."""
    engine = Engine.from_pretrained(model, device="cpu", stages=stages, **options)
    engine.parts.load()
    engine.parts.slices = {
        stage: [SleepingLayers(inner, seconds) for inner in slices]  # type: ignore[misc]
        for stage, slices in engine.parts.slices.items()
    }
    return engine


def sleeping_decoders(engine: Engine, seconds: float) -> None:
    """Makes all decoders take so many seconds for a latent frame, divided by the parts of the rows."""

    def decoders(count: int, rows: RowExchange | None = None) -> list[Any]:
        return [SleepingDecoder(seconds, rows) for _ in range(count)]

    engine.parts.decoders = decoders  # type: ignore[method-assign]


def embeds(engine: Engine) -> dict[str, torch.Tensor]:
    """Prompt embeddings as call arguments: no text encoder."""
    zeros = torch.zeros(1, 8, engine.source.spec.text_dim)
    return {"prompt_embeds": zeros, "negative_prompt_embeds": zeros}
