"""The engine on the late device: the bits of eager in every order that streams and events permit, and no host syncs.

Then mutants of the engine, in each of which one thing that keeps accesses apart is missing: each is found.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

import toy_family
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.config.video import VideoConfig
from dualparal.engine import build
from dualparal.engine.engine import Engine
from dualparal.engine.inputs import VideoInputs
from dualparal.engine.request import check_request
from dualparal.engine.setup import Setup
from dualparal.engine.texts import Text
from dualparal.kernels import attention_8bit as kernel
from dualparal.kernels import linear_8bit as linears
from dualparal.models.registry import FAMILIES
from dualparal.sampling.sampler import Sampler
from engine_calls import embeds
from late_device import LateDevice, recording
from late_mutants import GRAPHS, MUTANTS, PT, RESUMED, Mutant
from late_runs import UNITS, Case, findings, make, mutated


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "toy", toy_family.FAMILY)
        yield toy_family.write(tmp_path_factory.mktemp("models") / "toy", layers=2)


@pytest.fixture(autouse=True)
def _gelu_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The approximation, as on a card: on the CPU this function has the exact one."""

    def linear_gelu(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, use_gelu: bool) -> torch.Tensor:
        assert use_gelu
        return F.gelu(F.linear(x, weight.t(), bias), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", linear_gelu)


def whole(model: Path, case: Case, folder: Path) -> dict[tuple[int, str], torch.Tensor]:
    """The unbroken video on the CPU."""
    return dict(make(model, case._replace(break_after=0), "cpu", folder))


CASES = {
    "pt": PT,
    "uint8, guidance, two stages": Case("uint8", guidance=True, options={"stages": 2}),
    "graphs, depth 4": GRAPHS._replace(options={"stages": 2, "graphs": True, "depth": 4}),
    "resumed": RESUMED,
    "resumed, refreshes, graphs": Case("pt", break_after=3, options={"stages": 2, "refresh_every": 2, "graphs": True}),
    "prior": Case("pt", options={"stages": 2, "context": "prior"}),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("eagerness", [1.0, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_hundreds_of_orders_give_the_bits_of_eager(toy: Path, tmp_path: Path, name: str, eagerness: float) -> None:
    """The host's other threads run at once, or as late as somebody waits for them."""
    case = CASES[name]
    assert findings(toy, case, tmp_path, whole(toy, case, tmp_path), orders=20, eagerness=eagerness) == {}


@pytest.mark.parametrize("model", ["wan21", "wan22"])
def test_a_wan_model(request: pytest.FixtureRequest, tmp_path: Path, model: str) -> None:
    path: Path = request.getfixturevalue(model)
    call = {"height": 32, "width": 32, "num_frames": 21, "num_inference_steps": 3}
    case = Case("uint8", options={"stages": 2, "graphs": True}, call=call)
    assert findings(path, case, tmp_path, whole(path, case, tmp_path), orders=2) == {}


@pytest.mark.parametrize(
    ("mode", "options"), [("int8", {"stages": 2, "graphs": True, "refresh_every": 2}), ("fp8", {"context": "prior"})]
)
def test_8_bits(
    wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, options: dict[str, Any]
) -> None:
    """Also where 16 and 8 bits meet. Triton's kernels do not run here; their definitions take their places."""
    monkeypatch.setattr(Setup, "check_8bit", lambda self: None)
    monkeypatch.setattr(kernel, "_choose", lambda *_: "torch")
    policy = EightBitPolicy(mode, keep_layers=(1,), first_steps=1, last_steps=1)  # type: ignore[arg-type]
    options = {"dtype": "bfloat16", "attention_8bit": policy, **options}
    call = {"height": 32, "width": 32, "num_frames": 21, "num_inference_steps": 4}
    case = Case(options=options, call=call)
    assert findings(wan21, case, tmp_path, whole(wan21, case, tmp_path), orders=2) == {}


@pytest.mark.parametrize("options", [{"stages": 2, "graphs": True}, {"context": "prior"}], ids=str)
def test_8_bit_linears_and_features(
    wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Rows go through their definitions, products through torch's own, as on a card."""
    for name in ("absent", "rows_absent"):
        monkeypatch.setattr(linears, name, lambda device: "")
    products = []
    product = linears._product
    monkeypatch.setattr(linears, "_product", lambda *args: products.append(args) or product(*args))
    options = {"dtype": "bfloat16", "linear_8bit": "fp8", "features_8bit": True, **options}
    call = {"height": 32, "width": 32, "num_frames": 21, "num_inference_steps": 3}
    case = Case(options=options, call=call)
    assert findings(wan21, case, tmp_path, whole(wan21, case, tmp_path), orders=2) == {}
    assert products


@pytest.mark.parametrize("name", ["pt", "graphs, depth 4", "resumed"])
def test_the_second_card_of_a_process(toy: Path, tmp_path: Path, name: str) -> None:
    """Its events, streams and captures are its own, and the consumer's current card stays the first."""
    case = CASES[name]
    expected = whole(toy, case, tmp_path)
    assert findings(toy, case, tmp_path, expected, orders=20, device="cuda:1", cards=2, before=_capture_here) == {}


def test_prompts_are_kept_on_the_host(toy: Path) -> None:
    """Else each would be copied from the device, in the middle of a run, when its first block enters."""
    late = LateDevice()
    with recording(late, ()):
        engine = Engine.from_pretrained(toy, device="cuda")
        video = VideoConfig(height=8, width=12, num_frames=15, num_inference_steps=3)
        given = {name: rows.to("cuda") for name, rows in embeds(engine).items()}
        request = check_request(engine.setup, engine.scheduler, video, VideoInputs(**given))
        encoded = engine.parts.texts.encode([Text.of(request, "a cat", None)])[0]
        assert request.embeds is not None and given["prompt_embeds"].is_cuda
        assert not request.embeds.is_cuda and not encoded.is_cuda


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=3
        ),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchLCMScheduler(shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_no_sampler_waits_for_the_device(scheduler: Any) -> None:
    """Also where UniPC solves for three coefficients."""
    velocities = torch.randn(7, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    late = LateDevice()
    with recording(late, ()):
        made = []
        for device in ("cpu", "cuda"):
            state, latents, *rest = Sampler(scheduler, 6).start(0), *velocities.to(device)
            late.phase, late.strict = "run", UNITS
            for step, velocity in enumerate(rest):
                latents = state.step(velocity, step, latents)
            late.phase = ""
            made.append(latents.cpu())
    assert torch.equal(*made) and late.ops


def _capture_here() -> None:
    """A capture on the first card: torch's own stream for captures is from then on there."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        pass


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_found(
    monkeypatch: pytest.MonkeyPatch, toy: Path, wan21: Path, tmp_path: Path, mutant: Mutant
) -> None:
    model = wan21 if mutant.wan else toy
    if not mutant.warmed:
        monkeypatch.setattr(build, "_WARMED", ())
    expected = whole(model, mutant.case, tmp_path)
    options: dict[str, Any] = {"device": "cuda:1", "cards": 2, "before": _capture_here} if mutant.second_card else {}
    importlib.import_module(mutant.function.partition(":")[0])
    with mutated(mutant.function, mutant.old, mutant.new), mutated(*mutant.also) if mutant.also else nullcontext():
        found = findings(model, mutant.case, tmp_path, expected, orders=40, **options)
    assert set(found) == set(mutant.found_by.split()), found
