"""What the kernel tests share."""

from types import ModuleType

import pytest
import torch

from dualparal.kernels import backend
from dualparal.kernels.qk_norm_rope import Lend

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


class Stores:
    """For every lend of a case of qk_norm_rope: stores of three slots in the middle of NaN, to be written once."""

    def __init__(self, case, dtype: torch.dtype, device: str = "cpu") -> None:
        self.memory, self.lends = [], []
        for slot, (first, tokens) in enumerate(case.lends, start=1):
            memory = torch.full((2, 5, tokens, case.inner), torch.nan, dtype=dtype, device=device)
            self.memory.append(memory)
            self.lends.append(Lend(*memory[:, 1:4], torch.tensor([slot], device=device), first))

    def check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """The slots hold the rows lent, and nothing else was written."""
        for memory, (keys, values, slot, first) in zip(self.memory, self.lends):
            for store, made in ((keys, k), (values, v)):
                assert torch.equal(store[int(slot)], made[first : first + store.shape[1]])
            assert memory.isnan().sum() == memory.numel() // 5 * 4
