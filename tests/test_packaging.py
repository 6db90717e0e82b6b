"""The trap of two folders: kernels/ of the repository is dualparal.kernels, and nothing else."""

import subprocess
import sys
from pathlib import Path

import dualparal
import dualparal.kernels

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_kernels_of_the_repository_root_is_not_a_package():
    result = python("import kernels", ROOT)
    assert result.returncode != 0
    assert "ImportError: this folder is dualparal.kernels, imported as 'kernels'" in result.stderr


def test_diffusers_imports_in_the_repository_root():
    """It looks for a Hugging Face package named kernels, and must not take ours."""
    code = "import diffusers.models.attention_dispatch as d; from diffusers import WanTransformer3DModel"
    result = python(code, ROOT)
    assert result.returncode == 0, result.stderr


def test_ops_import_from_anywhere(tmp_path):
    code = "from dualparal.kernels.residual_norm import residual_norm; from dualparal.kernels.backend import choose"
    for cwd in (ROOT, tmp_path):
        result = python(code, cwd)
        assert result.returncode == 0, result.stderr


def test_importing_the_package_is_cheap(tmp_path):
    code = "import sys, dualparal, dualparal.kernels; print('torch' in sys.modules)"
    assert python(code, tmp_path).stdout.strip() == "False"


def test_version():
    from importlib.metadata import version

    assert version("dualparal") == dualparal.__version__
