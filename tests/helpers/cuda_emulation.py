"""The CUDA kernels of csrc/ on a CPU, in place of ``dualparal._C``; needs g++ on Linux.

    emulator = build_emulator(folder)
    native = Emulated({op: build(op, emulator, folder) for op in PARAMS})
    with native.installed():
        residual_norm(x, eps=1e-6, backend="cuda")      # x on the CPU

``build`` compiles the text of csrc/<op>.cu over tests/csrc/cuda/, which says what is looked at. Two things in that
text are no C++ and are put into words of the emulation: ``kernel<<<...>>>(...)`` and ``extern __shared__``.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from dualparal.kernels import backend as backends
from places import CSRC, TESTS

COMPILER = shutil.which("g++")
EMULATOR = TESTS / "csrc" / "cuda"
SIZES = {code: dtype.itemsize for dtype, code in backends.DTYPES.items()}
DEVICE, STREAM = 1, 0x70  # where the kernels believe to run; device 0 is current before and after

# One rounding per operation, as CMakeLists.txt asks of nvcc.
FLAGS = ["-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
# -O0: every access stays as it is written, also that of a whole pack.
WATCHED = ["-O0", "-fsanitize=thread", "-fsanitize=bounds", "-fno-gnu-unique"]


class Fault(AssertionError):
    """What the emulation found wrong in a kernel."""


class ResidualNorm(ctypes.Structure):
    """ResidualNormParams of csrc/residual_norm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "gate", "weight", "bias", "x_new", "h")),
        *(("rows", ctypes.c_int64), ("dim", ctypes.c_int64), ("eps", ctypes.c_float), ("dtype", ctypes.c_int)),
    ]


class Lend(ctypes.Structure):
    """QkNormRopeLend of csrc/qk_norm_rope.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "slot")),
        *((name, ctypes.c_int64) for name in ("slots", "tokens", "first")),
    ]


class QkNormRope(ctypes.Structure):
    """QkNormRopeParams of csrc/qk_norm_rope.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "norm_q", "norm_k", "cos", "sin", "q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "head_dim", "k_stride", "v_stride")),
        *(("eps", ctypes.c_float), ("dtype", ctypes.c_int), ("lends", Lend * 2)),
    ]


