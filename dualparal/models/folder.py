"""The folder of a model that was named. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from dualparal.config.transformer_file import NO_GGUF, TransformerFile
from dualparal.models.json_files import ModelError, shorten
from dualparal.models.registry import BUILT_IN, BUILT_IN_FOLDER, family_in, hub_id_of

_FOLDERS = {None: "transformer", "high": "transformer", "low": "transformer_2"}  # by the expert of a file for it
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]


def folder_of(model: str | Path, transformers: Sequence[TransformerFile] = ()) -> Path:
    """The folder of a model.

    Args:
        model: a directory, ``BUILT_IN``, a name that a family knows, or a hub id; of the last two JSON, tokenizer and
            safetensors files are downloaded.
        transformers: files in place of the folder's transformers, whose weights are not downloaded then.

    Raises:
        ModelError: none of them, a model that is known and not supported, or a download that failed.
    """
    path, name = Path(model), str(model)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except OSError as error:  # a name that is too long, a loop of links
        raise ModelError(f"model {shorten(name)}: {error.strerror}") from None
    if name == BUILT_IN:
        return BUILT_IN_FOLDER
    if not exists:
        name = hub_id_of(name) or name
    if name.endswith(".gguf"):
        raise ModelError(f"model {shorten(name)}: {NO_GGUF}")
    if name.endswith(".safetensors"):
        raise ModelError(
            f"model {shorten(name)} is a file, which has no VAE, text encoder and sampler: give a directory in "
            "diffusers format or a name that 'dualparal models' lists as the model, and the file with --transformer "
            "(transformers=[...])"
        )
    if exists or not _is_hub_id(name):
        raise ModelError(
            f"model {shorten(name)} is not a directory in diffusers format, nor a hub id such as "
            f"'Wan-AI/Wan2.1-T2V-1.3B-Diffusers', nor {BUILT_IN!r}, which ships with this package, nor a name that "
            "'dualparal models' lists"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        without = [f"{_FOLDERS[file.expert]}/*.safetensors*" for file in transformers]
        if hub_id_of(name) is None:  # what is not supported is not worth a download of its weights
            family_in(Path(snapshot_download(name, allow_patterns=["model_index.json"])))
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=without))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelError(
            f"model {name!r} is no directory here and could not be had from the hub ({reason}); download it where "
            "there is a network, and give its folder"
        ) from None


def hub_file(model: str, name: str) -> Path | None:
    """A file of a model that is named by a hub id which no family knows, downloaded alone; None: there is none.

    None as well where the hub cannot be reached: whoever needs the model's other files says so.
    """
    if not _is_hub_id(model) or Path(model).exists() or hub_id_of(model) is not None:
        return None
    from huggingface_hub import snapshot_download  # which, unlike hf_hub_download, does not try again for 23 s
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    with contextlib.suppress(HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return Path(snapshot_download(model, allow_patterns=[name])) / name
    return None


def _is_hub_id(name: str) -> bool:
    """True for "owner/name", and not for what can only be a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
