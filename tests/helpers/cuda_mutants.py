"""Faults to put into the text of the CUDA kernels, and in which words the emulation finds them.

The table of docs/gpu.md has a line for each: file, name, and as what it is found.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# In words, what a message of tests/csrc/cuda/ or of cuda_checks.py says.
KINDS = {
    "a race": "race: ",
    "shared memory not written yet": "where nobody wrote",
    "out of bounds": "behind the end of shared memory|outside of every tensor|in front of every tensor|beyond its end",
    "written twice": "is written twice",
    "not written": "is not written",
    "misaligned": "misaligned: ",
    "threads that never meet": "deadlock: ",
    "a shuffle with the wrong mask": "a shuffle's mask leaves out|which takes no part",
    "a launch that CUDA refuses": "launch: cudaError",
    "a launch elsewhere": "launched on device",
    "another result": "differs",
}


def kind(message: str) -> str:
    """The kind of a message; the message itself where it is of none."""
    return next((name for name, pattern in KINDS.items() if re.search(pattern, message)), message)


class Mutant(NamedTuple):
    file: str  # of csrc/
    name: str
    before: str  # stands in the file once
    after: str
    found: str  # one of KINDS, or one "or" another: the order of threads decides

    @property
    def op(self) -> str:
        """Whose checks must find it."""
        return self.file.removesuffix(".cu") if self.file.endswith(".cu") else "residual_norm"

    @property
    def line(self) -> str:
        return f"| `{self.file}` | {self.name} | {self.found} |"


COMMON, NORM, ROPE, GUIDANCE = "common.cuh", "residual_norm.cu", "qk_norm_rope.cu", "combine_guidance.cu"
TRUNCATED = "unsigned bits; __builtin_memcpy(&bits, &x, 4); bits &= ~0xffffu; __builtin_memcpy(&x, &bits, 4); return "
FIRST_PASS = "float local = 0.0f;\n    for (int i = threadIdx.x * N; i "

MUTANTS = [
    Mutant(COMMON, "no barrier before a sum", "__syncthreads();  // the sum before this one may still be read", "",
           "a race"),
    Mutant(COMMON, "no barrier after the sums of the warps", "__syncthreads();\n    float total", "float total",
           "a race or shared memory not written yet"),
    Mutant(COMMON, "two lanes write a warp's sum", "% kWarp == 0", "% kWarp < 2", "a race"),
    Mutant(COMMON, "sums of 32 warps where there are 8", "int(blockDim.x) / kWarp", "kWarp",
           "shared memory not written yet"),
    Mutant(COMMON, "a shuffle of half a warp too few", "offset = kWarp / 2", "offset = kWarp / 4", "another result"),
    Mutant(COMMON, "mask of half a warp", "0xffffffffu", "0xffffu", "a shuffle with the wrong mask"),
    Mutant(COMMON, "bfloat16 cut off, not rounded", "return __float2bfloat16_rn", TRUNCATED + "__float2bfloat16_rn",
           "another result"),
    Mutant(COMMON, "another limit of rows", "limit = 12160", "limit = 12288", "another result"),
    Mutant(COMMON, "alignment to 2 bytes for 16", "% 16 == 0", "% 2 == 0", "misaligned"),
    Mutant(NORM, "one pack too many", f"{FIRST_PASS}< dim", f"{FIRST_PASS}<= dim", "out of bounds"),
    Mutant(NORM, "stride of single elements, not packs", "step = kThreads * N", "step = kThreads", "written twice"),
    Mutant(NORM, "gate not read", "gate = *reinterpret_cast<const Pack<float, N>*>(p.gate + i)", "(void)0",
           "another result"),
    Mutant(NORM, "variance around zero", "const float d = row[i + j] - mean", "const float d = row[i + j]",
           "another result"),
    Mutant(NORM, "no eps", " + p.eps", "", "another result"),
    Mutant(NORM, "a norm where none is asked for", "if (!p.h) return;", "", "out of bounds"),
    Mutant(NORM, "idle threads leave early", "if (!p.h) return;", "if (!p.h || int(threadIdx.x) * N >= dim) return;",
           "threads that never meet"),
    Mutant(NORM, "half of the shared memory", "row_bytes_in_shared(p.dim) :", "row_bytes_in_shared(p.dim) / 2 :",
           "out of bounds"),
    Mutant(NORM, "alignment of h not asked for", " && aligned16(p.h)", "", "misaligned"),
    Mutant(NORM, "rows that end within a pack", "aligned && p.dim % kPack<T> == 0", "aligned",
           "misaligned or out of bounds"),
    Mutant(NORM, "device not made current", "const DeviceGuard guard(device);", "", "a launch elsewhere"),
    Mutant(NORM, "default stream", "as<CUstream_st>(stream)", "nullptr", "a launch elsewhere"),
    Mutant(ROPE, "stride of k left out", "row * p.k_stride", "row * inner", "out of bounds"),
    Mutant(ROPE, "one row too many lent", "at >= lend.tokens", "at > lend.tokens", "out of bounds"),
    Mutant(ROPE, "rows lent from the first on", "row - lend.first", "row", "another result"),
    Mutant(ROPE, "q lent too", "part == 0 || at < 0", "at < 0", "written twice"),
    Mutant(ROPE, "keys lent as values", "part == 1 ? lend.keys", "part == 2 ? lend.keys", "another result"),
    Mutant(ROPE, "slot not looked at", "if (slot < 0 || slot >= lend.slots) __trap();", "", "out of bounds"),
    Mutant(ROPE, "packs across heads", "p.head_dim % N == 0 && ", "", "out of bounds"),
    Mutant(ROPE, "stride of v not asked for", " && p.v_stride % N == 0", "", "misaligned"),
    Mutant(ROPE, "alignment of a store not asked for", " && aligned16(lend.values)", "", "misaligned"),
    Mutant(ROPE, "no thread blocks for v", "dim3(unsigned(p.rows), 3)", "dim3(unsigned(p.rows), 2)", "not written"),
    Mutant(GUIDANCE, "one pack too many", "i < packs", "i <= packs", "out of bounds"),
    Mutant(GUIDANCE, "sizes that end within a pack", " && p.size % kPack<T> == 0", "", "not written"),
    Mutant(GUIDANCE, "stride of one thread block", "int64_t(gridDim.x) * kThreads", "kThreads", "written twice"),
    Mutant(GUIDANCE, "thread blocks rounded down", "(packs + kThreads - 1) / kThreads", "packs / kThreads",
           "a launch that CUDA refuses"),
    Mutant(GUIDANCE, "roundings in another order", "from + p.scale * (to_float(cond.at[j]) - from)",
           "p.scale * to_float(cond.at[j]) + (1.0f - p.scale) * from", "another result"),
]  # fmt: skip
