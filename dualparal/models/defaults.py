"""Defaults that a model brings: size, steps and guidance of a video, how many blocks are under way. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualparal.config import blocks, video
from dualparal.config.blocks import BlockConfig
from dualparal.config.video import VideoConfig
from dualparal.models.folder import hub_file
from dualparal.models.json_files import ModelError, read_json
from dualparal.models.registry import BUILT_IN, BUILT_IN_FOLDER

FILE = "generation_config.json"  # beside model_index.json; transformers has one of this name for the same


@dataclass(frozen=True)
class Defaults:
    """A request and blocks of one who says nothing.

    Attributes:
        video: with height, width, steps and guidance as the model has them.
        blocks: with its own max_blocks_in_flight and context_version: a model may have learnt how far ahead a block's
            predecessor is.
    """

    video: VideoConfig = field(default_factory=VideoConfig)
    blocks: BlockConfig = field(default_factory=BlockConfig)


def model_defaults(model: str | Path | Any) -> Defaults:
    """Defaults that a model brings, in ``generation_config.json`` of its folder.

    What the file does not have is as in ``WanPipeline.__call__`` (diffusers) and in ``BlockConfig``, and all of it
    where there is no file. Other names in it are left alone.

    Args:
        model: a folder in diffusers format, or as the user named it, or a pipeline that was loaded from there. Of a
            hub id that no family knows, this one file is downloaded; those that are known have none.

    Raises:
        ModelError: a file that cannot be read, or a value that no video and no blocks can have.
    """
    if not isinstance(model, (str, Path)):
        model = getattr(model, "name_or_path", None) or ""
    folder = BUILT_IN_FOLDER if str(model) == BUILT_IN else Path(model)
    try:
        path = folder / FILE if model and folder.is_dir() else hub_file(str(model), FILE)
        if path is None or not path.exists():
            return Defaults()
    except OSError:  # a name that is too long, a loop of links: whoever needs the other files says so
        return Defaults()
    found = read_json(path)
    try:
        return Defaults(
            VideoConfig(**{name: found[name] for name in video.OF_MODEL if name in found}),
            BlockConfig(**{name: found[name] for name in blocks.OF_MODEL if name in found}),
        )
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
