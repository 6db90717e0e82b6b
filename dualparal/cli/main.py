"""The command line: flags to a request, a request to an engine. No decisions of its own.

``dualparal generate --gpus N`` starts N copies of the same command as ranks under the supervisor; a rank finds
itself in the environment (ours or torchrun's) and does its share. torch is imported late, so that ``--help`` is
quick and a rank's heartbeat starts before the slow imports.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import lru_cache
from typing import Annotated, Any

import typer

from dualparal.cli import plan, serve
from dualparal.cli.config_file import with_config
from dualparal.cli.flags import command_of
from dualparal.cli.generate import GROUPS, generate
from dualparal.cli.leader import unpack_arguments
from dualparal.cli.rank import one_line
from dualparal.cli.refusals import USAGE_ERRORS, in_flags, of_usage
from dualparal.cli.stderr import keep_stderr
from dualparal.launch.exit_codes import BAD_INPUT, STORAGE
from dualparal.models.registry import BUILT_IN, known_models
from dualparal.version import __version__

logger = logging.getLogger("dualparal")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Long video from a stock video diffusion transformer, split over GPUs.",
)


@app.command()
def doctor() -> None:
    """Says what is installed, what was built, and what is missing."""
    from dualparal.cli.doctor import report

    typer.echo(report())


@app.command()
def models() -> None:
    """Lists the models that --model takes by name, with the hub ids of their weights."""
    listed = {BUILT_IN: "ships with this package", **known_models()}
    width = max(map(len, listed))
    for name, hub_id in listed.items():
        typer.echo(f"{name:<{width}} {hub_id}")


@app.command()
def calibrate() -> None:
    """Measures the attention backends on this GPU once; the fastest is used from then on."""
    from dualparal.kernels.attention.calibrate import calibrate as measure

    path = measure(report=typer.echo)
    typer.echo(f"kept in {path}; remove it to go back to the built-in table")


generate_command = app.command()(command_of(generate, *GROUPS))
app.command()(command_of(plan.plan, *plan.GROUPS))
app.command()(command_of(serve.serve, *serve.GROUPS))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Long video from a stock video diffusion transformer, split over GPUs."""
    level = os.environ.get("DUALPARAL_LOG_LEVEL", "WARNING").upper()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(level if level in ("DEBUG", "INFO", "WARNING", "ERROR") else "WARNING")
    if version:
        typer.echo(f"dualparal {__version__}")
        raise typer.Exit


@lru_cache(1)
def commands() -> Any:
    """The commands that typer makes of the functions: once, since it takes long."""
    return typer.main.get_command(app)


def main() -> None:
    """Entry point. An error is one line on stderr, with exit code 2 for the user's mistakes and 5 for files."""
    keep_stderr()
    sys.argv[1:] = unpack_arguments() or sys.argv[1:]
    try:
        if "generate" in sys.argv[1:2]:
            sys.argv[1:] = with_config(sys.argv[1:], commands().commands["generate"].params)
        sys.exit(commands()(standalone_mode=False))
    except USAGE_ERRORS as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.exit(error.show() or BAD_INPUT)  # type: ignore[attr-defined]
        typer.echo(f"error: {one_line(of_usage(error))}", err=True)
        sys.exit(BAD_INPUT)
    except ValueError as error:
        typer.echo(f"error: {one_line(in_flags(str(error)))}", err=True)
        sys.exit(BAD_INPUT)
    except OSError as error:
        typer.echo(f"error: cannot read or write: {one_line(error)}", err=True)
        sys.exit(STORAGE)


if __name__ == "__main__":
    main()
