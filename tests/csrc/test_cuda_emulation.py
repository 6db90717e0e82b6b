"""The CUDA kernels of the passes on a CPU: their own text over tests/csrc/cuda/, which says what it looks at.

The same comparisons, with the same tolerances, as tests/kernels/ makes on a card, with threads in many orders. Whether
nvcc and a card do what the text says, only a card can tell.
"""

import ctypes
import re
from functools import partial

import pytest
import torch

import cuda_emulation as emulation
from cuda_checks import (
    EPS,
    GUIDANCE_POINTERS,
    NORM_POINTERS,
    ROPE_POINTERS,
    check_constant_rows,
    check_guidance,
    check_guidance_pointer,
    check_longest_row,
    check_norm,
    check_norm_pointer,
    check_rope,
    check_rope_pointer,
    check_slot,
    norm_inputs,
    rope_inputs,
    run_rope,
)
from cuda_emulation import Emulated
from cuda_mutants import MUTANTS, kind
from dualparal.kernels.combine_guidance import cases as guidance_cases
from dualparal.kernels.qk_norm_rope import cases as rope_cases
from dualparal.kernels.qk_norm_rope import qk_norm_rope
from dualparal.kernels.residual_norm import cases as norm_cases
from dualparal.kernels.residual_norm import residual_norm
from kernel_common import DTYPES
from places import CSRC, DOCS

ROWS = 4  # of every case: rows do not know each other
SHIFTS = pytest.mark.parametrize("shift", [False, True], ids=["aligned", "shifted"])


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if emulation.missing():
        pytest.skip(emulation.missing())
    return emulation.build_emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def native(emulator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return Emulated({op: emulation.build(op, emulator, folder) for op in emulation.PARAMS})


# The kernels as they are -------------------------------------------------------------------------------------------

NORM_CASES = [case._replace(rows=min(case.rows, ROWS)) for case in norm_cases.CASES if case.rows]
ROPE_CASES = [case._replace(rows=min(case.rows, ROWS)) for case in rope_cases.CASES if case.rows and not case.lends]
LENDING = [case for case in rope_cases.CASES if case.lends and case.rows < 10]
ACROSS = rope_cases.Case("pack-across-heads", rows=3, heads=4, head_dim=6)
SHAPES = {
    case.name: [min(size, 2100 if len(case.shape) == 1 else 16) for size in case.shape]
    for case in guidance_cases.CASES
    if 0 not in case.shape
}


@pytest.mark.sampled(4)
@SHIFTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: case.name)
def test_residual_norm(native, case, dtype, shift):
    check_norm(native, case, dtype, shift)


def test_every_kernel_of_a_pass_is_here():
    assert {path.stem for path in CSRC.glob("*.cu")} == {*emulation.PARAMS, "attention_hopper"}  # which has its own


def test_ends_of_residual_norm(native):
    check_constant_rows(native)
    check_longest_row(native)


@pytest.mark.sampled(4)
@SHIFTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*ROPE_CASES, *LENDING, ACROSS], ids=lambda case: case.name)
def test_qk_norm_rope(native, case, dtype, shift):
    check_rope(native, case, dtype, shift)


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_that_is_not_there(native, slot):
    check_slot(native, slot)


@SHIFTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_combine_guidance(native, shape, dtype, shift):
    check_guidance(native, shape, dtype, shift)


def test_each_thread_block_comes_back(emulator, tmp_path):
    """More elements than the largest grid has threads for; here the largest grid is two thread blocks."""
    text = (CSRC / "combine_guidance.cu").read_text()
    assert text.count("1 << 16") == 1
    library = emulation.build("combine_guidance", emulator, tmp_path, text.replace("1 << 16", "2"))
    for shift in (False, True):
        check_guidance(Emulated({"combine_guidance": library}), (20_003,), torch.float32, shift)
        check_guidance(Emulated({"combine_guidance": library}), (20_000,), torch.bfloat16, shift)


@pytest.mark.parametrize("off", NORM_POINTERS)
def test_one_pointer_of_residual_norm_is_off(native, off):
    check_norm_pointer(native, off)


@pytest.mark.parametrize("off", ["", *ROPE_POINTERS])
def test_one_pointer_of_qk_norm_rope_is_off(native, off):
    check_rope_pointer(native, off)


@pytest.mark.parametrize("stride", ["k_stride", "v_stride"])
def test_one_stride_of_qk_norm_rope_is_off(native, stride):
    check_rope_pointer(native, **{stride: 33})


@pytest.mark.parametrize("off", GUIDANCE_POINTERS)
def test_one_pointer_of_combine_guidance_is_off(native, off):
    check_guidance_pointer(native, off)


def test_the_order_of_threads_does_not_matter(native):
    """A cached key is the key that would be made again: the same bits in every order."""
    norm = norm_inputs(norm_cases.Case("", 3, 515), torch.bfloat16)
    rope_case = rope_cases.Case("", 3, 5, 6)
    rope = rope_inputs(rope_case, torch.bfloat16)
    results = []
    for seed in range(40):
        native.seed(seed)
        with native.installed():
            made = run_rope(rope_case, rope, partial(qk_norm_rope, backend="cuda"), False)[:3]
            results.append([*residual_norm(*norm, eps=EPS, backend="cuda"), *made])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


# What is looked at -------------------------------------------------------------------------------------------------

