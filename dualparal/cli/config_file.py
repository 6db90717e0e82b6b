"""The file of ``--config``: flags as YAML, read with bounds, and put in front of those that were typed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MOST_BYTES = 256 * 1024
_MOST_DEPTH = 6
_OTHER_NAMES = {  # of EngineConfig, and of the request, where a flag is called otherwise
    "loras": "lora", "transformers": "transformer", "decode_ranks": "decode_gpus", "prompts": "prompt",
    "steps": "num_inference_steps", "video": "continue_from",
}  # fmt: skip
_GROUPS = "storyboard", "size"
_FPS, _MOST_FPS = 16.0, 1000.0


def with_config(arguments: list[str], parameters: Sequence[Any]) -> list[str]:
    """The command line of ``generate`` with what its ``--config`` says in front, less the flags that are given.

    Args:
        arguments: the command and its flags as typed.
        parameters: the command's flags, as typer has them.

    Raises:
        ValueError: a file that cannot be read or is no such file, or a key or a value that no flag has.
    """
    path = _path(arguments)
    if path is None:
        return arguments
    flags = {each.name: each for each in parameters if each.name not in ("config", "resume", "resume_or_start")}
    given = {name for name, each in flags.items() if _is_given(each, arguments[1:])}
    found: list[str] = []
    values = _flat(_read(path), flags, path, _typed_fps(arguments[1:]))
    if "prompt" in given:
        given.add("prompt_at")  # of another video
    for name, value in values.items():
        said = [] if value is None else _arguments(flags[name], name, value, path)
        if name not in given:
            found += said
    return [arguments[0], *found, *_without_path(arguments[1:])]


def _path(arguments: list[str]) -> Path | None:
    """The value of ``--config``, the last one."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            found = Path(arguments[index + 1])
        elif argument.startswith("--config="):
            found = Path(argument.partition("=")[2])
    return found


def _without_path(arguments: list[str]) -> list[str]:
    """The arguments without ``--config``: ranks get what was read, not the file, which may have changed by then."""
    found = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--config" and not argument.startswith("--config="):
            found.append(argument)
        skip = argument == "--config" and not skip
    return found


def _is_given(flag: Any, arguments: list[str]) -> bool:
    names = {*flag.opts, *flag.secondary_opts}
    return any(argument.partition("=")[0] in names for argument in arguments)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file: plain values, no aliases (a few bytes of which can stand for gigabytes), no objects.

    Raises ValueError.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read; write the value out")
            self.depth += 1
            if self.depth > _MOST_DEPTH:
                raise yaml.YAMLError(f"nested deeper than {_MOST_DEPTH}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [str(key.value) for key, _ in node.value]  # as written
            twice = [key for index, key in enumerate(keys) if key in keys[:index]]
            if twice:
                raise yaml.YAMLError(f"{twice[0]} is there twice")
            return super().construct_mapping(node, deep)

    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}; use a file that can be read") from None
    if len(data) > _MOST_BYTES:
        raise ValueError(f"--config {path}: larger than {_MOST_BYTES // 1024} KiB; it holds flags, no data")
    loader = None
    try:
        loader = Loader(data)
        found = loader.get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        where = "" if place is None else f", line {place.line + 1}"
        raise ValueError(f"--config {path}{where}: {getattr(error, 'problem', None) or error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"--config {path}: use a mapping of flags to values, such as num_frames: 1025")
    return found


def _typed_fps(arguments: list[str]) -> float | None:
    """The value of ``--fps`` on the command line, the last one; None: none, or one that its flag will refuse."""
    found = None
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag == "--fps":
            found = value if equals else after
    try:
        return None if found is None else float(found)
    except ValueError:
        return None


def _flat(found: dict[str, Any], flags: dict[str, Any], path: Path, fps: float | None) -> dict[str, Any]:
    """The values by the name of their flag. Raises ValueError.

    fps: as it was typed; None: as the file has it.
    """
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        if name not in flags and name not in _GROUPS:
            near = difflib.get_close_matches(key.replace("-", "_"), [*flags, *_GROUPS, *_OTHER_NAMES], 1)
            raise ValueError(
                f"--config {path}: no flag is called {key!r}; "
                + (f"did you mean {near[0]}?" if near else "'dualparal generate --help' lists them")
            )
        if name in values:
            raise ValueError(f"--config {path}: {key} says the same as another key; give one of them")
        values[name] = value
    if (size := values.pop("size", None)) is not None:
        width, cross, height = str(size).lower().partition("x")
        if not cross or {"width", "height"} & set(values):
            raise ValueError(f"--config {path}: size: use WIDTHxHEIGHT, such as 832x480, in place of height and width")
        values |= {"width": width, "height": height}
    if (scenes := values.pop("storyboard", None)) is not None:
        values |= _storyboard(scenes, values, path, values.get("fps", _FPS) if fps is None else fps)
    return values


def _storyboard(scenes: Any, values: dict[str, Any], path: Path, fps: Any) -> dict[str, Any]:
    """The prompts of a storyboard, second -> text, as values of flags. Raises ValueError."""
    if {"prompt", "prompt_at"} & set(values):
        raise ValueError(f"--config {path}: storyboard and prompt: a storyboard has the prompts; leave prompt out")
    if not isinstance(scenes, dict) or 0 not in scenes:
        raise ValueError(f"--config {path}: storyboard: use second: text, from 0 on, such as 0: a cat")
    if not _is_number(fps) or not 0 < fps <= _MOST_FPS:
        raise ValueError(f"--config {path}: fps: {fps!r}: use a number of frames per second, such as 16")
    frames: dict[int, str] = {}
    for second, text in scenes.items():
        if not _is_number(second) or not 0 <= second <= 1e8:
            raise ValueError(f"--config {path}: storyboard: {second!r}: use seconds from 0 on")
        if not isinstance(text, str):
            raise ValueError(f"--config {path}: storyboard: {second!r}: {text!r} is not a text; put it into quotes")
        frame = round(second * fps)
        if frame in frames:
            raise ValueError(
                f"--config {path}: storyboard: {second!r}: frame {frame} has a text already; put them apart"
            )
        frames[frame] = text
    return {"prompt": frames.pop(0), "prompt_at": [f"{frame}:{text}" for frame, text in frames.items()]}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _arguments(flag: Any, name: str, value: Any, path: Path) -> list[str]:
    """The command line for a value. Raises ValueError."""
    said = f"--config {path}: {name}"
    if getattr(flag, "is_flag", False):
        if not isinstance(value, bool):
            raise ValueError(f"{said}: {value!r}: use true or false")
        return [flag.opts[0]] if value else list(flag.secondary_opts[:1])
    several = value if isinstance(value, list) else [value]
    if len(several) > 1 and not flag.multiple:
        numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in several)
        if not numbers:
            raise ValueError(f"{said}: {len(several)} values, and this flag takes one")
        several = [",".join(map(str, several))]  # such as layers_per_stage: [9, 11, 10]
    for each in several:
        if isinstance(each, bool) or not isinstance(each, (str, int, float)):
            raise ValueError(f"{said}: {each!r} is not a text or a number; put it into quotes")
    return [f"{flag.opts[0]}={each}" for each in several]
