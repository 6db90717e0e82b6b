"""The trap of two folders: kernels/ of the repository is dualparal.kernels, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import dualparal
import dualparal.kernels
from places import ROOT


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code, says",
    [
        (
            "from kernels import get_kernel",
            "ImportError: cannot import 'get_kernel': this folder is dualparal.kernels",
        ),
        (
            "import kernels; kernels.backend",
            "ImportError: cannot import 'backend': this folder is dualparal.kernels",
        ),
        ("import kernels.residual_norm", "ModuleNotFoundError: No module named 'kernels.residual_norm'"),
        ("from kernels.residual_norm import residual_norm", "ModuleNotFoundError"),
    ],
)
def test_nothing_can_be_taken_from_the_folder_itself(code, says):
    result = python(code, ROOT)
    assert result.returncode != 0
    assert says in result.stderr


def test_diffusers_imports_in_the_repository_root():
    """transformers and diffusers look for a Hugging Face package named kernels, and must not take ours."""
    code = """
from diffusers import WanTransformer3DModel
from transformers import UMT5EncoderModel
from transformers.utils import is_kernels_available
print(is_kernels_available())
"""
    result = python(code, ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "False"


def test_ops_import_from_anywhere(tmp_path):
    code = "from dualparal.kernels.residual_norm import residual_norm"
    for cwd in (ROOT, tmp_path):
        result = python(code, cwd)
        assert result.returncode == 0, result.stderr


def test_importing_the_package_is_cheap(tmp_path):
    code = "import sys, dualparal, dualparal.kernels; print('torch' in sys.modules)"
    assert python(code, tmp_path).stdout.strip() == "False"


def test_a_source_tree_finds_its_kernels_and_the_extension_of_an_installed_copy(tmp_path):
    """The clone's folder after a plain ``pip install .``: ./dualparal hides the installed package."""
    tree, installed = tmp_path / "clone", tmp_path / "site-packages"
    for name in ("dualparal", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "moving_shapes", "__pycache__"))
    (built,) = (ROOT / "dualparal").glob("_C*.so")
    (installed / "dualparal").mkdir(parents=True)
    shutil.copy(built, installed / "dualparal")
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path += sys.argv[1:]
import dualparal.kernels.backend, dualparal.engine.engine
print(dualparal.kernels.__file__, dualparal.kernels.backend.NOT_BUILT or sys.modules["dualparal._C"].__file__)
"""
    for sites, extension in (([installed], installed / "dualparal" / built.name), ([], "dualparal._C does not import")):
        command = [sys.executable, "-c", code, *map(str, sites)]
        result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{tree / 'kernels' / '__init__.py'} {extension}")


def test_version():
    from importlib.metadata import version

    assert version("dualparal") == dualparal.__version__


def test_the_model_of_the_package_is_small():
    folder = Path(dualparal.__file__).with_name("moving_shapes")
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"model_index.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) <= 16e6


def test_a_source_distribution_holds_what_is_tracked_and_needed(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    clean = tmp_path / "clean"  # what an earlier build left beside the sources must not decide
    for name in files:
        (clean / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clean / name)
    for name in ("csrc/built.so", "kernels/built.so", "tests/built.pyc"):
        (clean / name).touch()
    code = f"import setuptools.build_meta as build; print(build.build_sdist({str(tmp_path)!r}))"
    result = python(code, clean)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in (m.name for m in archive if not m.isdir())}
        links = [m.name for m in archive if not (m.isfile() or m.isdir())]
    generated = {"PKG-INFO", "setup.cfg"} | {name for name in held if name.startswith("dualparal.egg-info/")}
    parts = ("csrc/", "dualparal/", "examples/", "integrations/", "kernels/", "tests/")
    single = {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "SECURITY.md", "constraints.txt"}
    needed = {name for name in files if name.startswith(parts)} | single | {"pyproject.toml", "setup.py"}
    assert held - generated == needed
    assert not links


def test_dependencies_are_bounded():
    """Those of the build from above, so that a release of tomorrow cannot change it; ours from below, at the fixes."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (build,) = re.findall(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    assert re.findall(r'"([^"]+)"', build) and all("<" in entry for entry in re.findall(r'"([^"]+)"', build))
    runtime = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    lowest = dict(re.findall(r'"(\w+)>=([\d.]+)"', runtime))
    tested = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"diffusers", "transformers", "safetensors", "torch"} <= set(lowest) <= set(tested)

    def number(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    assert [name for name in lowest if number(tested[name]) < number(lowest[name])] == []
    fixed = {"diffusers": "0.38", "transformers": "5.5", "av": "17.1"}
    assert [name for name in fixed if number(lowest[name]) < number(fixed[name])] == []


@pytest.mark.parametrize("address", ["", "https://example.org/tree"])
def test_the_readme_of_a_wheel_has_no_picture_that_a_package_index_cannot_load(tmp_path, address):
    code = f"import setuptools.build_meta as build; print(build.prepare_metadata_for_build_wheel({str(tmp_path)!r}))"
    clean = tmp_path / "clean"
    (clean / "kernels").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "dualparal/__init__.py", "dualparal/version.py"):
        (clean / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, clean / name)
    environment = {**os.environ, "DUALPARAL_README_ADDRESS": address}
    result = subprocess.run([sys.executable, "-c", code], cwd=clean, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert "Description-Content-Type: text/markdown" in text and "# " in text
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert all(target.startswith("https://") for target in targets) and bool(targets) == bool(address)
    assert ("![frames of a video" in text) == bool(address)
