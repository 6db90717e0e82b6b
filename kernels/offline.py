"""Compiles a kernel for a GPU that is not there, and reads from the machine code what it will cost.

Registers, stack, shared memory, the width of loads and stores and whether wgmma runs asynchronously are all
decided by the compiler, so they can be checked without a card. Uses the ptxas, cuobjdump and nvdisasm that the
triton wheel carries. For tests and ``bench/kernel_report.py``; nothing here runs when a video is made.
"""

import importlib.util
import itertools
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ARCHS = (80, 89, 90, 100, 120)  # A100, Ada, Hopper, Blackwell for data centres, Blackwell for desks

_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # 4 bytes bear no mark
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_GMMA = re.compile(r"\b[HQI]GMMA\b")


class OfflineCase(NamedTuple):
    """A kernel as one launch would compile it. Ops list theirs as OFFLINE in triton_kernel.py."""

    name: str
    kernel: Any  # a @triton.jit function
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    fp_fusion: bool = True
    maxnreg: int | None = None
    archs: Sequence[int] = ARCHS  # those that it is for

    def compile(self, arch: int) -> "OfflineReport":
        options = (self.num_warps, self.num_stages, self.fp_fusion, self.maxnreg)
        return compile_offline(self.kernel, self.signature, self.constexprs, arch, *options)


@dataclass(frozen=True)
class OfflineReport:
    """The compiler's result for one kernel and one architecture."""

    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    triton: str  # version
    registers: int  # per thread
    stack: int  # bytes per thread
    local: int  # bytes per thread
    shared: int  # bytes per thread block
    spill_instructions: int  # loads and stores of local memory
    loads: Mapping[int, int]  # width in bytes -> number of instructions that read global memory
    stores: Mapping[int, int]  # the same, writing
    mma: int  # tensor core instructions that hold up their warp
    gmma: int  # wgmma instructions
    gmma_waits: int
    tma_loads: int
    exp2: int

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0 or self.spill_instructions > 0

    @property
    def serialised(self) -> bool:
        """True when every wgmma waits for the one before. ptxas does that, with a warning only, when it gives up."""
        return self.gmma > 0 and self.gmma_waits >= self.gmma

    def widths(self) -> str:
        """Loads and stores for people: ``3x16 2x4 / 2x16``."""
        return " / ".join(
            " ".join(f"{count}x{width}" for width, count in sorted(moves.items(), reverse=True)) or "-"
            for moves in (self.loads, self.stores)
        )


def compile_offline(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    fp_fusion: bool = True,
    maxnreg: int | None = None,
) -> OfflineReport:
    """Compiles ``kernel`` for ``arch`` and reads the result. Needs triton; needs no GPU and no driver.

    Args:
        kernel: a @triton.jit function. Under TRITON_INTERPRET there is nothing to compile.
        signature: the type of every argument that is not a constexpr: ``*bf16``, ``*fp32``, ``i32``, ``fp32``,
            ``tensordesc<bf16[1, 128, 128]>``. Pointers are taken to be multiples of 16, as those of torch are;
            a number that the JIT would find to be one says so: ``i32:16``.
        constexprs: the values of the other arguments.
        arch: compute capability times ten; 90 means sm_90a.
        num_warps, num_stages: as at a launch.
        fp_fusion: a product and a sum may become one instruction with one rounding: ``enable_fp_fusion`` of a launch.
        maxnreg: registers per thread that the compiler may use, as at a launch; None leaves it to its taste.

    Raises:
        ValueError: an argument of the kernel is in neither or both of signature and constexprs, or is unknown.
        RuntimeError: the tools of the triton wheel cannot read the result.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    given = [*signature, *constexprs]
    if sorted(given) != sorted(names):
        missing, unknown = sorted(set(names) - set(given)), sorted(set(given) - set(names))
        twice = sorted(set(signature) & set(constexprs))
        raise ValueError(
            f"{kernel.__name__}: missing {missing}, unknown {unknown}, given twice {twice}; "
            "every argument belongs in either signature or constexprs"
        )
    types = {name: type_.removesuffix(":16") for name, type_ in signature.items()}
    divisible = [name for name, type_ in signature.items() if type_.startswith("*") or type_.endswith(":16")]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, code = _disassemble(compiled.asm["cubin"])
    return OfflineReport(
        kernel=kernel.__name__,
        arch=arch,
        num_warps=num_warps,
        num_stages=num_stages,
        triton=triton.__version__,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=max(usage["SHARED"], compiled.metadata.shared),  # dynamic shared memory is not in the file
        spill_instructions=_count(r"\b(?:STL|LDL)\b", code),
        loads=_moves(r"LDG|LDGSTS", code),
        stores=_moves(r"STG", code),
        mma=_count(r"\b[HIQO]MMA\b", code),
        gmma=len(_GMMA.findall(code)),
        gmma_waits=_count(r"\bWARPGROUP\.DEPBAR\b", code),
        tma_loads=_count(r"\bUTMALDG\b", code),
        exp2=_count(r"\bMUFU\.EX2\b", code),
    )


@dataclass(frozen=True)
class HopperReport:
    """nvcc's result for one instance of csrc/attention_hopper.cu."""

    dtype: str
    head_dim: int
    registers: int  # per thread at launch
    stack: int  # bytes per thread
    local: int  # bytes per thread
    spill_instructions: int
    gmma: int
    gmma_waits: int
    exp2: int
    tma_loads: int
    tma_stores: int
    setmaxnreg: int
    warnings: tuple[str, ...]  # of ptxas: that it ignores setmaxnreg (C7508) or serialises wgmma (C7510, C7515)


