"""One sampler state per block, equal to diffusers' own loop, and nothing is written into."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from dualparal.sampling.noise import step_generator
from dualparal.sampling.sampler import Sampler

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "lcm": lambda: FlowMatchLCMScheduler(shift=3.0),
}


def velocity(step: int) -> torch.Tensor:
    return torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_interleaved_blocks_equal_diffusers_own_loop(name: str) -> None:
    steps = 6
    sampler = Sampler(SCHEDULERS[name](), steps, seed=5)
    states = [sampler.start(block) for block in range(3)]
    latents = [velocity(100 + b) for b in range(3)]
    for iteration in range(steps + 2):
        for block in range(3):
            step = iteration - block
            if 0 <= step < steps:
                model_output, sample = velocity(10 * block + step), latents[block]
                kept = model_output.clone(), sample.clone()
                latents[block] = states[block].step(model_output, step, sample)
                assert torch.equal(model_output, kept[0]) and torch.equal(sample, kept[1]), "arguments are not changed"
    for block in range(3):
        scheduler: Any = SCHEDULERS[name]()
        scheduler.set_timesteps(steps)
        sample = velocity(100 + block)
        for step, timestep in enumerate(scheduler.timesteps):
            noise = {"generator": step_generator(5, block, step)} if name == "lcm" else {}
            sample = scheduler.step(velocity(10 * block + step), timestep, sample, return_dict=False, **noise)[0]
        assert torch.equal(latents[block], sample)


def test_the_users_scheduler_is_not_changed() -> None:
    scheduler = UniPCMultistepScheduler(**FLOW)
    before = scheduler.timesteps.clone()
    Sampler(scheduler, 3).start(0).step(velocity(0), 0, velocity(1))
    assert torch.equal(scheduler.timesteps, before) and scheduler.last_sample is None


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (DDPMScheduler(), "DDPMScheduler is not supported; use one of UniPCMultistepScheduler"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "draws fresh noise"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "draws fresh noise"),
        (FlowMatchLCMScheduler(scale_factors=[0.5, 0.7, 0.9]), r"scale_factors \(and upscale_mode\)"),
        (FlowMatchLCMScheduler(invert_sigmas=True), "invert_sigmas ends in pure noise"),
    ],
)
def test_samplers_that_would_break_the_promise_are_refused(scheduler: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampler(scheduler, 4)


def test_scales_that_were_set_by_hand_are_refused() -> None:
    scheduler = FlowMatchLCMScheduler()
    scheduler.set_scale_factors([0.5, 0.7, 0.9], "bicubic")
    with pytest.raises(ValueError, match="scale_factors"):
        Sampler(scheduler, 4)


# Fresh noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lcm_goes_from_the_end_back_to_the_next_level(steps: int) -> None:
    """x0 = x - sigma v; then (1 - s) x0 + s noise at the next level s; the last step gives x0."""
    sampler, latents = Sampler(SCHEDULERS["lcm"](), steps, seed=9), velocity(100)
    scheduler = SCHEDULERS["lcm"]()
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas
    assert len(levels) == steps + 1 and levels[-1] == 0
    state, seen = sampler.start(4), torch.get_rng_state()
    for step in range(steps):
        end = latents - levels[step] * velocity(step)
        noise = torch.randn(latents.shape, generator=step_generator(9, 4, step))
        expected = (1 - levels[step + 1]) * end + levels[step + 1] * noise
        latents = state.step(velocity(step), step, latents)
        assert torch.equal(latents, expected)
    assert torch.equal(latents, end)
    assert torch.equal(torch.get_rng_state(), seen), "the process's own generator is left alone"


def test_fresh_noise_does_not_depend_on_the_steps_before() -> None:
    """A state that is restored goes on with the noise of its step; nothing is kept of it."""
    sampler = Sampler(SCHEDULERS["lcm"](), 4, seed=9)
    whole, latents = sampler.start(2), velocity(1)
    for step in range(4):
        again = sampler.start(2)
        again.restore(whole.state(), torch.device("cpu"))
        after = again.step(velocity(step), step, latents)
        latents = whole.step(velocity(step), step, latents)
        assert torch.equal(after, latents) and set(whole.state()) == {"_step_index"}
    others = [sampler.start(3), Sampler(SCHEDULERS["lcm"](), 4, seed=8).start(2)]
    first = [state.step(velocity(0), 0, velocity(1)) for state in (sampler.start(2), *others)]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_stay_float32_with_velocities_of_16_bits(name: str) -> None:
    """And their values are those of diffusers, whose flow-match samplers round to the velocity's dtype."""
    state, latents = Sampler(SCHEDULERS[name](), 4, seed=5).start(0), velocity(100)
    scheduler: Any = SCHEDULERS[name]()
    scheduler.set_timesteps(4)
    sample = latents
    for step, timestep in enumerate(scheduler.timesteps):
        noise = {"generator": step_generator(5, 0, step)} if name == "lcm" else {}
        latents = state.step(velocity(step).bfloat16(), step, latents)
        sample = scheduler.step(velocity(step).bfloat16(), timestep, sample, return_dict=False, **noise)[0]
        assert latents.dtype == torch.float32 and torch.equal(latents, sample.float())


