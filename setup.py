"""Package map and the native build; the metadata is in pyproject.toml.

CMake compiles csrc/ to dualparal._C. It needs a C++ compiler only: no torch, and nvcc only if present.
Three environment variables steer it: DUALPARAL_CUDA=0 leaves the CUDA sources out, DUALPARAL_CUDA_ARCHS
(a CMake list such as "90a-real;120a-real") replaces the default architectures;
DUALPARAL_README_ADDRESS is where links in the description on a package index lead.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def readme() -> str:
    """README.md for a package index, which has none of our files: links and pictures lead to DUALPARAL_README_ADDRESS,
    the place of the sources of this version, or where that is not said are their words alone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    address = os.environ.get("DUALPARAL_README_ADDRESS", "").rstrip("/")
    link = r"(!?)\[((?:[^\[\]]|`[^`]*`)*)\]\((?!https?:|#)([^)]+)\)"
    return re.sub(link, rf"\1[\2]({address}/\3)" if address else r"\2", text)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        temp = Path(self.build_temp).resolve() / "cmake"
        temp.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            # Every option is passed every time: the cache of an earlier build must not decide.
            "DUALPARAL_CUDA": os.environ.get("DUALPARAL_CUDA", "1"),
            "DUALPARAL_CUDA_ARCHS": os.environ.get("DUALPARAL_CUDA_ARCHS", ""),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        # --fresh: an isolated build leaves a cache that names a ninja and a pybind11 which are gone.
        subprocess.run(["cmake", "--fresh", "-S", ROOT, "-B", temp, "-G", "Ninja", *defines], check=True)
        subprocess.run(["cmake", "--build", temp], check=True)


setup(
    # kernels/ lies beside dualparal/ in the repository and inside it once installed.
    package_dir={"dualparal.kernels": "kernels"},
    packages=[
        *find_packages(include=["dualparal", "dualparal.*"]),
        "dualparal.kernels",
        *(f"dualparal.kernels.{name}" for name in find_packages("kernels")),
    ],
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("dualparal._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
