import pytest
import torch

from dualparal.kernels.accuracy import nan_filled_memory
from dualparal.kernels.combine_guidance import cases as named
from dualparal.kernels.combine_guidance import combine_guidance
from kernel_common import DEVICES, DTYPES, cases, native, random


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases(named))
def test_equals_torch(case, dtype, device):
    cond = random(*case.shape, dtype=dtype, device=device, seed=1)
    uncond = random(*case.shape, dtype=dtype, device=device, seed=2)
    with nan_filled_memory():
        ours = combine_guidance(cond, uncond, 5.3, backend=native(device))
    # Three operations, each rounded once: there is only one right answer.
    assert torch.equal(ours, combine_guidance(cond, uncond, 5.3, backend="torch"))


def test_diffusers_arithmetic():
    cond, uncond = random(2, 16, 3, 8, 8)
    assert torch.equal(combine_guidance(cond, uncond, 5.0), uncond + 5.0 * (cond - uncond))


def test_threads_do_not_matter():
    backend = native("cpu")
    cond, uncond = random(2, 100_003, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(combine_guidance(cond, uncond, 5.0, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


X = torch.zeros(2, 3)
BAD = {
    "shape": ((X, torch.zeros(3, 2), 5.0), "[3, 2]"),
    "dtype": ((X, X.bfloat16(), 5.0), "torch.bfloat16"),
    "integers": ((X.long(), X.long(), 5.0), "torch.int64"),
    "not contiguous": ((X.T, X.T, 5.0), "(1, 3)"),
    "scale": ((X, X, float("nan")), "scale=nan"),
}


@pytest.mark.parametrize("args, says", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(args, says):
    with pytest.raises(ValueError) as error:
        combine_guidance(*args)
    assert says in str(error.value)
