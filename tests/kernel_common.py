"""What the kernel tests share."""

from types import ModuleType

import pytest
import torch

from dualparal.kernels import backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU_ELEMENTS = 600_000  # larger cases are for benchmarks and GPUs

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def cases(module: ModuleType) -> list:
    return [
        pytest.param(case, id=case.name)
        for case in module.CASES
        if getattr(case, "elements", 0) <= CPU_ELEMENTS or torch.cuda.is_available()
    ]


def native(device: str) -> str:
    """The native backend of that device; the test is skipped where it was not built."""
    name = {"cpu": "cpp", "cuda": "cuda"}[device]
    reason = backend.absent(name, device)
    if reason:
        pytest.skip(reason)
    return name


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)
