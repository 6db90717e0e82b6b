"""The seam around self-attention: a strategy splits and joins what a layer attends with; the model does not know."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from dualparal.engine import build
from dualparal.engine.engine import Engine
from dualparal.models.base import AttentionKernel
from dualparal.models.keys_values import Context8, KeysValues
from dualparal.runtime.stage import Stage
from engine_calls import embeds

CALL = {"height": 32, "width": 32, "num_frames": 45, "num_inference_steps": 3, "output_type": "latent"}


@pytest.mark.parametrize("context", ["cached", "prior", "paper"])
def test_heads_can_be_attended_to_apart(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, context: str
) -> None:
    """As ranks that share a stage would: each has some heads of all tokens. Heads are independent: bits are equal."""
    calls = 0

    def by_heads(kernel: AttentionKernel, queries: Any, context: KeysValues | Context8, heads: int) -> torch.Tensor:
        nonlocal calls
        assert isinstance(context, KeysValues)
        size = queries.shape[1] // heads
        parts = []
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            own = KeysValues(*(tensor[:, columns].contiguous() for tensor in context))
            parts.append(kernel(queries[:, columns].contiguous(), own, 1))
            calls += 1
        return torch.cat(parts, dim=1)

    options = {"frames_per_block": 3, "context_frames": 2, "context": context, "stages": 2}
    built = engine(**options)
    plain = built(**embeds(built), **CALL).frames
    monkeypatch.setattr(build, "Stage", partial(Stage, attention=by_heads))
    built = engine(**options)
    assert torch.equal(built(**embeds(built), **CALL).frames, plain)
    assert calls == 2 * 4 * 4 * 3 * 2, "heads, layers, blocks, steps, branches"


def test_what_a_strategy_returns_is_what_the_layer_goes_on_with(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the equality above would show nothing."""
    built = engine(frames_per_block=3, context_frames=2)
    plain = built(**embeds(built), **CALL).frames
    monkeypatch.setattr(
        build, "Stage", partial(Stage, attention=lambda kernel, queries, *rest: kernel(queries, *rest).mul(0.5))
    )
    built = engine(frames_per_block=3, context_frames=2)
    assert not torch.equal(built(**embeds(built), **CALL).frames, plain)
