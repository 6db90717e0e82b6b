"""The keys under which Triton would keep the kernels of an engine's run, found on the CPU: nothing is computed."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from dualparal.kernels import attention_8bit, backend
from dualparal.kernels.attention import choice, triton_kernel
from dualparal.kernels.attention_8bit import triton_kernel as triton_kernel_8bit
from dualparal.models.weights import WeightFiles

ARCH = 90


class Launch(NamedTuple):
    """One launch as Triton's cache sees it.

    Attributes:
        shape_class: kernel, types, constants and options: what a launch is from its code alone.
        hints: by argument, what Triton would compile into the code besides: that it is 1, or divides by 16.
    """

    shape_class: tuple[Any, ...]
    hints: tuple[tuple[str, Any], ...]


def launch_of(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The key of a launch, as ``JITFunction.run`` makes it."""
    target = make_backend(GPUTarget("cuda", ARCH, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, target)
    _, specialization, options = bind(*args, **kwargs)
    types, hints = [], []
    for parameter, (type_, value) in zip(kernel.params, specialization, strict=True):
        constant = type_ == "constexpr" and parameter.is_constexpr
        if type_ == "constexpr" and isinstance(value, int) and not parameter.is_constexpr:
            type_, constant = "i32", False  # a number that is 1 becomes a constant
        types.append((type_, str(value)) if constant else type_)
        hints.append((parameter.name, None if constant else value))
    return Launch((kernel.__name__, tuple(types), tuple(sorted(map(str, options.items())))), tuple(hints))


@contextlib.contextmanager
def recorded_launches() -> Iterator[set[Launch]]:
    """Inside, ops on CPU tensors take their way to a Triton launch, which is noted and not made: results are junk."""
    found: set[Launch] = set()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.add(launch_of(self, args, kwargs))

    def triton(*args: Any, **kwargs: Any) -> str:
        return "triton"

    read = WeightFiles.read

    def aligned(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields weights as they lie on a card; on the CPU they begin anywhere in a mapped file."""
        for name, tensor in read(*args):
            yield name, tensor.clone()

    with contextlib.ExitStack() as stack:
        for module, name, replacement in (
            (JITFunction, "run", run),
            (backend, "choose", triton),
            (choice, "choose", triton),
            (attention_8bit, "_choose", triton),
            (triton_kernel, "_architecture", lambda device: ARCH),
            (triton_kernel_8bit, "arch_of", lambda device: ARCH),
            (WeightFiles, "read", aligned),
        ):
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield found
