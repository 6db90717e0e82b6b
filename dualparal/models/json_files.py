"""JSON of a model directory, read under caps: whoever wrote it is not trusted. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MAX_JSON_BYTES = 1 << 24  # the index of the largest models has some hundred kilobytes
# Keys by which a config names code that a library would fetch and run.
_CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
_MODULE_COUNTS = ("num_layers", "num_decoder_layers", "num_res_blocks")  # a library builds so many, before any check
_MAX_MODULES = 1000
_MAX_DEPTH = 32  # of nested objects and lists; configs have five


class ModelError(ValueError):
    """A model directory that cannot be used; the message names the file and the way out."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: no file, a large one, no JSON object, a deeply nested one, or one that names code to run.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ModelError(f"{path} is missing: not a model directory in diffusers format")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes: a config has at most {_MAX_JSON_BYTES}")
        data = json.loads(path.read_text(encoding="utf-8"))
        _refuse_code(path, data)
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds {type(data).__name__}, not an object")
    return data


def read_config(path: Path) -> dict[str, Any]:
    """The config of a component: as ``read_json``, and refused as well if it asks for too many modules."""
    config = read_json(path)
    for key in _MODULE_COUNTS:
        if isinstance(config.get(key), (int, float)) and not 0 <= config[key] <= _MAX_MODULES:
            raise ModelError(f"{path}: {key}={config[key]}; from 0 to {_MAX_MODULES} are supported")
    return config


def _refuse_code(path: Path, data: Any, depth: int = 0, chooses_code: str = "") -> None:
    """Raises ModelError for a config that names code to run, however deep: ours names none, whatever a library does.

    ``attn_implementation`` may name a repository of kernels (CVE-2026-4372 of transformers).

    Args:
        chooses_code: the key under which this lies that chooses an implementation; empty: none.
    """
    if depth > _MAX_DEPTH:
        raise ModelError(f"{path}: nested more than {_MAX_DEPTH} deep, which no config is; download the model again")
    if isinstance(data, list):
        for value in data:
            _refuse_code(path, value, depth + 1, chooses_code)
    elif isinstance(data, dict):
        for key, value in data.items():
            if (key in _CODE_KEYS and value) or (chooses_code and "/" in key):
                raise _names_code(path, key, value)
            _refuse_code(path, value, depth + 1, key if "_implementation" in key else chooses_code)
    elif isinstance(data, str) and chooses_code and "/" in data:
        raise _names_code(path, chooses_code, data)


def _names_code(path: Path, key: str, value: Any) -> ModelError:
    return ModelError(f"{path}: {key}={shorten(value)} names code, and no code of a model is run; remove it")


def shorten(value: object) -> str:
    """The ``repr`` of a value, cut to a length that can be read."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"
