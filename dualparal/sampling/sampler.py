"""Samplers from diffusers ("schedulers" there), with one state per block.

A sampler keeps tensors between steps, so nothing here writes into a tensor it was given or gave out: the authors'
in-place copy of the result corrupts UniPC's ``last_sample`` (0.12 off stock Wan at T = 6).

A sampler of consistency models (``FlowMatchLCMScheduler``) predicts the end at every step and goes back from there to
the next noise level with fresh noise. That noise is a function of seed, block and step: the same for any number of
stages, after a resume at any point and after a change of prompt.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from dualparal.device import to_device
from dualparal.sampling.noise import step_generator

# Multistep and single-step samplers whose step() is a function of its arguments, its own history, and of fresh noise
# from a generator that it is given. What each remembers from one step to the next; nothing else of it changes.
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
    "FlowMatchLCMScheduler": ("_step_index",),
}
SUPPORTED = tuple(_MEMORY)
_FRESH_NOISE = ("FlowMatchLCMScheduler",)
# Lists of steps that each takes. DPM++ names timesteps, but its flow levels are spaced by a number of steps.
_LISTS: dict[str, tuple[str, ...]] = {
    "UniPCMultistepScheduler": ("sigmas",),
    "FlowMatchEulerDiscreteScheduler": ("timesteps", "sigmas"),
    "DPMSolverMultistepScheduler": (),
    "FlowMatchLCMScheduler": ("timesteps", "sigmas"),
}
_OWN_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_SHIFT_SEEN = 1e-3  # of the whole range: what a shift of 1.004 does to a noise level of one half
_MOST_TRAIN_TIMESTEPS = 1_000_000


def check_config(config: Mapping[str, Any]) -> None:
    """Checks the numbers in a sampler's config, from which its noise levels follow.

    Raises:
        ValueError: NaN or infinity, or a number of timesteps that cannot be.
    """
    bounds = {name: value for name, value in config.items() if name != "lambda_min_clipped"}  # -inf: nothing is clipped
    odd = [name for name, value in bounds.items() if isinstance(value, float) and not math.isfinite(value)]
    if odd:
        raise ValueError(f"sampler with {odd[0]}={config[odd[0]]}: use a number (flow_shift: 3.0 or 5.0)")
    train = config.get("num_train_timesteps", 1000)
    if isinstance(train, bool) or not isinstance(train, int) or not 1 <= train <= _MOST_TRAIN_TIMESTEPS:
        raise ValueError(f"sampler with num_train_timesteps={train!r}: use 1 to {_MOST_TRAIN_TIMESTEPS} (usual: 1000)")


class Sampler:
    """Timesteps of a run, and a fresh state for every block.

    Args:
        scheduler: a diffusers scheduler of one of ``SUPPORTED``; it is copied, never changed.
        num_inference_steps: T, and the length of a list.
        timesteps, sigmas: the steps one by one, strictly decreasing (``VideoConfig``); at most one of the two.
        seed: of fresh noise.

    Attributes:
        timesteps: [T], in the sampler's dtype, on the CPU.
        num_train_timesteps: the timestep of pure noise.
        levels: noise levels of the steps, T of them, decreasing from 1 at most.

    Raises:
        ValueError: a class that is not supported, an option of it that is not, a config that gives no steps, or a list
            that it does not take.
    """

    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        _check_supported(scheduler)
        check_config(scheduler.config)
        self._fresh = copy.deepcopy(scheduler)
        self._seed = seed
        self._timesteps_given = timesteps is not None
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps
        if timesteps is None and sigmas is None:
            self._fresh.set_timesteps(num_inference_steps, device="cpu")
        else:
            self._set_list(timesteps, sigmas)
        self._fresh.set_begin_index(0)
        self.timesteps: torch.Tensor = self._fresh.timesteps
        # Timesteps may be rounded to integers, and extrapolation divides by their differences.
        flow = type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas")
        levels = self._fresh.sigmas[: len(self.timesteps)] if flow else self.timesteps / self.num_train_timesteps
        self.levels: tuple[float, ...] = tuple(levels.tolist())

    def _set_list(self, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> None:
        """Sets steps from a list, as diffusers' ``retrieve_timesteps`` does. Raises ValueError."""
        name, values = ("sigmas", sigmas) if timesteps is None else ("timesteps", timesteps)
        _check_takes(self._fresh, name)
        given = np.array(values, dtype=np.float64)
        if name == "sigmas":
            self._fresh.set_timesteps(sigmas=given, device="cpu")
        else:
            if given[0] > self.num_train_timesteps:
                raise ValueError(
                    f"timesteps[0]={given[0]:g}: this sampler has {self.num_train_timesteps} of them, the last is pure "
                    f"noise; use at most {self.num_train_timesteps}"
                )
            # These sigmas are the ones that it would make itself; without them it warns at every call.
            levels = given.astype(np.float32) / self.num_train_timesteps
            self._fresh.set_timesteps(timesteps=given, sigmas=levels, device="cpu")
        levels = self._fresh.sigmas
        if not bool((levels[:-1] > levels[1:]).all()):
            raise ValueError(f"{name}: two of them are one noise level in float32; use {name} that lie further apart")

    @property
    def warning(self) -> str | None:
        """A sentence for the user where given ``timesteps`` and the noise levels are not the same; None: they are."""
        levels, shift = self._fresh.sigmas[:-1], getattr(self._fresh, "shift", 1.0)
        if not self._timesteps_given:
            return None
        if float((self.timesteps / self.num_train_timesteps - levels).abs().max()) < _SHIFT_SEEN:
            return None
        return (
            f"timesteps are what the model is told, and the sampler's shift of {shift:g} moves the noise levels away "
            "from them, as in diffusers; set the shift to 1 (--flow-shift 1) for levels of timestep / "
            f"{self.num_train_timesteps}, or give sigmas, which are shifted together with the timesteps"
        )

    def __len__(self) -> int:
        """Steps T of a block (a sampler may take more than it was asked for)."""
        return len(self.timesteps)

    def start(self, block: int) -> BlockSampler:
        """The state of the block with the index ``block``, before its first step."""
        noisy = type(self._fresh).__name__ in _FRESH_NOISE
        return BlockSampler(copy.deepcopy(self._fresh), partial(step_generator, self._seed, block) if noisy else None)


