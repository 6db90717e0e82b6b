"""Runs Triton kernels on the CPU, in the process that also compiles them.

    with interpreted(triton_kernel):                    # a module, or several
        triton_kernel.launch(...)                       # its kernels take CPU tensors now

Triton reads TRITON_INTERPRET once per function, when it is decorated: one variable for the whole process. Tests
need both kinds at once, so ``interpreted`` swaps the compiled functions of the modules, and of triton.language,
for interpreted ones and puts everything back afterwards. What Triton itself leaves patched (a device function
that is called inside a kernel patches triton.language and forgets to undo it) is put back too.

Inside, the interpreter of Triton 3.6 and 3.9 is also made right. On its own it holds bfloat16 as 16-bit integers
and computes on these bits without a word: products and sums are garbage, conversions cut off in place of
rounding. Here tl.dot goes through float32, conversions round to nearest even, and any other arithmetic on
bfloat16 raises: a kernel converts to float32 first, as it should anyway. Conversions to 8-bit floats saturate
and round as the hardware does.

Triton 3.6's interpreter needs numpy < 2.4. Nothing here knows autotuned kernels (an Autotuner asks the driver).
"""

import contextlib
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


@contextlib.contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Inside, the @triton.jit functions of ``modules`` run under the interpreter."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_untouched_language())
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = True  # constants of constexpr functions stay plain
        for name, replacement in _right_builder().items():
            stack.enter_context(mock.patch.object(InterpreterBuilder, name, replacement, create=True))
        refuse = interpreter.ReduceScanOpInterface
        stack.enter_context(mock.patch.object(refuse, "check_tensor", _checked(refuse.check_tensor)))
        for namespace, name, function in _compiled_functions(modules):
            namespace[name] = InterpretedFunction(function.fn)
            stack.callback(namespace.__setitem__, name, function)  # nothing else: rewritten code needs new names
        yield


def _compiled_functions(modules: tuple[ModuleType, ...]) -> list[tuple[dict[str, Any], str, JITFunction]]:
    """Every JIT function that a kernel of ``modules`` can reach, with the namespaces that know it."""
    found, seen, queue = [], set(), [vars(module) for module in modules]
    while queue:
        namespace = queue.pop()
        if id(namespace) in seen:
            continue
        seen.add(id(namespace))
        for name, value in list(namespace.items()):
            if isinstance(value, JITFunction):
                found.append((namespace, name, value))
                queue.append(value.fn.__globals__)
            elif isinstance(value, ModuleType) and value.__name__.startswith("triton.language"):
                queue.append(vars(value))
    return found


@contextlib.contextmanager
def _untouched_language() -> Iterator[None]:
    """Puts triton.language back as it was, whatever happens to its modules and classes inside."""
    modules = [module for name, module in sys.modules.items() if name.startswith("triton.language")]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.startswith("triton.language")
    }
    before = [(thing, dict(vars(thing))) for thing in (*modules, *classes)]
    try:
        yield
    finally:
        for thing, attributes in before:
            now = dict(vars(thing))
            for name, value in attributes.items():
                if now.get(name) is not value:
                    setattr(thing, name, value)
            # New names in a module stay: rewritten functions, which Triton caches, look them up there.
            if isinstance(thing, type):
                for name in now.keys() - attributes.keys():
                    delattr(thing, name)


def _is_bf16(handle: TensorHandle) -> bool:
    return getattr(handle.dtype, "scalar", None) == tl.bfloat16


def _widen(handle: TensorHandle) -> np.ndarray:
    """The values of a bfloat16 handle as float32; other data as it is."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if _is_bf16(handle) else handle.data


def _through_torch(values: np.ndarray, dtype: torch.dtype, bits: torch.dtype) -> np.ndarray:
    """The bits of float32 ``values`` rounded to ``dtype``, as unsigned integers."""
    tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C", ndmin=1))
    if dtype in FP8.values():
        limit = torch.finfo(dtype).max
        tensor = tensor.clamp(-limit, limit)
    return tensor.to(dtype).view(bits).numpy().reshape(np.shape(values))


def _to_bf16(values: np.ndarray) -> np.ndarray:
    return _through_torch(values, torch.bfloat16, torch.uint16)


def _refuse(*handles: Any) -> None:
    if any(isinstance(handle, TensorHandle) and _is_bf16(handle) for handle in handles):
        raise NotImplementedError(
            "arithmetic on bfloat16: the interpreter would compute on the bits; convert to float32 after the load"
        )


def _refusing(original: FunctionType) -> FunctionType:
    def method(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        _refuse(*args)
        return original(self, *args)

    return method


def _checked(original: FunctionType) -> FunctionType:
    def check_tensor(self: Any, tensors: Any) -> None:
        original(self, tensors)
        _refuse(*(tensor.handle for tensor in tensors))

    return check_tensor


def _right_builder() -> dict[str, FunctionType]:
    """The methods of InterpreterBuilder to replace."""
    dot, cast, convert = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any
    ) -> TensorHandle:
        if not (_is_bf16(a) or _is_bf16(b)):
            return dot(self, a, b, d, *options)
        return TensorHandle(np.matmul(_widen(a), _widen(b), dtype=np.float32) + d.data, d.dtype.scalar)

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        if _is_bf16(source):
            if target.scalar == tl.bfloat16:
                return source
            source = TensorHandle(_widen(source), tl.float32)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        if target.scalar == tl.bfloat16:
            return TensorHandle(_to_bf16(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: InterpreterBuilder, source: TensorHandle, target: Any, *rounding: Any) -> TensorHandle:
        to, come_from = target.scalar.name, source.dtype.scalar.name
        if to in FP8:
            values = _widen(source).astype(np.float32)
            return TensorHandle(_through_torch(values, FP8[to], torch.uint8), target.scalar)
        if come_from in FP8:
            bits = torch.from_numpy(np.array(source.data, order="C", ndmin=1))
            values = bits.view(FP8[come_from]).float().numpy().reshape(np.shape(source.data))
            return cast_impl(self, TensorHandle(values, tl.float32), target)
        if tl.bfloat16 in (target.scalar, source.dtype.scalar):
            return cast_impl(self, source, target)
        return convert(self, source, target, *rounding)

    def get_bf16(self: InterpreterBuilder, value: float) -> TensorHandle:
        return TensorHandle(_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)

    methods = {
        "create_dot": create_dot,
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "get_bf16": get_bf16,
    }
    for name in ("binary_op", "unary_op", "create_rsqrt", "create_erf", "create_fma", "create_clampf"):
        methods[name] = _refusing(getattr(InterpreterBuilder, name))
    return methods
