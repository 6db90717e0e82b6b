"""Captured steps: static inputs, one graph per shape, the bits of eager. On the CPU a stand-in for the capture.

The stand-in records the closure that a graph would record, with every Python value frozen at capture, and a replay
runs it again on the static tensors. What does not travel through a static tensor is thus stale, as in a real graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.config.eight_bit import EightBitPolicy
from dualparal.engine import build
from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.runtime.features import FeatureStore
from dualparal.runtime.graphs import Graphed
from engine_calls import embeds

CALL = {"height": 32, "width": 32, "num_frames": 45, "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the CUDA capture; counts replays."""
    stores: list[FeatureStore] = []
    original = FeatureStore.__init__

    def init(self: FeatureStore, *args: Any) -> None:
        original(self, *args)
        stores.append(self)

    replays: list[int] = []

    def capture(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        # A real capture runs nothing; this one has to, to learn the result's shape, and undoes what it wrote.
        tensors = [buffer for store in stores for buffer in store._buffers]
        kept = [t.clone() for t in tensors]
        result = torch.full_like(function(), float("nan"))
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.copy_(old)

        def replay() -> None:
            replays.append(1)
            result.copy_(function())

        return replay, result

    monkeypatch.setattr(FeatureStore, "__init__", init)
    monkeypatch.setattr(build, "cuda_capture", lambda pool: capture)
    return replays


@pytest.fixture(scope="module")
def skyreels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is told the timestep of each frame that it is fed."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("models") / "skyreels", layers=2, skyreels=True)


KINDS = [("skyreels", "paper"), *product(("wan21", "wan22"), ("cached", "prior", "paper"))]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("model, policy", KINDS)
def test_replays_give_the_bits_of_eager(
    request: pytest.FixtureRequest, engine: Callable[..., Engine], recorded: list[int], policy: str, model: str
) -> None:
    path = request.getfixturevalue(model)
    options = {"frames_per_block": 2, "context_frames": 1, "context": policy}
    built = engine(path, **options)
    eager = built(**embeds(built), **CALL).frames
    for stages in (1, 2):
        built = engine(path, stages=stages, **options)
        built.setup = replace(built.setup, config=replace(built.config, graphs=True))
        recorded.clear()
        assert torch.equal(built(**embeds(built), **CALL).frames, eager)
        units = 2 * CALL["num_inference_steps"] * 6 * stages
        assert len(recorded) > units / 2, "most units are replays"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("policy", ["cached", "prior", "paper"])
@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_replays_with_8_bits(engine: Callable[..., Engine], recorded: list[int], policy: str, mode: str) -> None:
    """The steps differ in their operations, the blocks must not: means and slots travel through static tensors."""
    schedule = EightBitPolicy(mode, keep_layers=(1,), first_steps=1, last_steps=1)  # type: ignore[arg-type]
    options = {"frames_per_block": 2, "context_frames": 1, "context": policy, "dtype": "bfloat16"}
    built = engine(attention_8bit=schedule, **options)
    eager = built(**embeds(built), **CALL).frames
    for stages in (1, 2):
        built = engine(attention_8bit=schedule, stages=stages, **options)
        built.setup = replace(built.setup, config=replace(built.config, graphs=True))
        recorded.clear()
        assert torch.equal(built(**embeds(built), **CALL).frames, eager)
        assert len(recorded) > 2 * CALL["num_inference_steps"] * 6 * stages / 3


def test_a_prompt_change_reaches_captured_steps(engine: Callable[..., Engine], recorded: list[int]) -> None:
    options = {"frames_per_block": 2, "context_frames": 1}
    prompt = {0: "a cat", 21: "a dog"}
    eager = engine(**options)(prompt, **CALL).frames
    built = engine(**options)
    built.setup = replace(built.setup, config=replace(built.config, graphs=True))
    assert torch.equal(built(prompt, **CALL).frames, eager) and recorded


@pytest.mark.sampled(4)
@pytest.mark.parametrize("policy", ["cached", "prior", "paper"])
@pytest.mark.parametrize("eight_bit", [None, EightBitPolicy("int8", first_steps=1, last_steps=1)])
def test_all_is_captured_before_the_first_unit(
    engine: Callable[..., Engine],
    recorded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    wan22: Path,
    policy: str,
    eight_bit: EightBitPolicy | None,
) -> None:
    """A capture waits for the device. What the warm-up leaves behind is read by nobody: the bits are those without."""
    options = {"frames_per_block": 2, "context_frames": 1, "context": policy, "refresh_every": 3}
    if eight_bit is not None:
        options |= {"attention_8bit": eight_bit, "dtype": "bfloat16"}
    plain = engine(wan22, **options)
    expected = plain(**embeds(plain), **CALL).frames
    actions: list[str] = []
    made = Graphed._make

    def make(self: Graphed, *args: Any) -> Any:
        assert not actions, "captured in the middle of the run"
        return made(self, *args)

    monkeypatch.setattr(build, "_WARMED", ("cpu",))
    monkeypatch.setattr(Graphed, "_make", make)
    built = engine(wan22, stages=2, report=lambda phase, **_: actions.append(phase), **options)
    built.setup = replace(built.setup, config=replace(built.config, graphs=True))
    assert torch.equal(built(**embeds(built), **CALL).frames, expected)
    assert len(recorded) > actions.count("run"), "every unit is a replay"


def test_the_stand_in_notices_what_bypasses_static_tensors() -> None:
    """Else the equalities above would show nothing."""
    shape, frozen = None, []

    def forward(_: Any, inputs: Any) -> torch.Tensor:
        return inputs.hidden + frozen[-1]

    def capture(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        value = function()
        return (lambda: None), value

    from dualparal.models.base import Rotary, TimeCondition
    from dualparal.runtime.stage import StepInputs, StepShape

    shape = StepShape(0, 0, 1, 0, (), ())
    zero = torch.zeros(1)
    graphed = Graphed(forward, capture)
    results = []
    for value in (1.0, 2.0, 3.0):
        frozen.append(value)
        inputs = StepInputs(zero.clone(), zero, TimeCondition(zero, None), Rotary(zero, zero), (), ())
        results.append(graphed(shape, inputs).item())
    assert results == [1.0, 2.0, 2.0]


def test_graphs_without_a_gpu_are_refused(engine: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match="graphs=True with device='cpu'"):
        engine(graphs=True)
