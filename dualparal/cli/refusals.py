"""Refusals in one style: a line that names the flag as it was typed, the rule and the way out."""

from __future__ import annotations

import difflib
import os
import re
import sys
from typing import Any

import typer

from dualparal.cli.block_flags import BlockFlags, ReuseFlags
from dualparal.cli.content import PromptFlags
from dualparal.cli.eight_bit_flags import EightBitFlags
from dualparal.cli.flags import ModelFlags, OutputFlags, PlaceFlags, VideoFlags

USAGE_ERRORS: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

# Names of values in the engine's messages whose flag is not the name with dashes.
_FLAGS = {
    "num_inference_steps": ("--steps", "--num-inference-steps"),
    "decode_ranks": ("--decode-gpus",),
    "transformers": ("--transformer",),
    "loras": ("--lora",),
}
_GROUPS = PromptFlags, VideoFlags, ModelFlags, EightBitFlags, ReuseFlags, BlockFlags, PlaceFlags, OutputFlags
_NAMES = {name for group in _GROUPS for name in group.__dataclass_fields__} | set(_FLAGS)
_KINDS = {
    "integer": "a whole number",
    "number": "a number, such as 5.0",
    "float": "a number, such as 5.0",
}  # by typer's words


def in_flags(text: str) -> str:
    """The engine's message with flags in the place of its own names: "dtype='fp16'" becomes "--dtype fp16"."""

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name not in _NAMES:
            return found[0]
        if name == "stages" and (counted := _counted(value)):
            return counted
        typed = _typed(name)
        if value in ("True", "False"):
            return typed if value == "True" else f"--no-{typed[2:]}"
        return f"{typed} {value.strip(chr(39))}"

    text = re.sub(r"(?<![\w-])([a-z][a-z0-9_]+)=('[^']*'|[\w.+-]+)", flag, text)
    return re.sub(r"\bleave ([a-z0-9_]+) out", lambda f: f"leave {_typed(f[1]) if f[1] in _NAMES else f[1]} out", text)


def _counted(stages: str) -> str:
    """The flag that a number of stages was counted from, where ``--stages`` was not typed; else an empty text."""
    gpus = _value_of("--gpus")
    if _value_of("--stages") is not None or (gpus is None and "RANK" not in os.environ):
        return ""
    count = gpus or os.environ.get("WORLD_SIZE", "1")
    given = f"--gpus {gpus}" if gpus is not None else f"a run of {count} processes"
    return given if stages == count else f"{given}, which makes {stages} stages,"


def _typed(name: str) -> str:
    """The flag of a name: of several spellings the last one on this command line."""
    spellings = _FLAGS.get(name, ("--" + name.replace("_", "-"),))
    given = [argument.partition("=")[0] for argument in reversed(sys.argv)]
    return next((each for each in given if each in spellings), spellings[0])


def of_usage(error: Any) -> str:
    """A mistake on the command line that typer found, in words like our own.

    Args:
        error: one of ``USAGE_ERRORS``.
    """
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else " ".join(["dualparal", *sys.argv[1:2]])
    help_ = f"see '{command} --help'"
    kind, message = type(error).__name__, str(error.format_message()).rstrip(".")
    option = getattr(error, "option_name", None)
    if kind == "NoSuchOption":
        known = [name for each in context.command.params for name in each.opts] if context is not None else []
        near = difflib.get_close_matches(option, known, 1)
        return f"{option}: '{command}' has no such flag; " + (
            f"did you mean {near[0]}? Else {help_}" if near else help_
        )
    if kind == "BadOptionUsage" and option:
        return f"{option}: a value is missing, or it takes none; {help_}"
    parameter = getattr(error, "param", None)
    if kind == "BadParameter" and parameter is not None and parameter.opts:
        spelling = next((each for each in parameter.opts if each in sys.argv), parameter.opts[0])
        value = _value_of(spelling)
        wanted = next((words for kind, words in _KINDS.items() if kind in message), "")
        said = f"{spelling} {value}" if value is not None else spelling
        return f"{said}: use {wanted}" if wanted else f"{said}: {message}; {help_}"
    return f"{message[:1].lower()}{message[1:]}; {help_}"


def _value_of(flag: str) -> str | None:
    """The value of a flag on this command line, the last one."""
    found = None
    for index, argument in enumerate(sys.argv):
        if argument == flag and index + 1 < len(sys.argv):
            found = sys.argv[index + 1]
        elif argument.startswith(flag + "="):
            found = argument.partition("=")[2]
    return found