class BlockSampler:
    """The sampler state of one block.

    Args:
        scheduler: a diffusers scheduler of its own, with timesteps set.
        generator: step -> the generator, on the CPU, of the noise that the scheduler draws then; None: it draws none.
    """

    def __init__(self, scheduler: Any, generator: Callable[[int], torch.Generator] | None = None) -> None:
        self.scheduler = scheduler
        self.generator = generator

    def step(self, velocity: torch.Tensor, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Latents after the step of index ``step`` (the ``step`` of diffusers' scheduler).

        Fresh noise is drawn on the CPU and moved to the latents' device.

        Args:
            velocity: the model's output, [1, C, F, H, W].
            step: index from 0, each once and in order.
            latents: before the step, [1, C, F, H, W].

        Returns:
            A new tensor like ``latents``. (Flow-match samplers of diffusers round it to the velocity's dtype.)
        """
        timestep = self.scheduler.timesteps[step]
        noise = {} if self.generator is None else {"generator": self.generator(step)}
        with nullcontext() if latents.device.type == "cpu" else _ScalarsOnHost():
            result: torch.Tensor = self.scheduler.step(velocity, timestep, latents, return_dict=False, **noise)[0]
        return result.to(latents.dtype)

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


def _check_supported(scheduler: Any) -> None:
    """Checks the class of a scheduler, and options with which its steps are no function of block and step.

    Raises:
        ValueError: another class, or such an option.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if kind not in SUPPORTED:
        raise ValueError(f"sampler {kind} is not supported; use one of {', '.join(SUPPORTED)}")
    if config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type", "")):
        raise ValueError(f"sampler {kind} draws fresh noise in every step; use its deterministic form")
    if config.get("scale_factors") or getattr(scheduler, "_scale_factors", None):
        raise ValueError(
            f"sampler {kind} with scale_factors (and upscale_mode) makes pictures that grow from step to step: a "
            "block has one size; leave them out"
        )
    if kind in _FRESH_NOISE and config.get("invert_sigmas"):
        raise ValueError(f"sampler {kind} with invert_sigmas ends in pure noise; leave it out")


def _check_takes(scheduler: Any, name: str) -> None:
    """Checks that a scheduler takes a list of ``name``, "timesteps" or "sigmas", and steps by it. Raises ValueError."""
    kind = type(scheduler).__name__
    own = [option for option in _OWN_LEVELS if scheduler.config.get(option)]
    if own:
        raise ValueError(f"{name} with sampler {kind} and {own[0]}, which would replace them; turn that off")
    takes = [each for each in _LISTS[kind] if each in inspect.signature(scheduler.set_timesteps).parameters]
    if name not in takes:
        others = [other for other, lists in _LISTS.items() if name in lists]
        instead = f"give {takes[0]}, " if takes else "give num_inference_steps, "
        raise ValueError(
            f"{name}: sampler {kind} does not take them; {instead}or use one of {', '.join(others)} "
            "(--sampler euler, lcm" + (", unipc)" if name == "sigmas" else ")")
        )


def _moved(value: Any, device: torch.device) -> Any:
    """Moves a tensor to the device; time steps, of no dimension, stay where the sampler has its own."""
    return value.to(device) if isinstance(value, torch.Tensor) and value.ndim else value
