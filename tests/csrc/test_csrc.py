"""The C++ and CUDA sources by themselves: under sanitizers, and as ptxas sees them. Both need a compiler only."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sanitizers
from places import CSRC, TESTS, WORKERS

WORKER = WORKERS / "sanitized.py"
FUZZ = TESTS / "helpers" / "fuzz.py"
NVCC = shutil.which("nvcc")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=variables, check=False)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A function that runs a Python script where ``DUALPARAL_FUZZ_EXTENSION`` has the CPU sources under sanitizers."""
    if sanitizers.missing():
        pytest.skip(sanitizers.missing())
    folder = tmp_path_factory.mktemp("sanitized")
    environment = {**sanitizers.build(folder), "DUALPARAL_FUZZ_EXTENSION": str(folder)}

    def drive(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, script, *(a if a != "FOLDER" else folder for a in arguments), **environment)

    return drive


@pytest.mark.parametrize("what", ["good", "bad"])
def test_sanitizers_find_nothing(sanitized, what):
    done = sanitized(WORKER, "FOLDER", what)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr
    assert int(done.stdout.split()[0]) > 50


def test_sanitizers_are_awake(sanitized):
    done = sanitized(WORKER, "FOLDER", "overflow")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "residual_norm" in done.stderr


def test_sanitizers_find_nothing_in_random_calls(sanitized):
    done = sanitized(FUZZ, "extension", "--inputs", 10_000)
    assert done.returncode == 0 and "| ok |" in done.stdout, done.stdout + done.stderr
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.sampled(2)  # each source for two or three cards, and each card
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
