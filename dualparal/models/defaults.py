"""Defaults of a video that its model brings: size, steps and guidance. No torch."""

from __future__ import annotations

from pathlib import Path

from dualparal.config.video import OF_MODEL, VideoConfig
from dualparal.models.folder import hub_file
from dualparal.models.json_files import ModelError, read_json
from dualparal.models.registry import BUILT_IN, BUILT_IN_FOLDER

FILE = "generation_config.json"  # beside model_index.json; transformers has one of this name for the same


def video_defaults(model: str | Path) -> VideoConfig:
    """A request with a model's own height, width, steps and guidance, from ``generation_config.json`` of its folder.

    What the file does not have is as in ``WanPipeline.__call__`` (diffusers), and all of it where there is no file.
    Other names in it are left alone.

    Args:
        model: a folder in diffusers format, or as the user named it. Of a hub id that no family knows, this one file
            is downloaded; those that are known have none.

    Raises:
        ModelError: a file that cannot be read, or a value that no video can have.
    """
    folder = BUILT_IN_FOLDER if str(model) == BUILT_IN else Path(model)
    try:
        path = folder / FILE if folder.is_dir() else hub_file(str(model), FILE)
        if path is None or not path.exists():
            return VideoConfig()
    except OSError:  # a name that is too long, a loop of links: whoever needs the other files says so
        return VideoConfig()
    found = read_json(path)
    try:
        return VideoConfig(**{name: found[name] for name in OF_MODEL if name in found})
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
