"""One sampler state per block, equal to diffusers' own loop, and nothing is written into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dualparal.sampling.sampler import Sampler

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm++": lambda: DPMSolverMultistepScheduler(**FLOW),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def velocity(step: int) -> torch.Tensor:
    return torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_interleaved_blocks_equal_diffusers_own_loop(name: str) -> None:
    steps = 6
    sampler = Sampler(SCHEDULERS[name](), steps)
    states = [sampler.start() for _ in range(3)]
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
            sample = scheduler.step(velocity(10 * block + step), timestep, sample, return_dict=False)[0]
        assert torch.equal(latents[block], sample)


def test_the_users_scheduler_is_not_changed() -> None:
    scheduler = UniPCMultistepScheduler(**FLOW)
    before = scheduler.timesteps.clone()
    Sampler(scheduler, 3).start().step(velocity(0), 0, velocity(1))
    assert torch.equal(scheduler.timesteps, before) and scheduler.last_sample is None


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (DDPMScheduler(), "DDPMScheduler is not supported; use one of UniPCMultistepScheduler"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "draws fresh noise"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "draws fresh noise"),
    ],
)
def test_samplers_that_would_break_the_promise_are_refused(scheduler: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampler(scheduler, 4)


@pytest.mark.parametrize("config", [{"flow_shift": float("nan")}, {"num_train_timesteps": -5}])
def test_a_config_that_gives_no_noise_levels_is_refused(config: dict[str, Any]) -> None:
    scheduler = UniPCMultistepScheduler(**FLOW)
    scheduler.register_to_config(**config)
    with pytest.raises(ValueError, match=next(iter(config))):
        Sampler(scheduler, 4)
