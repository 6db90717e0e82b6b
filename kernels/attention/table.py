"""The choices of ``auto``: a table by architecture, versions, head dimension and length, and one measured here.

``dualparal calibrate`` measures the backends on a card and writes a file into the cache folder. It is used when card,
driver and library versions are exactly those it was measured with; otherwise the rules below decide. Rows say where
they come from: a rule nobody has timed is a prediction.
"""

import functools
import importlib.metadata
import json
import logging
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..environment import cache_root

log = logging.getLogger("dualparal")

FORMAT = 1
LONG = 2048  # keys; text is shorter, a block of video is longer


def length_class(k_rows: int) -> str:
    return "long" if k_rows >= LONG else "short"


class Rule(NamedTuple):
    """A row of the built-in table.

    Attributes:
        architectures: compute capabilities (86 for 8.6).
        cudnn_first: for a torch that puts cuDNN first on sm_90 and sm_100: torch >= 2.11 with cuDNN > 9.15.0.
            None: for any.
        basis: what the choice rests on.
    """

    architectures: frozenset[int]
    cudnn_first: bool | None
    head_dims: frozenset[int]
    lengths: frozenset[str]
    backend: str
    basis: str


_WAN_HEADS, _ANY_LENGTH = frozenset({64, 128}), frozenset({"short", "long"})

# The first that fits and can run; "sdpa" where none does.
RULES = (
    Rule(
        frozenset({90, 100, 103}),
        True,
        _WAN_HEADS,
        _ANY_LENGTH,
        "sdpa",
        "it is cuDNN; NVIDIA publishes 690 to 700 TFLOP/s for it on H200 (cudnn-frontend 9.19.1)",
    ),
    Rule(frozenset({80, 86, 87, 89, 90, 100, 103, 120, 121}), None, _WAN_HEADS, _ANY_LENGTH, "flash", "prediction"),
)


class Choice(NamedTuple):
    backend: str
    basis: str


def puts_cudnn_first(torch_version: str, cudnn_version: int | None) -> bool:
    """True when scaled_dot_product_attention of this torch prefers cuDNN on sm_90 and sm_100.

    Source: pytorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_prefer_cudnn_attention.
    """
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    return found is not None and (int(found[1]), int(found[2])) >= (2, 11) and (cudnn_version or 0) > 91500


def rules_for(
    architecture: int, torch_version: str, cudnn_version: int | None, head_dim: int, length: str
) -> list[Choice]:
    """The rows of the built-in table, the best first."""
    cudnn_first = puts_cudnn_first(torch_version, cudnn_version)
    return [
        Choice(rule.backend, rule.basis)
        for rule in RULES
        if architecture in rule.architectures
        and rule.cudnn_first in (None, cudnn_first)
        and head_dim in rule.head_dims
        and length in rule.lengths
    ]


# The measured table -----------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str:
    """The version of the kernel module; "unknown" where it does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"Module\D*?[\s ](?:x86_64|aarch64)?\s*(\d+\.[\d.]+)", text)
    return found[1] if found else "unknown"


def machine(device: torch.device) -> dict[str, Any]:
    """Everything a measurement depends on; a table counts only where all of it is equal."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "triton": _version("triton"),
        "flash-attn": _version("flash-attn"),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {
            "card": card.name,
            "architecture": 10 * card.major + card.minor,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            **facts,
        }
    return {"card": platform.machine(), "architecture": 0, "driver": "none", "cuda": None, **facts}


def measured_path(card: str) -> Path:
    """Raises ValueError where there is no folder for a cache."""
    return cache_root() / f"attention-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


def write_measured(
    path: Path, facts: Mapping[str, Any], choices: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Replaces the table of this card in one go: a reader sees the old one or the new one.

    Args:
        facts: of ``machine``.
        choices: "dtype" ("bfloat16"), "head_dim", "length" ("short" or "long") and "backend" each.
        rows: the measurements, for people.
    """
    text = json.dumps(
        {"format": FORMAT, "machine": dict(facts), "choices": list(choices), "rows": list(rows)}, indent=1
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_measured(path: Path, facts: Mapping[str, Any]) -> dict[tuple[str, int, str], str]:
    """(dtype, head_dim, length) -> backend of a table that fits this machine.

    Empty without a file; also, with a warning, for one that cannot be read or was measured elsewhere.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']!r}, expected {FORMAT}")
        elsewhere = sorted(
            name for name in {*facts, *table["machine"]} if facts.get(name) != table["machine"].get(name)
        )
        choices = {
            (str(row["dtype"]), int(row["head_dim"]), str(row["length"])): str(row["backend"])
            for row in table["choices"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # UnicodeDecodeError and JSONDecodeError are ValueErrors.
        log.warning(
            "%s is ignored, it is not a table of attention backends (%s: %s); run 'dualparal calibrate' again, or "
            "remove it",
            path,
            type(error).__name__,
            error,
        )
        return {}
    if elsewhere:
        was = ", ".join(f"{name} {table['machine'].get(name)} then, {facts.get(name)} now" for name in elsewhere)
        log.warning("%s is ignored, it was measured elsewhere (%s); run 'dualparal calibrate' again", path, was)
        return {}
    return choices


@functools.cache
def measured_for(device: torch.device) -> dict[tuple[str, int, str], str]:
    """The measured table of this device, read once."""
    facts = machine(device)
    try:
        path = measured_path(facts["card"])
    except ValueError:  # no home: nothing can have been kept
        return {}
    return read_measured(path, facts)
