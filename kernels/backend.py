"""The choice of an op's implementation, and what every op checks and passes on the way there.

``backend="auto"`` takes the first of the op's backends that can run on the tensors' device, decides once per
op and device type, and says so once at INFO. A backend asked for by name runs or raises.
"""

import contextlib
import functools
import importlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch  # before _C: both then share one OpenMP runtime, and one pool of threads

try:
    from dualparal import _C

    NOT_BUILT = ""
except ImportError as error:
    # Not fatal: every op has a PyTorch definition. The reason is told wherever it changes a choice.
    NOT_BUILT = f"dualparal._C does not import ({error})"

log = logging.getLogger("dualparal")

NATIVE = ("cpp", "cuda", "triton", "torch")  # the usual backends of an op, the preferred one first
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the codes of csrc/common.h


@functools.cache
def absent(backend: str, device_type: str) -> str:
    """Why ``backend`` cannot run on this type of device; empty when it can."""
    if backend in ("cpp", "cuda", "triton"):
        wanted = "cpu" if backend == "cpp" else "cuda"
        if device_type != wanted:
            return f"it takes tensors on {wanted}, not on {device_type}"
    if backend in ("cpp", "cuda") and NOT_BUILT:
        return f"{NOT_BUILT}; reinstall dualparal where there is a C++ compiler"
    if backend == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"triton does not import ({error}); install triton"
    if backend == "cuda":
        if not _C.build_info()["cuda"]:
            return "dualparal._C was built without CUDA; reinstall dualparal where nvcc is on the PATH"
        problem = _C.cuda_problem(torch.cuda.current_device())
        if problem:
            archs = " ".join(_C.build_info()["archs"])
            return f"dualparal._C has no kernel for this card ({problem}; built for {archs})"
    return ""


@functools.cache
def _auto(op: str, device_type: str, backends: tuple[str, ...]) -> str:
    reasons = {backend: absent(backend, device_type) for backend in backends}
    chosen = next(backend for backend, reason in reasons.items() if not reason)
    # A native backend of another device type is no news.
    passed_over = [
        f"; not {backend}: {reason}"
        for backend, reason in reasons.items()
        if reason and not reason.startswith("it takes tensors")
    ]
    log.info("%s on %s: %s%s", op, device_type, chosen, "".join(passed_over))
    return chosen


def choose(op: str, device: torch.device, backend: str, backends: tuple[str, ...] = NATIVE) -> str:
    """The backend that runs ``op`` on ``device``.

    Raises:
        ValueError: ``backend`` is neither "auto" nor one of ``backends``, or cannot run there.
    """
    if backend == "auto":
        return _auto(op, device.type, backends)
    if backend not in backends:
        raise ValueError(f"{op}: backend={backend!r} is unknown; use 'auto' or one of {', '.join(backends)}")
    reason = absent(backend, device.type)
    if reason:
        raise ValueError(f"{op}: backend={backend!r} cannot run: {reason}; or use backend='auto'")
    return backend


def check(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    row_stride: bool = False,
) -> None:
    """Raises ValueError unless ``tensor`` is what the op needs.

    With ``row_stride`` the rows of a matrix may lie apart; without, the tensor is contiguous.
    """
    if tensor.shape != tuple(shape) or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
            f"expected {dtype} {list(shape)} on {device}"
        )
    if row_stride:
        rows, columns = tensor.shape
        if rows and ((columns > 1 and tensor.stride(1) != 1) or (rows > 1 and tensor.stride(0) < columns)):
            raise ValueError(f"{name} has strides {tensor.stride()}; expected (at least {columns}, 1)")
    elif not tensor.is_contiguous():
        raise ValueError(f"{name} {list(tensor.shape)} has strides {tensor.stride()}; expected it contiguous")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient and these ops have none; use torch.inference_mode()")


Checked = TypeVar("Checked")
_PLAIN = (torch.Tensor, torch.nn.Parameter)  # of others, such as torch's fake ones, a layout may be symbolic
_MOST_LAYOUTS = 1024  # of one check: a run has some dozens


def once_per_layout(check: Callable[..., Checked]) -> Callable[..., Checked]:
    """A check that is made once for arguments of the same layout, and then remembered with its result.

    It may look at shapes, strides, dtypes and devices of tensors, and at whole numbers, not at where a tensor lies or
    what it holds. One that raises is not remembered. While gradients are recorded, or for other kinds of arguments,
    every call is checked.

    Args:
        check: its arguments are tensors, whole numbers, None, and sequences of these.
    """
    passed: dict[tuple[Any, ...], Checked] = {}

    @functools.wraps(check)
    def remembered(*values: Any) -> Checked:
        if torch.is_grad_enabled():
            return check(*values)
        layout: list[Any] = []
        pending = list(values)
        for value in pending:
            kind = type(value)
            if kind in _PLAIN:
                layout += value.shape, value.stride(), value.dtype, value.device
            elif value is None or kind is int:
                layout.append(value)
            elif isinstance(value, (tuple, list)):
                layout.append(len(value))
                pending += value  # the loop comes to these after all that are here
            else:
                return check(*values)
        key = tuple(layout)
        if key not in passed:
            if len(passed) >= _MOST_LAYOUTS:
                passed.clear()
            passed[key] = check(*values)
        return passed[key]

    return remembered


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; expected {', '.join(map(str, DTYPES))}")


def check_eps(eps: float) -> None:
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps}: a finite number of 0 or more expected")


def recorded(*tensors: torch.Tensor | None) -> bool:
    """True for a call that torch.compile or torch.export records and does not run.

    Then an op calls itself through torch.ops.dualparal, which tracers understand. Otherwise it does not: the
    dispatcher would cost each call more than the work of a small one.

    Raises:
        ValueError: a tensor asks for a gradient. Below the dispatcher, where an op checks, that is hidden.
    """
    if not torch.compiler.is_compiling() and type(tensors[0]) is torch.Tensor:
        return False
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("a tensor requires a gradient and these ops have none; use torch.inference_mode()")
    return True


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside, ``device`` is the current one, where Triton launches; nothing to do for tensors on the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def where(device: torch.device) -> dict[str, int]:
    """Device, stream and threads as csrc takes them. PyTorch's number of threads is ours."""
    if device.type == "cuda":
        return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream, "threads": 1}
    return {"device": -1, "stream": 0, "threads": torch.get_num_threads()}
