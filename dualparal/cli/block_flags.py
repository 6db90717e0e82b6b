"""The flags of the cut into blocks, and of steps that are not run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class ReuseFlags:
    """Steps that are not run"""

    reuse: Annotated[
        str,
        typer.Option(
            help="mild, strong, or such as steps=2,uncond=2,order=0,first=3,from=0.1,to=1.0 (docs/api.md): some steps, "
            "and guidance's unconditional branch at some, are extrapolated, not run. Another video, near that of off."
        ),
    ] = "off"


@dataclass(frozen=True)
class BlockFlags:
    """Blocks"""

    frames_per_block: Annotated[int, typer.Option(help="B, latent frames per block (one latent is 4 frames).")] = 8
    context_frames: Annotated[int, typer.Option(help="C, latent frames lent by each neighbour; 0 to B.")] = 4
    context: Annotated[str, typer.Option(help="cached, prior or paper: where neighbours' features come from.")] = (
        "cached"
    )
    max_blocks_in_flight: Annotated[
        int | None,
        typer.Option(
            help="Blocks under way at once: fewer give the first frames earlier. Default: the model's own, or one per "
            "step.",
            show_default=False,
        ),
    ] = None
    context_version: Annotated[
        str | None,
        typer.Option(
            help="matching or newest: which features of the block before cached reads, with a limit as above. Default: "
            "the model's own, or matching.",
            show_default=False,
        ),
    ] = None
    refresh_every: Annotated[
        int | None,
        typer.Option(
            help="Every R iterations, blocks see their predecessors' latents in place of features. Default: "
            "never; with --checkpoint and --context cached or prior, half the steps.",
            show_default=False,
        ),
    ] = None
    anchor_frames: Annotated[
        int, typer.Option(help="The first so many latent frames of the video that every later block sees as well.")
    ] = 0
    anchor_weight: Annotated[
        float, typer.Option(help="Added to the logits of these frames: above 0 they are attended to more, below less.")
    ] = 0.0

    def given(self) -> dict[str, Any]:
        """Fields of ``BlockConfig``: all but those that were left to the model."""
        return {name: value for name, value in asdict(self).items() if value is not None}
