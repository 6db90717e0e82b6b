"""``dualparal serve``: flags to the settings of a server, which ``dualparal.server`` runs."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualparal.cli.block_flags import BlockFlags, ReuseFlags
from dualparal.config.blocks import BlockConfig
from dualparal.config.engine import EngineConfig
from dualparal.config.reuse import Reuse
from dualparal.launch.exit_codes import RANK_FAILED, STORAGE
from dualparal.models.defaults import model_defaults
from dualparal.models.registry import BUILT_IN
from dualparal.schedule.policies import with_refreshes

if TYPE_CHECKING:
    from dualparal.server.settings import Settings

TOKEN = "DUALPARAL_SERVER_TOKEN"
_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart",
           "prometheus_client": "prometheus_client"}  # fmt: skip


@dataclass(frozen=True)
class ServeFlags:
    """Server"""

    model: Annotated[
        str, typer.Argument(help="As --model of 'generate'. Default: the small model of this package.")
    ] = BUILT_IN
    gpus: Annotated[int, typer.Option(help="Rank processes, one GPU each, or with --device cpu none.")] = 1
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda where there is one.")] = None
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, as in 'generate'.")] = None
    decode_gpus: Annotated[int, typer.Option(help="Of --gpus, those that only decode.")] = 0
    sequence_parallel: Annotated[int, typer.Option(help="Of --gpus, those of each stage.")] = 1
    host: Annotated[str, typer.Option(help="Address to listen on. Beyond loopback --token is needed.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="0: one that is free.")] = 8000
    token: Annotated[
        str | None,
        typer.Option(help=f"What clients send as 'Authorization: Bearer'. Better in {TOKEN}: flags are seen in 'ps'."),
    ] = None
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which browsers reach the server; may be repeated.")
    ] = None
    out_dir: Annotated[Path, typer.Option(help="Folder of videos, snapshots and the queue.")] = Path("videos")
    fps: Annotated[int, typer.Option(help="Frames per second.")] = 16
    size: Annotated[
        str | None,
        typer.Option(help="Default WIDTHxHEIGHT of a video. The model's own, or 832x480.", show_default=False),
    ] = None
    seconds: Annotated[float, typer.Option(help="Default length of a video.")] = 4.0
    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", help="Default steps. The model's own, or 50.", show_default=False)
    ] = None
    guidance_scale: Annotated[
        float | None, typer.Option(help="Default guidance. The model's own, or 5.", show_default=False)
    ] = None


@dataclass(frozen=True)
class ServeLimits:
    """Limits"""

    max_queue: Annotated[int, typer.Option(help="Videos that may wait.")] = 32
    max_seconds: Annotated[float, typer.Option(help="Length of a video.")] = 120.0
    max_pixels: Annotated[int, typer.Option(help="Width times height.")] = 1280 * 720
    max_steps: Annotated[int, typer.Option(help="Steps of a video.")] = 100
    keep: Annotated[int, typer.Option(help="Videos that are kept: beyond it the oldest finished one goes.")] = 200


GROUPS = (ServeFlags, ServeLimits, BlockFlags, ReuseFlags)


def serve(call: typer.Context, flags: ServeFlags, limits: ServeLimits, blocks: BlockFlags, reuse: ReuseFlags) -> None:
    """Serves videos over HTTP in the shape of OpenAI's API, with a page that shows them while they are made."""
    del call
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'dualparal[server]'")
    from dualparal.server.settings import Settings

    own = model_defaults(flags.model)
    default = own.video
    steps = default.num_inference_steps if flags.num_inference_steps is None else flags.num_inference_steps
    height, width = default.height, default.width
    if flags.size is not None:
        across, cross, up = flags.size.lower().partition("x")
        if not (cross and across.isdecimal() and up.isdecimal()):
            raise ValueError(f"--size {flags.size!r}: use WIDTHxHEIGHT in pixels, such as {width}x{height}")
        height, width = int(up), int(across)
    settings = Settings(
        model=flags.model,
        gpus=flags.gpus,
        engine=EngineConfig(
            blocks=with_refreshes(BlockConfig.of(own.blocks, **blocks.given()), steps),
            device=flags.device,
            dtype=flags.dtype,
            decode_ranks=flags.decode_gpus,
            sequence_parallel=flags.sequence_parallel,
            reuse=Reuse.of(reuse.reuse),
        ),
        folder=flags.out_dir,
        host=flags.host,
        port=flags.port,
        token=flags.token or os.environ.pop(TOKEN, None) or None,  # ranks do not inherit it
        allow_hosts=tuple(flags.allow_host or ()),
        height=height,
        width=width,
        fps=flags.fps,
        seconds=flags.seconds,
        steps=steps,
        guidance_scale=default.guidance_scale if flags.guidance_scale is None else flags.guidance_scale,
        **asdict(limits),
    )
    _serve(settings)


def _serve(settings: Settings) -> None:
    from dualparal.server.serve import serve as run
    from dualparal.workers.ranks import RankFailed

    name = f"[{settings.host}]" if ":" in settings.host else settings.host

    def say(port: int) -> None:
        typer.echo(f"dualparal serves {settings.model_name} at http://{name}:{port}")

    try:
        ended_well = run(settings, say)
    except RankFailed as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(RANK_FAILED) from None
    if not ended_well:
        raise typer.Exit(STORAGE)
