"""The C++ and CUDA sources by themselves: under sanitizers, and as ptxas sees them. Both need a compiler only."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
WORKER = Path(__file__).parent / "workers" / "sanitized.py"
COMPILER = shutil.which("g++")
NVCC = shutil.which("nvcc")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=variables, check=False)


def runtime(name: str) -> Path:
    """The shared library of a sanitizer; where there is none, g++ gives the bare name back."""
    return Path(run(COMPILER, f"-print-file-name={name}").stdout.strip())


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A function that runs the worker with the CPU sources built under AddressSanitizer and UBSan."""
    pybind11 = pytest.importorskip("pybind11")
    if sys.platform != "linux" or COMPILER is None:
        pytest.skip("needs g++ on Linux")
    libraries = [runtime(name) for name in ("libasan.so", "libubsan.so")]
    if not all(library.is_absolute() for library in libraries):
        pytest.skip("g++ has no sanitizer libraries")
    folder = tmp_path_factory.mktemp("sanitized")
    headers = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    flags = ["-std=c++17", "-O0", "-g1", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off", *SANITIZE]

    # One unit for all: most of the time goes into pybind11's templates, once per unit.
    unit = folder / "all.cpp"
    unit.write_text("".join(f'#include "{source}"\n' for source in sorted(CSRC.glob("*.cpp"))))
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    done = run(COMPILER, *flags, '-DDUALPARAL_ARCHS=""', *headers, unit, "-shared", "-o", library)
    assert done.returncode == 0, done.stderr

    def drive(what: str) -> subprocess.CompletedProcess[str]:
        return run(
            *(sys.executable, WORKER, folder, what),
            LD_PRELOAD=" ".join(map(str, libraries)),
            ASAN_OPTIONS="detect_leaks=0:abort_on_error=0",  # Python itself keeps memory until the end
            UBSAN_OPTIONS="print_stacktrace=1",
            PYTHONMALLOC="malloc",
        )

    return drive


@pytest.mark.parametrize("what", ["good", "bad"])
def test_sanitizers_find_nothing(sanitized, what):
    done = sanitized(what)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr
    assert int(done.stdout.split()[0]) > 50


def test_sanitizers_are_awake(sanitized):
    done = sanitized("overflow")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "residual_norm" in done.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "89", "90a", "100a", "120a"])
@pytest.mark.parametrize(  # the kernel for Hopper: test_kernels_attention_hopper.py
    "source", sorted(path for path in CSRC.glob("*.cu") if "hopper" not in path.stem), ids=lambda path: path.stem
)
def test_cuda_kernels_do_not_spill(source, arch, tmp_path):
    if f"sm_{arch.rstrip('a')}" not in run(NVCC, "--list-gpu-code").stdout:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", f"-arch=sm_{arch}"]
    done = run(NVCC, *flags, "-cubin", source, "-o", tmp_path / "kernel.cubin")
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    # Three dtypes, with packs of 16 bytes and without; qk_norm_rope with lends and without.
    assert len(frames) == (12 if source.stem == "qk_norm_rope" else 6)
    assert set(frames) == {("0", "0", "0")}, done.stderr
