"""The fused ops: one folder each, with a plain PyTorch definition, a public function and named test shapes.

Lies in kernels/ of the repository and is installed as dualparal.kernels. Nothing is imported here: take an op
from its own folder, ``from dualparal.kernels.residual_norm import residual_norm``.
"""

if __name__ != "dualparal.kernels":
    # In the repository root `import kernels` finds this folder, where diffusers means a Hugging Face package
    # of the same name. That package is optional there, and so an ImportError is the answer it understands.
    raise ImportError(
        f"this folder is dualparal.kernels, imported as {__name__!r}: the repository root is on sys.path; "
        "install with `pip install -e .` and import dualparal.kernels"
    )
