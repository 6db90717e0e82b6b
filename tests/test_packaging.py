"""The trap of two folders: kernels/ of the repository is dualparal.kernels, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

import dualparal
import dualparal.kernels

ROOT = Path(__file__).resolve().parents[1]


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


def test_version():
    from importlib.metadata import version

    assert version("dualparal") == dualparal.__version__


def test_the_model_of_the_package_is_small():
    folder = Path(dualparal.__file__).with_name("moving_shapes")
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"model_index.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) <= 16e6
