"""The choice of an attention backend: what each can do, and what ``auto`` means, decided once per process and kind.

A kind is (device, dtype, head dimension, length class). The decision is logged when it is made and kept until the
process ends: another backend has other roundings, and a video must not change its bits half-way.
"""

import functools
import importlib
import importlib.util
import logging

import torch

from .. import backend as backends
from .. import environment
from . import table

log = logging.getLogger("dualparal")

# The preferred first, among equals of the table and of a calibration.
BACKENDS = ("sdpa", "cudnn", "flash", "efficient", "flash-attn", "hopper", "triton", "reference")

# Have not run on any card: taken when asked for by name, or once a trial in a process of its own found them right
# (kernels.attention.calibrate.trial). Whoever sees one pass there may take it out of here.
UNTRIED = ("hopper",)

_HALVES = (torch.bfloat16, torch.float16)
_ALL = (torch.float32, *_HALVES)
# dtypes, then head dimensions as a step and a largest
_TAKES = {
    "sdpa": (_ALL, 1, None),
    "reference": (_ALL, 1, None),
    "cudnn": (_HALVES, 8, 128),
    "flash": (_HALVES, 8, 256),
    "efficient": (_ALL, 8, None),
    "flash-attn": (_HALVES, 8, 256),
    "hopper": (_HALVES, 64, 128),
}


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability, 86 for 8.6; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def absent(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why ``backend`` cannot run there, with what would help; empty when it can."""
    if backend == "sdpa" or backend == "reference":
        return ""
    if backend == "flash" and device.type == "cpu":
        return ""  # torch's own, for every dtype
    if device.type != "cuda":
        return f"it takes tensors on cuda, not on {device.type}"
    if torch.version.hip is not None:
        return "it has not been tried with ROCm"
    if architecture(device) < 80:
        return f"it needs a card of compute capability 8.0 or more, this one has {architecture(device) / 10:.1f}"
    if backend == "triton":
        return _absent_triton(dtype, head_dim)
    if backend == "hopper" and architecture(device) != 90:
        return f"it needs a card of compute capability 9.0, this one has {architecture(device) / 10:.1f}"
    dtypes, step, largest = _TAKES[backend]
    if dtype not in dtypes:
        return f"it takes {_list(dtypes)}, not {dtype}"
    if head_dim % step or (largest is not None and head_dim > largest):
        limit = "" if largest is None else f" up to {largest}"
        return f"it takes head dimensions that are multiples of {step}{limit}, not {head_dim}"
    if backend == "hopper":
        return _absent_hopper()
    if backend == "flash-attn":
        return _absent_package("flash_attn", "pip install flash-attn --no-build-isolation")
    return _refused_by_torch(backend, device, dtype, head_dim)


def _refused_by_torch(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Torch's word on its own kernels: the build may lack one, and the card may be newer than the build."""
    cuda = torch.backends.cuda
    x = torch.empty(1, 1, 128, head_dim, dtype=dtype, device=device)
    ask = {
        "cudnn": cuda.can_use_cudnn_attention,
        "flash": cuda.can_use_flash_attention,
        "efficient": cuda.can_use_efficient_attention,
    }[backend]
    if ask(cuda.SDPAParams(x, x, x, None, 0.0, False, False), False):
        return ""
    return (
        f"this torch ({torch.__version__}) refuses it for this card; torch.backends.cuda.{ask.__name__} with "
        "debug=True says why, and another build of torch may have it"
    )


def _absent_hopper() -> str:
    if backends.NOT_BUILT:
        return f"{backends.NOT_BUILT}; reinstall dualparal where there is a C++ compiler"
    archs = backends._C.build_info()["archs"]
    if not any(arch.startswith("90a") for arch in archs):
        built = f"for {' '.join(archs)}" if archs else "without CUDA"
        return (
            f"dualparal._C was built without sm_90a ({built}); reinstall dualparal where nvcc is on the PATH, with "
            "DUALPARAL_CUDA_ARCHS unset or 90a-real in it"
        )
    return ""


def _absent_triton(dtype: torch.dtype, head_dim: int) -> str:
    missing = _absent_package("triton", "pip install triton") or _absent_package(
        f"{__package__}.triton_kernel", "install another version of triton"
    )
    if missing:
        return missing
    from . import triton_kernel

    if dtype not in triton_kernel.DTYPES:
        return f"it takes {_list(triton_kernel.DTYPES)}, not {dtype}"
    if head_dim not in triton_kernel.HEAD_DIMS:
        return f"it takes head dimensions {_list(triton_kernel.HEAD_DIMS)}, not {head_dim}"
    return ""


def _absent_package(name: str, cure: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # a package built for another torch fails in ways of its own
        return f"{name} does not import ({error}); {cure}"
    return ""


def _list(items: tuple[object, ...]) -> str:
    return ", ".join(map(str, items))


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, k_rows: int, backend: str) -> str:
    """The backend that runs attention over ``k_rows`` keys.

    Raises:
        ValueError: ``backend``, or what the environment says in place of "auto", is unknown or cannot run.
    """
    if backend == "auto":
        return _auto(device, dtype, head_dim, table.length_class(k_rows))
    _check(backend, device, dtype, head_dim, f"attention: backend={backend!r}", "use backend='auto'")
    return backend


def _check(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, asked: str, way_out: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{asked} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
    reason = absent(backend, device, dtype, head_dim)
    if reason:
        raise ValueError(f"{asked} cannot run: {reason}; or {way_out}")


@functools.cache
def _auto(device: torch.device, dtype: torch.dtype, head_dim: int, length: str) -> str:
    asked = environment.attention_backend()
    if asked not in ("", "auto"):
        name = environment.ATTENTION_BACKEND
        _check(asked, device, dtype, head_dim, f"attention: {name}={asked}", f"unset {name}")
        chosen = table.Choice(asked, f"{name} asks for it")
    else:
        chosen = _from_tables(device, dtype, head_dim, length)
    kind = f"sm_{architecture(device)}" if device.type == "cuda" else device.type
    log.info(
        "attention on %s, %s, head dimension %d, %s keys: %s (%s)",
        kind,
        str(dtype).removeprefix("torch."),
        head_dim,
        f"{table.LONG} or more" if length == "long" else f"fewer than {table.LONG}",
        *chosen,
    )
    return chosen.backend


def _from_tables(device: torch.device, dtype: torch.dtype, head_dim: int, length: str) -> table.Choice:
    if device.type != "cuda":
        return table.Choice("sdpa", "nothing else is made for it")
    offers = []
    measured = table.measured_for(device).get((str(dtype).removeprefix("torch."), head_dim, length))
    if measured is not None:
        offers.append(table.Choice(measured, "measured on this machine"))
    offers += table.rules_for(architecture(device), torch.__version__, torch.backends.cudnn.version(), head_dim, length)
    passed_over = []
    for offer in offers:
        if offer.backend not in BACKENDS:  # a measured table of another version of dualparal
            passed_over.append(f"not {offer.backend}: it is unknown")
            continue
        reason = absent(offer.backend, device, dtype, head_dim)
        if not reason:
            return offer
        passed_over.append(f"not {offer.backend}: {reason}")
    return table.Choice("sdpa", "; ".join(passed_over) or "the table has no row for this kind")


def preview(device: torch.device) -> table.Choice:
    """The choice that "auto" would make there for blocks of Wan in bfloat16, and why; nothing is decided by asking."""
    asked = environment.attention_backend()
    if asked not in ("", "auto"):
        return table.Choice(asked, f"{environment.ATTENTION_BACKEND} asks for it")
    return _from_tables(device, torch.bfloat16, 128, "long")


def available(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """The backends that can run there, but for the slow definition and ``UNTRIED``."""
    left_out = ("reference", *UNTRIED)
    return [b for b in BACKENDS if b not in left_out and not absent(b, device, dtype, head_dim)]


def forget() -> None:
    """Decides anew from here on; for tests and after a calibration."""
    for function in (architecture, absent, _auto, table.measured_for):
        function.cache_clear()
