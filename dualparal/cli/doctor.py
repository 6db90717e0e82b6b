"""The report of ``dualparal doctor``: what is installed, what was built, what is missing and what that costs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

from dualparal.config.units import GIB


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def report() -> str:
    """The report as text, one fact per line."""
    lines = [
        f"dualparal      {_version('dualparal')}",
        f"python         {platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} CPUs",
    ]
    lines += [
        f"{name:14s} {_version(name)}"
        for name in ("torch", "triton", "diffusers", "transformers", "safetensors", "av", "flash-attn")
    ]
    lines += _extension() + _devices() + _attention() + _video()
    return "\n".join(lines)


def _extension() -> list[str]:
    try:
        from dualparal import _C
    except ImportError as error:
        return [f"extension      missing ({error}): plain torch is used instead; reinstall with a C++ compiler"]
    info = dict(_C.build_info())
    lines = ["extension      built with " + ", ".join(f"{key} {value}" for key, value in info.items())]
    if not info.get("cuda"):
        lines.append("               no CUDA code in it: install the CUDA toolkit (nvcc) and reinstall for GPUs")
    return lines


def _devices() -> list[str]:
    try:
        import torch
    except ImportError as error:
        return [f"devices        unknown: torch cannot be imported ({error})"]
    if not torch.cuda.is_available():
        reason = "this torch is a CPU build" if torch.version.cuda is None else "no usable GPU or driver"
        return [f"gpus           none ({reason}): use --device cpu"]
    lines = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        lines.append(
            f"gpu {index}          {card.name}, sm_{card.major}{card.minor}, {card.total_memory / GIB:.0f} GiB"
        )
    lines.append(
        f"cudnn          {torch.backends.cudnn.version()}, nccl {'.'.join(map(str, torch.cuda.nccl.version()))}"
    )
    return lines


def _attention() -> list[str]:
    try:
        import torch

        from dualparal.kernels.attention import choice
    except ImportError as error:
        return [f"attention      unknown: {error}"]
    on_gpu = torch.cuda.is_available()
    chosen = choice.preview(torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    lines = [f"attention      {chosen.backend} ({chosen.basis})"]
    if on_gpu and not chosen.basis.startswith("measured"):
        lines.append("               'dualparal calibrate' measures what is the fastest here")
    return lines


def _video() -> list[str]:
    try:
        import av

        av.codec.Codec("libx264", "w")
    except ImportError:
        return ["video          av is missing: only PNG files can be written; pip install av"]
    except Exception:  # PyAV's errors for a codec it lacks differ between versions
        return ["video          this av has no libx264: only PNG files can be written"]
    return ["video          libx264 ready"]


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
