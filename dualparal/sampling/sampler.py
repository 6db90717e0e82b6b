"""Samplers from diffusers ("schedulers" there), with one state per block.

A sampler keeps tensors between steps, so nothing here writes into a tensor it was given or gave out: the authors'
in-place copy of the result corrupts UniPC's ``last_sample`` (0.12 off stock Wan at T = 6).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dualparal.device import to_device

# Deterministic multistep and single-step samplers whose step() is a function of its arguments and its own history.
# What each remembers from one step to the next; nothing else of it changes.
_MEMORY = {
    "UniPCMultistepScheduler": (
        "model_outputs",
        "timestep_list",
        "last_sample",
        "lower_order_nums",
        "this_order",
        "_step_index",
    ),
    "FlowMatchEulerDiscreteScheduler": ("_step_index",),
    "DPMSolverMultistepScheduler": ("model_outputs", "lower_order_nums", "_step_index"),
}
SUPPORTED = tuple(_MEMORY)


class Sampler:
    """Timesteps of a run, and a fresh state for every block.

    Args:
        scheduler: a diffusers scheduler of one of ``SUPPORTED``; it is copied, never changed.
        num_inference_steps: T.

    Attributes:
        timesteps: [T], in the sampler's dtype, on the CPU.
        num_train_timesteps: the timestep of pure noise.
        levels: noise levels of the steps, T of them, decreasing from 1 at most.

    Raises:
        ValueError: a class that is not supported, or one that draws noise in its steps.
    """

    def __init__(self, scheduler: Any, num_inference_steps: int) -> None:
        name = type(scheduler).__name__
        if name not in SUPPORTED:
            raise ValueError(f"sampler {name} is not supported; use one of {', '.join(SUPPORTED)}")
        config = scheduler.config
        if config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type", "")):
            raise ValueError(f"sampler {name} draws fresh noise in every step; use its deterministic form")
        self._fresh = copy.deepcopy(scheduler)
        self._fresh.set_timesteps(num_inference_steps, device="cpu")
        self._fresh.set_begin_index(0)
        self.timesteps: torch.Tensor = self._fresh.timesteps
        self.num_train_timesteps: int = config.num_train_timesteps
        # Timesteps may be rounded to integers, and extrapolation divides by their differences.
        flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas")
        levels = self._fresh.sigmas[: len(self.timesteps)] if flow else self.timesteps / self.num_train_timesteps
        self.levels: tuple[float, ...] = tuple(levels.tolist())

    def __len__(self) -> int:
        """Steps T of a block (a sampler may take more than it was asked for)."""
        return len(self.timesteps)

    def start(self) -> BlockSampler:
        """The state of one block, before its first step."""
        return BlockSampler(copy.deepcopy(self._fresh))


class BlockSampler:
    """The sampler state of one block.

    Args:
        scheduler: a diffusers scheduler of its own, with timesteps set.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def step(self, velocity: torch.Tensor, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Latents after the step of index ``step`` (the ``step`` of diffusers' scheduler).

        Args:
            velocity: the model's output, [1, C, F, H, W].
            step: index from 0, each once and in order.
            latents: before the step, [1, C, F, H, W].

        Returns:
            A new tensor like ``latents``.
        """
        timestep = self.scheduler.timesteps[step]
        with nullcontext() if latents.device.type == "cpu" else _ScalarsOnHost():
            result: torch.Tensor = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return result

    def state(self) -> dict[str, Any]:
        """The sampler's memory: numbers, tensors, None, and lists of these. The tensors are never written to."""
        names = [name for name in _MEMORY[type(self.scheduler).__name__] if name in vars(self.scheduler)]
        found = {name: getattr(self.scheduler, name) for name in names}
        return {name: list(value) if isinstance(value, list) else value for name, value in found.items()}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores a ``state``, its tensors moved to ``device``.

        Raises:
            ValueError: it is not one of this class.
        """
        kind = type(self.scheduler).__name__
        unknown = sorted(set(state) - set(_MEMORY[kind]))
        if unknown:
            raise ValueError(f"sampler {kind} remembers no {', '.join(unknown)}")
        for name, value in state.items():
            several = [_moved(item, device) for item in value] if isinstance(value, list) else _moved(value, device)
            setattr(self.scheduler, name, several)


class _ScalarsOnHost(TorchFunctionMode):
    """Keeps a sampler's coefficients on the CPU while it steps latents on a GPU.

    diffusers moves them to the latents one by one, and solves for some of them there: each waits for the device.
    Numbers without a dimension go along with a kernel's arguments instead; the few with one are copied when they are
    used, and nobody waits.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and len(args) == 2 and isinstance(args[1], torch.device):
            tensor, device = args
            return tensor if tensor.ndim == 0 else to_device(tensor, device)
        if func is torch.ones and args == ((),):  # UniPC's `rks.append(torch.ones((), device=device))`
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        return func(*args, **kwargs)


def _moved(value: Any, device: torch.device) -> Any:
    """Moves a tensor to the device; time steps, of no dimension, stay where the sampler has its own."""
    return value.to(device) if isinstance(value, torch.Tensor) and value.ndim else value
