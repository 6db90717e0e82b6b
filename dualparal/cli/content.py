"""The flags of what a video shows: texts, images that it begins or ends with, a clip that it goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class PromptFlags:
    """Content"""

    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What the video shows; repeated: a video for each, all made at once.", show_default=False),
    ] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What it should not show.")] = None
    prompt_at: Annotated[
        list[str] | None,
        typer.Option(help="FRAME:TEXT, blocks from that frame on take the text; may be repeated."),
    ] = None
    image: Annotated[
        Path | None,
        typer.Option(help="The first frame, for image-to-video models; stretched to the video's size."),
    ] = None
    last_image: Annotated[
        Path | None, typer.Option(help="The last frame, for models that take one besides the first.")
    ] = None
    continue_from: Annotated[
        Path | None,
        typer.Option(help="An mp4 file that the video goes on from; --num-frames are those after it, a multiple of 4."),
    ] = None
