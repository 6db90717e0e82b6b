"""The fused ops: one folder each, with a plain PyTorch definition, a public function and named shapes.

Lies in kernels/ of the repository and is installed as dualparal.kernels. Nothing is imported here: take an op
from its own folder, ``from dualparal.kernels.residual_norm import residual_norm``.
"""

if __name__ != "dualparal.kernels":
    # With the repository root on sys.path, `import kernels` finds this folder, where transformers and
    # diffusers mean a Hugging Face package of that name. Whatever is taken from here raises, but the bare
    # import must not: transformers 5 looks for __version__ unguarded, and `python -m ...` in the root would
    # fail on it.
    __path__ = []  # no op exists twice, under two names

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"cannot import {name!r}: this folder is dualparal.kernels, imported as {__name__!r} because the "
            "repository root is on sys.path; run from another directory, or import dualparal.kernels"
        )