def hopper_reports(nvcc: str, csrc: Path) -> list[HopperReport]:
    """Compiles attention_hopper.cu for sm_90a, as CMake does, and reads the result; a few seconds.

    Raises:
        RuntimeError: nvcc or the tools of the triton wheel fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        target = "-gencode=arch=compute_90a,code=sm_90a"
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            "--fmad=false",
            target,
            "-cubin",
            csrc / "attention_hopper.cu",
            "-o",
            cubin,
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr[-1000:]}")
        text = _dump(cubin)
    usage = {
        name: dict(zip(("REG", "STACK", "LOCAL"), map(int, numbers)))
        for name, *numbers in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    }
    found = []
    for section in text.split("Function : ")[1:]:
        name = section.split(maxsplit=1)[0]
        # dualparal::DType is 1 for bf16 and 2 for f16 (csrc/common.h).
        instance = re.search(r"attention_hopper_kernelI\w*?E(\d)ELi(\d+)E", name)
        if instance is None:
            raise RuntimeError(f"a kernel of another name: {name}")
        found.append(
            HopperReport(
                dtype={"1": "bf16", "2": "f16"}[instance[1]],
                head_dim=int(instance[2]),
                registers=usage[name]["REG"],
                stack=usage[name]["STACK"],
                local=usage[name]["LOCAL"],
                spill_instructions=_count(r"\b(?:STL|LDL)\b", section),
                gmma=len(_GMMA.findall(section)),
                gmma_waits=_count(r"\bWARPGROUP\.DEPBAR\b", section),
                exp2=_count(r"\bMUFU\.EX2\b", section),
                tma_loads=_count(r"\bUTMALDG\b", section),
                tma_stores=_count(r"\bUTMASTG\b", section),
                setmaxnreg=_count(r"\bUSETMAXREG\b", section),
                warnings=tuple(re.findall(r".*(?:warning|\(C7\d+\)).*", done.stderr)),
            )
        )
    return sorted(found, key=lambda report: (report.dtype, report.head_dim))


HOPPER_COLUMNS = ("dtype", "head dimension", "registers", "stack", "wgmma", "waits", "exp2", "TMA loads / stores")


def hopper_row(report: HopperReport) -> dict[str, str]:
    """One line of docs/kernels.md: its columns by name."""
    moves = f"{report.tma_loads} / {report.tma_stores}"
    values = (report.dtype, report.head_dim, report.registers, report.stack, report.gmma, report.gmma_waits)
    return dict(zip(HOPPER_COLUMNS, map(str, (*values, report.exp2, moves))))


def offline_cases() -> list[tuple[str, OfflineCase]]:
    """Every op's OFFLINE, with the name of the op. Needs triton."""
    import dualparal.kernels

    found = []
    for module in pkgutil.iter_modules(dualparal.kernels.__path__):
        name = f"dualparal.kernels.{module.name}.triton_kernel"
        if module.ispkg and importlib.util.find_spec(name):
            found += [(module.name, case) for case in importlib.import_module(name).OFFLINE]
    return found


COLUMNS = ("op", "case", "sm", "warps", "stages", "registers", "stack", "shared", "loads / stores", "tensor cores")


def row(op: str, case: OfflineCase, report: OfflineReport) -> dict[str, str]:
    """One line of docs/kernels.md: its columns by name."""
    if report.gmma:
        cores = f"{report.gmma} wgmma, {'serialised' if report.serialised else f'{report.gmma_waits} waits'}"
    else:
        cores = f"{report.mma} mma" if report.mma else ""
    values = (op, case.name, report.arch, report.num_warps, report.num_stages, report.registers, report.stack)
    return dict(zip(COLUMNS, map(str, (*values, report.shared, report.widths(), cores))))


def write_table(rows: list[dict[str, str]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_table(text: str, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """The rows of the first table in ``text`` that has these columns."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    start = lines.index(list(columns)) + 2
    return [dict(zip(columns, line)) for line in itertools.takewhile(bool, lines[start:])]


def replace_table(text: str, rows: list[dict[str, str]]) -> str:
    """``text`` with these rows in its table of the same columns."""
    before = write_table(read_table(text, list(rows[0])))
    if before not in text:
        raise ValueError("a table was not written by write_table")
    return text.replace(before, write_table(rows))


def read_widths(text: str) -> tuple[dict[int, int], dict[int, int]]:
    """``OfflineReport.widths()`` backwards: loads, stores."""
    loads, stores = (
        {int(width): int(count) for count, width in (move.split("x") for move in side.split() if "x" in move)}
        for side in text.split(" / ")
    )
    return loads, stores


def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and machine code of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        text = _dump(file)
    usage = _USAGE.search(text)
    assert usage is not None  # _dump looks
    return dict(zip(("REG", "STACK", "SHARED", "LOCAL"), map(int, usage.groups()))), text


def _dump(cubin: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode or _USAGE.search(text) is None or "EXIT" not in text:
        raise RuntimeError(f"cuobjdump ({command[0]}) does not read the kernel: {text[-500:] or 'no output'}")
    return text


def _count(pattern: str, code: str) -> int:
    return len(re.findall(pattern, code))


def _moves(instructions: str, code: str) -> dict[int, int]:
    """Width in bytes -> count, of the global memory instructions of these names."""
    moves: dict[int, int] = {}
    for modifiers in re.findall(rf"\b(?:{instructions})\.E((?:\.\w+)*)", code):
        width = next((_WIDTHS[part] for part in modifiers.split(".") if part in _WIDTHS), 4)
        moves[width] = moves.get(width, 0) + 1
    return moves
