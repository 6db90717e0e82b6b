"""Few steps: T = 1 to 8 like any other, lists of steps, and a sampler that takes fresh noise at each."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers.schedulers.scheduling_flow_match_lcm as stock
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.checkpoint.snapshot import SnapshotError
from dualparal.config.blocks import CONTEXT_POLICIES
from dualparal.engine.engine import Engine
from dualparal.engine.identity import run_info
from dualparal.planning.planner import plan
from dualparal.sampling.noise import step_generator
from dualparal.schedule.actions import Op
from dualparal.schedule.replay import bubble
from dualparal.schedule.simulate import Costs, simulate
from dualparal.schedule.validate import validate
from dualparal.trace.timeline import read
from engine_calls import embeds, reference_latents
from timeline_checks import spans

SIZE = {"height": 32, "width": 32}
Build = Callable[..., Engine]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SAMPLERS: dict[str, Any] = {
    "lcm": FlowMatchLCMScheduler(shift=3.0),
    "euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": UniPCMultistepScheduler(**FLOW),
    "dpm++": DPMSolverMultistepScheduler(**FLOW),
}
DISTILLED = {"timesteps": (1000.0, 757.0, 522.0), "num_inference_steps": 3}


def latents(built: Engine, prompt: Any, **call: Any) -> torch.Tensor:
    made: torch.Tensor = built(**prompt, **{"output_type": "latent", **SIZE, **call}).frames
    return made


# Any number of steps --------------------------------------------------------------------------------------------------


@settings(max_examples=16, derandomize=True)
@given(
    st.integers(1, 8),
    st.integers(1, 3),
    st.sampled_from(CONTEXT_POLICIES),
    st.sampled_from([None, 1, 2, 3, 9]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([1.0, 5.0]),
    st.sampled_from(sorted(SAMPLERS)),
)
@example(1, 1, "cached", None, None, 1.0, "lcm")
@example(1, 3, "prior", 1, 1, 5.0, "unipc")
@example(1, 2, "paper", 2, None, 1.0, "euler")
@example(1, 3, "cached", 9, 2, 1.0, "dpm++")
def test_any_few_steps_equal_the_reference(
    wan21: Path, steps: int, stages: int, policy: str, limit: int | None, every: int | None, scale: float, sampler: str
) -> None:
    built = Engine.from_pretrained(
        wan21, device="cpu", frames_per_block=2, context_frames=1, context=policy, stages=stages,
        max_blocks_in_flight=limit, refresh_every=every,
    )  # fmt: skip
    built.scheduler = SAMPLERS[sampler]
    units = []
    built.report = lambda phase, **told: units.append(told) if phase == "run" else None
    call = {"num_frames": 25, "num_inference_steps": steps, "guidance_scale": scale, **SIZE}
    prompt = embeds(built, scale > 1)
    expected = reference_latents(built, prompt, seed=3, **call)
    assert expected.isfinite().all() and expected.std() > 0.1
    assert torch.equal(latents(built, prompt, seed=3, **call), expected)
    assert built._run is not None
    schedule = built._run.spec.schedule
    forwards = stages * (schedule.num_blocks or 0) * steps * (2 if scale > 1 else 1)
    assert len(units) == forwards > 0, "without guidance a step is one forward"
    validate(schedule)
    assert schedule.max_in_flight <= min(steps, limit or steps) and simulate(schedule, Costs()).seconds > 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_with_timeline_snapshot_and_resume(engine: Build, tmp_path: Path, steps: int) -> None:
    options = {"frames_per_block": 2, "context_frames": 1, "refresh_every": max(1, steps // 2)}
    asked = {"num_frames": 49, "num_inference_steps": steps, "output_type": "latent", "guidance_scale": 1.0, **SIZE}
    built = engine(stages=2, **options)
    prompt = embeds(built, False)
    whole = torch.cat([chunk.latents for chunk in built.stream(**prompt, **asked, timeline=tmp_path / "run.json")], 2)
    updates = spans(list(read(tmp_path / "run.json")), "update")
    assert len(updates) == 7 * steps and {span["args"]["step"] for span in updates} == set(range(steps))
    kept = Checkpoint(tmp_path / "kept", every=1)
    first = next(chunks := slowly(built.stream(**prompt, **asked, checkpoint=kept)))
    rest = [next(chunks) for _ in range(3)]
    chunks.close()
    again = list(engine(stages=3, **options).resume(tmp_path / "kept"))
    assert 0 < again[0].block < 6
    made = [chunk.latents for chunk in (first, *rest) if chunk.block < again[0].block]
    assert torch.equal(torch.cat([*made, *(chunk.latents for chunk in again)], 2), whole)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_list_is_planned_as_so_many_steps(steps: int) -> None:
    lists = {"timesteps": [1000 - 100 * step for step in range(steps)]}
    found = plan("wan2.1-t2v-1.3b", "4xrtx4090", guidance_scale=1.0, num_frames=257, **lists)
    assert found.schedule.num_steps == found.work.video.num_inference_steps == steps
    same = plan("wan2.1-t2v-1.3b", "4xrtx4090", guidance_scale=1.0, num_frames=257, num_inference_steps=steps)
    assert (found.seconds, found.split) == (same.seconds, same.split)
    assert found.simulation is not None and 0 <= bubble(found.schedule) < 1


# Lists of steps -------------------------------------------------------------------------------------------------------


def test_a_list_is_the_request_s(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1)
    built.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    prompt = embeds(built, False)
    call = {"num_frames": 25, "guidance_scale": 1.0}
    expected = reference_latents(built, prompt, **DISTILLED, **call, **SIZE)
    told: list[float] = []
    made = latents(
        built, prompt, timesteps=[1000, 757, 522], **call,
        callback_on_step_end=lambda engine, step, timestep, found: told.append(float(timestep)),
    )  # fmt: skip
    assert torch.equal(made, expected) and set(told) == {1000.0, 757.0, 522.0}
    assert torch.equal(latents(built, prompt, **DISTILLED, **call), made), "both, if they agree"
    assert not torch.equal(latents(built, prompt, num_inference_steps=3, **call), made)
    assert torch.equal(latents(built, prompt, sigmas=[1.0, 0.757, 0.522], **call), made), "shift 1: the same levels"
    built.stream(**prompt, **DISTILLED, **call, **SIZE)  # type: ignore[arg-type]
    assert built._run is not None
    spec = built._run.spec
    info = json.loads(json.dumps(run_info(built.setup, spec.scheduler, spec.requests, spec.schedule, None, None)))
    assert info["video"]["timesteps"] == [1000.0, 757.0, 522.0], "ranks compare it"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"num_inference_steps": 50, "timesteps": [1000, 757]}, "num_inference_steps=50 with 2 timesteps.*leave num_"),
        ({"timesteps": [1000, 757], "sigmas": [1.0, 0.7]}, "timesteps and sigmas were both given"),
        ({"timesteps": [1000.5]}, r"timesteps\[0\]=1000.5: this sampler has 1000"),
        ({"sigmas": [0.5, 0.49999999999]}, "sigmas: two of them are one noise level"),
    ],
)
def test_a_wrong_list_is_refused_before_weights_are_read(
    engine: Build, monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], words: str
) -> None:
    built = engine()
    built.scheduler = SAMPLERS["euler"]
    monkeypatch.setattr(type(built.source), "load_slices", None)
    with pytest.raises(ValueError, match=words):
        built.stream("a cat", num_frames=5, **SIZE, **call)


@pytest.mark.parametrize(
    ("shift", "lists", "warned"), [(1.0, "timesteps", 0), (3.0, "timesteps", 1), (3.0, "sigmas", 0)]
)
def test_a_shift_that_moves_given_timesteps_is_said_once(
    engine: Build, caplog: pytest.LogCaptureFixture, shift: float, lists: str, warned: int
) -> None:
    built = engine()
    built.scheduler = FlowMatchLCMScheduler(shift=shift)
    values = {"timesteps": [1000, 757, 522], "sigmas": [1.0, 0.757, 0.522]}[lists]
    with caplog.at_level(logging.WARNING):
        built.stream(["a cat", "a dog"], num_frames=5, **SIZE, **{lists: values})  # type: ignore[arg-type]
    assert sum("the sampler's shift of 3 moves" in record.getMessage() for record in caplog.records) == warned


# Fresh noise at every step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", CONTEXT_POLICIES)
def test_fresh_noise_is_the_same_for_any_number_of_stages(engine: Build, policy: str) -> None:
    call = {"num_frames": 25, "guidance_scale": 1.0, **DISTILLED}
    expected = None
    for stages in (1, 2, 3):
        built = engine(frames_per_block=2, context_frames=1, context=policy, stages=stages)
        built.scheduler = FlowMatchLCMScheduler()
        prompt = embeds(built, False)
        if expected is None:
            expected = reference_latents(built, prompt, seed=3, **call, **SIZE)
        assert torch.equal(latents(built, prompt, seed=3, **call), expected)
    two = built(
        prompt_embeds=prompt["prompt_embeds"].repeat(2, 1, 1), seed=[3, 4], output_type="latent", **call, **SIZE
    )
    assert torch.equal(two.frames[:1], expected), "alone or among others"
    assert not torch.equal(two.frames[1:], expected), "seeds differ"


def test_one_block_equals_diffusers_with_the_same_noise(
    engine: Build, wan21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipeline draws from the process's generator, and here from ours."""
    pipe = WanPipeline.from_pretrained(wan21)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchLCMScheduler(shift=3.0)
    count = iter(range(4))
    monkeypatch.setattr(
        stock, "randn_tensor", lambda shape, **_: torch.randn(shape, generator=step_generator(7, 0, next(count)))
    )
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    call = {"prompt": "two cats", "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 1.0, **SIZE}
    expected = pipe(**call, latents=noise, output_type="latent").frames
    assert next(count, None) is None
    monkeypatch.undo()
    for stages in (1, 2):
        built = engine(stages=stages)
        built.scheduler = FlowMatchLCMScheduler(shift=3.0)
        made = built(**call, latents=noise, seed=7, output_type="latent").frames
        assert (made - expected).abs().max() < 5e-5
        other = built(**call, latents=noise, seed=8, output_type="latent").frames
        assert (made - other).abs().max() > 1e-2, "the noise of the steps is the seed's too"


def test_a_change_of_prompt_moves_no_noise(engine: Build) -> None:
    """Blocks without context are videos of their own: one has the bits of a run that had its prompt from the start."""
    built = engine(frames_per_block=2, context_frames=0)
    built.scheduler = FlowMatchLCMScheduler()
    call = {"num_frames": 25, "guidance_scale": 1.0, "output_type": "latent", **SIZE, **DISTILLED}
    changed = built(prompt={0: "a cat", 16: "a dog"}, **call).frames
    cat, dog = (built(prompt=text, **call).frames for text in ("a cat", "a dog"))
    split = 4  # frame 16 lies in the latent before, block 2 begins here
    assert not torch.equal(cat[:, :, split:], dog[:, :, split:])
    assert torch.equal(changed, torch.cat([cat[:, :, :split], dog[:, :, split:]], 2))


def slowly(chunks: Any) -> Iterator[Any]:
    """Lets the thread that writes keep up with a tiny run."""
    for chunk in chunks:
        yield chunk
        threading.Event().wait(0.05)


@pytest.mark.parametrize(("scheduler", "dtype"), [("lcm", "float32"), ("lcm", "bfloat16"), ("euler", "bfloat16")])
def test_resume_at_any_point(engine: Build, tmp_path: Path, scheduler: str, dtype: str) -> None:
    """Also in bfloat16, to which these samplers round latents."""

    def build(stages: int) -> Engine:
        built = engine(stages=stages, frames_per_block=2, context_frames=1, context="paper", dtype=dtype)
        built.scheduler = SAMPLERS[scheduler]
        return built

    asked = {"num_frames": 49, "sigmas": [1.0, 0.8, 0.5, 0.3], "guidance_scale": 1.0, "output_type": "latent", **SIZE}
    prompt = embeds(build(1), False)
    whole = {chunk.block: chunk.latents for chunk in build(2).stream(**prompt, **asked)}
    folder, chunks = (
        tmp_path / "kept",
        slowly(build(2).stream(**prompt, **asked, checkpoint=Checkpoint(tmp_path / "kept", 1))),
    )
    points = {}
    for count, _ in enumerate(chunks):
        points[count] = copied(folder, tmp_path / str(count))
    starts = set()
    for count, point in points.items():
        made = list(build(1 + count % 3).resume(point))
        starts.add(made[0].block)
        assert all(torch.equal(chunk.latents, whole[chunk.block]) for chunk in made)
        assert made[0].latents.dtype == torch.float32
    assert len(starts) > 2  # a busy machine writes fewer
    other = build(1)
    other.scheduler = SAMPLERS["unipc"]
    with pytest.raises(SnapshotError, match="sampler"):
        other.resume(point)


def copied(folder: Path, to: Path) -> Path:
    """A copy of what is in a folder at one moment; a thread writes and removes snapshots there meanwhile."""
    while True:
        try:
            return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.tmp")))
        except shutil.Error:
            shutil.rmtree(to)


def test_a_model_folder_names_it(engine: Build, wan21: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(wan21, model)
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchLCMScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    FlowMatchLCMScheduler(shift=3.0).save_pretrained(model / "scheduler")
    call = {"num_frames": 9, "guidance_scale": 1.0, "num_inference_steps": 2}
    assigned = engine()
    assigned.scheduler = FlowMatchLCMScheduler(shift=3.0)
    prompt = embeds(assigned, False)
    assert torch.equal(latents(engine(model), prompt, **call), latents(assigned, prompt, **call))
    FlowMatchLCMScheduler(scale_factors=[0.5, 0.75]).save_pretrained(model / "scheduler")
    with pytest.raises(ValueError, match=r"FlowMatchLCMScheduler with scale_factors \(and upscale_mode\)"):
        engine(model).stream("a cat", num_frames=5, **SIZE)


def test_the_simulator_counts_updates_of_one_step() -> None:
    """T = 1: every block is let in, updated and given out in its own iteration."""
    found = plan("wan2.1-t2v-1.3b", "2xrtx4090", guidance_scale=1.0, num_frames=257, timesteps=[1000.0])
    actions = [action for action in found.schedule.actions(0) if action.op in (Op.UPDATE, Op.EMIT)]
    assert [action.op for action in actions] == [Op.UPDATE, Op.EMIT] * (found.schedule.num_blocks or 0)
