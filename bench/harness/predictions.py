"""What was predicted for an H200 before any card was there, to stand beside what a card says."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

TOLERANCE = 0.1  # a figure within it confirms a prediction; above it is better, below worse


class Prediction(NamedTuple):
    """A figure of one row of a bench.

    Attributes:
        file: the bench's rows, bench/results/FILE.csv.
        where: values by which the row is found.
        column: its figure, the larger the better.
        low, high: the range that was predicted (docs/gpu.md has the arithmetic).
        target: the figure that is wanted.
    """

    file: str
    where: Mapping[str, str]
    column: str
    low: float
    high: float
    target: float

    @property
    def name(self) -> str:
        return f"{self.file} " + " ".join(self.where.values()) + f" {self.column}"


def _layer(what: str, shape: str, dtype: str, rival: str, low: float, high: float, target: float) -> Prediction:
    where = {"what": what, "shape": shape, "dtype": dtype, "rival": rival}
    return Prediction("layer", where, "ratio", low, high, target)


SMALL, LARGE = "wan1.3b-480p-c8", "wan14b-480p-c8"
PREDICTIONS = [
    _layer("step", SMALL, "bfloat16", "authors", 2.36, 2.36, 2.3),
    _layer("step", LARGE, "bfloat16", "authors", 2.26, 2.26, 2.3),
    _layer("step", SMALL, "bfloat16 fp8", "authors", 3.00, 3.00, 2.8),
    _layer("step", LARGE, "bfloat16 fp8", "authors", 2.71, 2.71, 2.8),
    _layer("step", SMALL, "bfloat16 fp8 linears", "authors", 2.5, 2.6, 2.5),
    _layer("step", LARGE, "bfloat16 fp8 linears", "authors", 2.6, 2.7, 2.6),
    _layer("step", SMALL, "bfloat16 fp8 both", "authors", 3.3, 3.4, 3.3),
    _layer("step", LARGE, "bfloat16 fp8 both", "authors", 3.2, 3.4, 3.2),
    _layer("layer", SMALL, "bfloat16", "diffusers", 1.33, 1.33, 1.15),
    _layer("layer", LARGE, "bfloat16", "diffusers", 1.20, 1.20, 1.15),
    _layer("layer", SMALL, "bfloat16 fp8", "diffusers", 1.42, 1.54, 1.45),
    _layer("layer", LARGE, "bfloat16 fp8", "diffusers", 1.25, 1.32, 1.35),
    *(
        Prediction("ops", {"op": op, "backend": backend}, "of_copy", 0.8, 0.9, 0.8)
        for op in ("residual_norm wan1.3b-480p", "residual_norm wan14b-480p", "qk_norm_rope wan1.3b-480p")
        for backend in ("cuda", "triton")
    ),
    Prediction("graphs", {"pixels": "64", "stages": "1"}, "ratio", 2.0, 2.0, 1.3),
]


def verdicts(results: Path, commit: str) -> list[str]:
    """A line for each prediction, from the newest row of this commit in the folder ``results``."""
    return [_verdict(each, _find(results / f"{each.file}.csv", each, commit)) for each in PREDICTIONS]


def _find(path: Path, wanted: Prediction, commit: str) -> float | None:
    if not path.exists():
        return None
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["device"] == "cuda" and row["commit"] == commit]
    found = [row[wanted.column] for row in rows if all(row.get(key) == value for key, value in wanted.where.items())]
    return float(found[-1]) if found and found[-1] else None


def _verdict(each: Prediction, found: float | None) -> str:
    said = f"{each.low:g}" if each.low == each.high else f"{each.low:g} to {each.high:g}"
    line = f"{each.name}: predicted {said}, wanted {each.target:g}, "
    if found is None:
        return line + "not measured"
    if found < each.low * (1 - TOLERANCE):
        verdict = "refuted: worse"
    else:
        verdict = "refuted: better" if found > each.high * (1 + TOLERANCE) else "confirmed"
    return line + f"found {found:g} ({verdict}{'' if found >= each.target else ', target missed'})"