# Lists of steps -------------------------------------------------------------------------------------------------------

LISTS = [
    ("lcm", "timesteps", [1000.0, 757.0, 522.0]),
    ("euler", "timesteps", [1000.0, 757.0, 522.0]),
    ("lcm", "sigmas", [1.0, 0.9, 0.5, 0.1]),
    ("euler", "sigmas", [1.0, 0.9, 0.5, 0.1]),
    ("unipc", "sigmas", [1.0, 0.9, 0.5, 0.1]),
    ("unipc", "sigmas", [0.7]),
]


@pytest.mark.parametrize(("name", "kind", "values"), LISTS)
def test_a_list_is_what_diffusers_makes_of_it(name: str, kind: str, values: list[float]) -> None:
    sampler = Sampler(SCHEDULERS[name](), len(values), **{kind: values})  # type: ignore[arg-type]
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(**{kind: np.array(values)})
    assert torch.equal(sampler.timesteps, scheduler.timesteps) and len(sampler) == len(values)
    assert torch.equal(sampler.start(0).scheduler.sigmas, scheduler.sigmas)


@pytest.mark.parametrize(
    ("name", "lists", "words"),
    [
        ("unipc", {"timesteps": [999, 500]}, "timesteps: sampler UniPC.* give sigmas, .*FlowMatchEuler.*euler, lcm"),
        ("dpm++", {"timesteps": [999, 500]}, "timesteps: sampler DPM.* give num_inference_steps, .*FlowMatchLCM"),
        ("dpm++", {"sigmas": [1.0, 0.5]}, "sigmas: sampler DPM.* use one of UniPC.*euler, lcm, unipc"),
        ("lcm", {"timesteps": [1001, 500]}, r"timesteps\[0\]=1001: this sampler has 1000.*use at most 1000"),
        ("unipc", {"sigmas": [0.5, 0.49999999999]}, "two of them are one noise level"),
        ("unipc", {"sigmas": [1.0, 0.9999999]}, "two of them are one noise level"),
    ],
)
def test_lists_that_a_sampler_does_not_take_are_refused(name: str, lists: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampler(SCHEDULERS[name](), 2, **lists)


def test_a_list_is_refused_where_the_sampler_would_space_levels_itself() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    with pytest.raises(ValueError, match=r"FlowMatchEuler.*use_karras_sigmas, which would replace them"):
        Sampler(scheduler, 2, sigmas=[1.0, 0.5])


@pytest.mark.parametrize("name", ["unipc", "euler", "lcm"])
def test_the_users_scheduler_is_not_changed_by_a_list(name: str) -> None:
    scheduler: Any = SCHEDULERS[name]()
    before = scheduler.timesteps.clone(), scheduler.sigmas.clone()
    Sampler(scheduler, 2, sigmas=[1.0, 0.5]).start(0).step(velocity(0), 0, velocity(1))
    assert torch.equal(scheduler.timesteps, before[0]) and torch.equal(scheduler.sigmas, before[1])


@pytest.mark.parametrize("config", [{"flow_shift": float("nan")}, {"num_train_timesteps": -5}])
def test_a_config_that_gives_no_noise_levels_is_refused(config: dict[str, Any]) -> None:
    scheduler = UniPCMultistepScheduler(**FLOW)
    scheduler.register_to_config(**config)
    with pytest.raises(ValueError, match=next(iter(config))):
        Sampler(scheduler, 4)
