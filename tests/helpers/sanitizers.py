"""Builds the CPU sources of csrc/ under AddressSanitizer and UBSan; needs g++ on Linux and pybind11."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from places import CSRC

COMPILER = shutil.which("g++")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
LIBRARIES = ("libasan.so", "libubsan.so")


def missing() -> str:
    """Why it cannot be built here; empty when it can."""
    if sys.platform != "linux" or COMPILER is None:
        return "needs g++ on Linux"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    # Where there is none, g++ gives the bare name back.
    return "" if all(_runtime(name).is_absolute() for name in LIBRARIES) else "g++ has no sanitizer libraries"


def build(folder: Path) -> dict[str, str]:
    """Puts ``_C`` into ``folder``; returns the environment in which Python can import it."""
    import pybind11

    headers = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    flags = ["-std=c++17", "-O0", "-g1", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=off", *SANITIZE]
    # One unit for all: most of the time goes into pybind11's templates, once per unit.
    unit = folder / "all.cpp"
    unit.write_text("".join(f'#include "{source}"\n' for source in sorted(CSRC.glob("*.cpp"))))
    library = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [str(COMPILER), *flags, '-DDUALPARAL_ARCHS=""', *headers, str(unit), "-shared", "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {
        "LD_PRELOAD": " ".join(str(_runtime(name)) for name in LIBRARIES),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python itself keeps memory until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def _runtime(name: str) -> Path:
    """The shared library of a sanitizer."""
    command = [str(COMPILER), f"-print-file-name={name}"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
