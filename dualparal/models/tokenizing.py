"""A trial of a model folder's tokenizer in a process of its own: its patterns, made by a stranger, may run for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dualparal.models.json_files import ModelError

_CPU_SECONDS = 30  # of the largest known tokenizer and a long prompt: 2
_SECONDS = 300.0  # on a busy machine
_MAX_BYTES = 1 << 27  # UMT5's has 17 MB
# Texts come by the standard input, since every user of a machine may read command lines.
_PROGRAM = """
import json, resource, sys
given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"]))
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(given["path"])
for text in given["texts"]:
    tokenizer.encode(text)
"""


def try_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Reads a folder's ``tokenizer.json`` and encodes the texts, elsewhere and with a limit of CPU time.

    One without patterns cannot run long and is not tried. Other faults of it are its library's to tell.

    Raises:
        ModelError: it is too large, or takes too long.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    if path.stat().st_size > _MAX_BYTES:
        raise ModelError(f"{path} has {path.stat().st_size} bytes: a tokenizer has at most {_MAX_BYTES}")
    if b'"Regex"' not in path.read_bytes():
        return
    given = json.dumps({"path": str(path), "texts": list(texts), "seconds": _CPU_SECONDS})
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM],
            input=given.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _too_slow(path) from None
    if ended.returncode < 0:  # by the limit's signal, or a crash
        raise _too_slow(path)


def _too_slow(path: Path) -> ModelError:
    return ModelError(
        f"{path}: its patterns take more than {_CPU_SECONDS} s for the prompts, or crash; download the model again"
    )
