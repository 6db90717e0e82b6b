"""Which implementation of an op runs, and what every op checks and passes on the way there.

``backend="auto"`` takes the first of the op's backends that can run on the tensors' device, decides once per
op and device type, and says so once at INFO. A backend asked for by name runs or raises.
"""

import functools
import logging
from collections.abc import Sequence

import torch  # before _C: both then share one OpenMP runtime, and one pool of threads

try:
    from dualparal import _C

    NOT_BUILT = ""
except ImportError as error:
    # Not fatal: every op has a PyTorch definition. The reason is told wherever it changes a choice.
    NOT_BUILT = f"dualparal._C does not import ({error})"

log = logging.getLogger("dualparal")

NATIVE = ("cpp", "cuda", "torch")  # the usual backends of an op, the preferred one first
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the codes of csrc/common.h


@functools.cache
def absent(backend: str, device_type: str) -> str:
    """Why ``backend`` cannot run on this type of device; empty when it can."""
    if backend in ("cpp", "cuda"):
        wanted = "cpu" if backend == "cpp" else "cuda"
        if device_type != wanted:
            return f"it takes tensors on {wanted}, not on {device_type}"
        if NOT_BUILT:
            return f"{NOT_BUILT}; reinstall dualparal where there is a C++ compiler"
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


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; expected {', '.join(map(str, DTYPES))}")


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def where(device: torch.device) -> dict[str, int]:
    """Device, stream and threads as csrc takes them. PyTorch's number of threads is ours."""
    if device.type == "cuda":
        return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream, "threads": 1}
    return {"device": -1, "stream": 0, "threads": torch.get_num_threads()}