FAULTS = {
    "read, then written": r"race: thread \d+ (reads|writes) byte \d+ of shared memory that thread \d+ (wrote|read)",
    "written by two": r"race: thread \d+ writes byte \d+ of shared memory that thread \d+ (wrote|read)",
    "barrier of some": "deadlock: 40 threads wait at a barrier, 24 at shuffles, 0 have ended",
    "two barriers": "threads wait for each other at different barriers",
    "shuffle of some": "threads wait for each other at different shuffles",
    "lane outside": r"a shuffle reads lane \d+, which takes no part",
    "mask without its caller": "a shuffle's mask leaves out who calls it",
    "two shuffles": "threads wait for each other at different shuffles",
    "shared memory not written": "shared memory is read at byte 0, where nobody wrote",
    "behind shared memory": r"\d+ bytes behind the end of shared memory",
    "behind an output": r"an address outside of every tensor is used, \d+ bytes behind the end of out",
    "before everything": "an address in front of every tensor is used",
    "twice": "byte 0 of out is written twice",
    "left out": "byte 20 of out is not written",
    "input": "in is written, an input",
    "output": "out is read, an output",
    "misaligned": "misaligned: 8 bytes at once",
    "index": r"index \d+ of an array that is shorter",
    "for ever": "the kernel does not end",
    "trap": "trap",
    "too many threads": "cudaErrorInvalidConfiguration",
    "too much shared memory": "cudaErrorInvalidValue",
}


@pytest.fixture(scope="module")
def faulty(emulator, tmp_path_factory):
    """Runs tests/csrc/cuda/faults.cu with the fault of that number; what was found, in words."""
    text = emulation.translated((emulation.EMULATOR / "faults.cu").read_text())
    library = emulation.build_unit("faults", f"#define __CUDACC__\n{text}", emulator, tmp_path_factory.mktemp("faults"))

    def run(number: int) -> str:
        given, out = torch.ones(64), torch.full((64,), torch.nan)
        emulation.tell(library, "in", given.data_ptr(), 1, 256)
        emulation.tell(library, "out", out.data_ptr(), 1, 256, out=True)
        status = library.run(ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()), number)
        assert status or torch.equal(out, 2 * given)
        return library.message().decode() if status else ""

    return run


def test_nothing_is_found_where_nothing_is_wrong(faulty):
    assert not faulty(0)


@pytest.mark.parametrize("number, says", list(enumerate(FAULTS.values(), 1)), ids=FAULTS.keys())
def test_each_fault_is_found(faulty, number, says):
    assert re.search(says, faulty(number))
    assert not faulty(0)  # and forgotten


@pytest.mark.parametrize(
    "text", ["void f() {}", "kernel<<<1, 2,\n3>>>(p);", "extern __shared__ T a[], b[]; k<<<1>>>(p)"]
)
def test_text_that_is_not_understood(text):
    with pytest.raises(ValueError, match="that the emulation cannot read"):
        emulation.translated(text)


# Faults put into the kernels ---------------------------------------------------------------------------------------

CHECKS = {
    "residual_norm": [
        *(partial(check_norm_pointer, off=off) for off in NORM_POINTERS),
        *(partial(check_norm, case=case, dtype=dtype) for case in NORM_CASES[3:8] for dtype in DTYPES[:2]),
        *(check_constant_rows, check_longest_row),
    ],
    "qk_norm_rope": [
        *(partial(check_rope, case=case, dtype=torch.bfloat16) for case in [*LENDING, ACROSS]),
        *(partial(check_rope_pointer, off=off) for off in ROPE_POINTERS),
        *(partial(check_rope_pointer, **{stride: 33}) for stride in ("k_stride", "v_stride")),
        *(partial(check_slot, slot=slot) for slot in (-1, 2)),
    ],
    "combine_guidance": [
        *(partial(check_guidance_pointer, off=off) for off in GUIDANCE_POINTERS),
        *(partial(check_guidance, shape=shape, dtype=dtype) for shape in SHAPES.values() for dtype in DTYPES[:2]),
    ],
}


def first_problem(native: Emulated, op: str) -> str:
    for seed, check in enumerate(CHECKS[op]):
        native.seed(seed)
        try:
            check(native)
        except (AssertionError, ValueError) as error:
            return kind(str(error))
    return "nothing"


@pytest.mark.parametrize("op", CHECKS)
def test_the_checks_find_nothing(native, op):
    assert first_problem(native, op) == "nothing"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.op}: {mutant.name}")
def test_the_emulation_finds(emulator, tmp_path, mutant):
    text = (CSRC / mutant.file).read_text()
    assert text.count(mutant.before) == 1
    text = text.replace(mutant.before, mutant.after)
    own = mutant.file.endswith(".cu")
    if not own:
        (tmp_path / mutant.file).write_text(text)
    library = emulation.build(mutant.op, emulator, tmp_path, text if own else "")
    assert first_problem(Emulated({mutant.op: library}), mutant.op) in mutant.found.split(" or ")


def test_docs_name_every_mutant():
    lines = (DOCS / "gpu.md").read_text().splitlines()
    assert [line for line in lines if line.startswith(("| `common.cuh`", *(f"| `{op}.cu`" for op in CHECKS)))] == [
        mutant.line for mutant in MUTANTS
    ]
