"""Sources of an engine's model: a directory, a hub id, the model of the package, or a loaded pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from dualparal.config.eight_bit import LINEAR_OFF, LinearPolicy
from dualparal.models.base import ModelSpec, Slice
from dualparal.models.files import ModelFiles
from dualparal.models.json_files import ModelError, shorten
from dualparal.models.registry import BUILT_IN, BUILT_IN_FOLDER, Family

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]


class ModelSource(Protocol):
    """The source of an engine's model: files (``ModelFiles``), or a pipeline that the user has loaded."""

    @property
    def family(self) -> Family:
        """The family of the model's pipeline class."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """Facts of the model."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short text that differs between models of other sizes, for ranks to compare."""
        ...

    def load_slices(
        self, layers: range, dtype: torch.dtype, device: torch.device, linear_8bit: LinearPolicy = LINEAR_OFF
    ) -> list[Slice]:
        """One slice of these layers per expert, on ``device`` in ``dtype``.

        Some tensors stay in float32, and the linears that ``linear_8bit`` covers are in 8 bits.
        """
        ...

    def load_scheduler(self) -> Any:
        """The pipeline's diffusers scheduler."""
        ...

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline's VAE on ``device`` in ``dtype``."""
        ...

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """Returns (tokenizer, text encoder on ``device``)."""
        ...


def resolve_model(model: str | Path) -> ModelFiles:
    """The files of a model.

    Args:
        model: a directory, ``BUILT_IN``, or a hub id to download (JSON, tokenizer and safetensors files only).

    Raises:
        ModelError: none of them, or a download that failed.
    """
    path, name = Path(model), str(model)
    try:
        if path.is_dir():
            return ModelFiles(path)
        exists = path.exists()
    except OSError as error:  # a name that is too long, a loop of links
        raise ModelError(f"model {shorten(name)}: {error.strerror}") from None
    if name == BUILT_IN:
        return ModelFiles(BUILT_IN_FOLDER)
    if exists or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"model {shorten(name)} is not a directory in diffusers format, nor a hub id such as "
            f"'Wan-AI/Wan2.1-T2V-1.3B-Diffusers', nor {BUILT_IN!r}, which ships with this package"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return ModelFiles(Path(snapshot_download(name, allow_patterns=_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"model {name!r} is no directory here and could not be had from the hub: {error}") from None