class CombineGuidance(ctypes.Structure):
    """CombineGuidanceParams of csrc/combine_guidance.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cond", "uncond", "out")),
        *(("size", ctypes.c_int64), ("scale", ctypes.c_float), ("dtype", ctypes.c_int)),
    ]


PARAMS = {"residual_norm": ResidualNorm, "qk_norm_rope": QkNormRope, "combine_guidance": CombineGuidance}


def missing() -> str:
    """Why nothing can be built here; empty when it can."""
    return "" if sys.platform == "linux" and COMPILER else "needs g++ on Linux"


def translated(text: str) -> str:
    """The text of a .cu file as C++.

    Raises:
        ValueError: it has no launch of the form ``kernel<<<...>>>(...)``, or a word of CUDA stays.
    """
    text, launches = re.subn(r"(\w+)<<<(.*)>>>\(", r"emulated::launch(\2, \1, ", text)
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = static_cast<\1*>(emulated::dynamic_shared());", text
    )
    if not launches or "<<<" in text or "extern __shared__" in text:
        raise ValueError("a launch or a declaration of shared memory that the emulation cannot read")
    return text


class Emulator(NamedTuple):
    """What every kernel is compiled and linked with, built once."""

    headers: Path  # the standard library's, precompiled: two thirds of the time that a kernel takes
    objects: list[Path]


def call_compiler(*arguments: object) -> None:
    command = [str(argument) for argument in (COMPILER, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build_emulator(folder: Path) -> Emulator:
    """Compiles tests/csrc/cuda/ into ``folder``."""
    includes = [f"-I{EMULATOR}", f"-I{CSRC}"]
    headers, objects = folder / "standard.h", []
    headers.write_text("".join(f"#include <{name}>\n" for name in ("algorithm", "functional", "sstream", "stdexcept")))
    call_compiler(*FLAGS, *WATCHED, "-x", "c++-header", headers, "-o", f"{headers}.gch")
    for source in (EMULATOR / "threads.cpp", EMULATOR / "memory.cpp", CSRC / "rows.cpp"):
        objects.append(folder / f"{source.stem}.o")
        call_compiler(*FLAGS, "-O1", *includes, "-c", source, "-o", objects[-1])
    return Emulator(headers, objects)


def build_unit(name: str, text: str, emulator: Emulator, folder: Path) -> ctypes.CDLL:
    """Compiles C++ that calls the emulation and links it. Headers in ``folder`` go before those of csrc/."""
    source, unit, library = (folder / f"{name}.{suffix}" for suffix in ("cpp", "o", "so"))
    source.write_text(text)
    includes = ["-include", emulator.headers, f"-I{EMULATOR}", f"-I{CSRC}"]
    call_compiler(*FLAGS, *WATCHED, *includes, "-c", source, "-o", unit)
    call_compiler("-shared", "-Wl,-z,defs", unit, *emulator.objects, "-o", library)
    loaded = ctypes.CDLL(str(library))
    loaded.message.restype = ctypes.c_char_p
    return loaded


def build(op: str, emulator: Emulator, folder: Path, text: str = "") -> ctypes.CDLL:
    """The kernel of an op with its host code. ``text``: in place of that of its .cu file."""
    params = PARAMS[op]
    entry = f"""
        extern "C" __attribute__((visibility("default")))
        int run(const dualparal::{params.__name__}Params* params, int device, uintptr_t stream) {{
            static_assert(sizeof *params == {ctypes.sizeof(params)});
            return emulated::guarded([=] {{ dualparal::{op}_cuda(*params, device, stream); }});
        }}"""
    text = translated(text or (CSRC / f"{op}.cu").read_text())
    return build_unit(op, f"#define __CUDACC__\n{text}{entry}", emulator, folder)


def tell(library: ctypes.CDLL, name: str, start: int, rows: int, row_bytes: int, stride: int = 0, out: bool = False):
    """Says which addresses the next launch may use; ``start`` 0: a tensor that is absent."""
    if start:
        sizes = (ctypes.c_size_t(size) for size in (rows, row_bytes, stride or row_bytes))
        library.tensor(name.encode(), ctypes.c_void_p(start), *sizes, int(out))


class Emulated:
    """The three ops of ``dualparal._C``, with the same arguments, on tensors of the CPU."""

    def __init__(self, libraries: Mapping[str, ctypes.CDLL]) -> None:
        self.libraries = libraries

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, backend="cuda" of the ops is this."""
        where = {"device": DEVICE, "stream": STREAM, "threads": 1}
        with (
            mock.patch.object(backends, "_C", self, create=True),
            mock.patch.object(backends, "absent", lambda backend, device: "" if backend == "cuda" else "not asked for"),
            mock.patch.object(backends, "where", lambda device: where),
        ):
            yield

    def seed(self, number: int) -> None:
        """The order in which threads and thread blocks run from now on."""
        for library in self.libraries.values():
            library.seed(number)

    def residual_norm(self, **given: Any) -> None:
        library, row = self.libraries["residual_norm"], given["dim"] * SIZES[given["dtype"]]
        for name in ("x", "y", "x_new", "h"):
            tell(library, name, given[name], 1, given["rows"] * row, out=name in ("x_new", "h"))
        for name in ("gate", "weight", "bias"):
            tell(library, name, given[name], 1, 4 * given["dim"])
        self._run("residual_norm", given)

    def qk_norm_rope(self, **given: Any) -> None:
        library, rows, size = self.libraries["qk_norm_rope"], given["rows"], SIZES[given["dtype"]]
        inner = given["heads"] * given["head_dim"]
        tell(library, "qkv", given["qkv"], 1, rows * 3 * inner * size)
        for name in ("norm_q", "norm_k"):
            tell(library, name, given[name], 1, 4 * inner)
        for name in ("cos", "sin"):
            tell(library, name, given[name], 1, 4 * rows * (given["head_dim"] // 2))
        for name, stride in (("q", inner), ("k", given["k_stride"]), ("v", given["v_stride"])):
            tell(library, name, given[name], rows, inner * size, stride * size, out=True)
        for side, (keys, values, slot, slots, tokens, _) in enumerate(given["lends"]):
            tell(library, f"slot {side}", slot, 1, 8)
            number, slot_bytes = ctypes.c_int64.from_address(slot).value, tokens * inner * size
            for name, store in ((f"keys {side}", keys), (f"values {side}", values)):
                if 0 <= number < slots:
                    tell(library, name, store + number * slot_bytes, 1, slot_bytes, out=True)
        self._run("qk_norm_rope", {**given, "lends": (Lend * 2)(*(Lend(*lend) for lend in given["lends"]))})

    def combine_guidance(self, **given: Any) -> None:
        for name in ("cond", "uncond", "out"):
            size = given["size"] * SIZES[given["dtype"]]
            tell(self.libraries["combine_guidance"], name, given[name], 1, size, out=name == "out")
        self._run("combine_guidance", given)

    def _run(self, op: str, given: Mapping[str, Any]) -> None:
        library, params = self.libraries[op], PARAMS[op]
        call = params(**{name: given[name] for name, *_ in params._fields_})
        status = library.run(ctypes.byref(call), given["device"], ctypes.c_void_p(given["stream"]))
        if status:
            raise (Fault if status == 1 else ValueError)(library.message().decode())
        at_launch, now, stream = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        library.where(*(ctypes.byref(value) for value in (at_launch, now, stream)))
        if (at_launch.value, now.value, stream.value) != (given["device"], 0, given["stream"]):
            raise Fault(f"launched on device {at_launch.value}, stream {stream.value}; device {now.value} is left")


def shifted(tensor: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """A contiguous copy that begins ``elements`` behind an address that is a multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    copy = memory[elements:].view(tensor.shape)
    return copy.copy_(tensor)
