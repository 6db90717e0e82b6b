"""Passes over memory, counted: the counter itself, the constants of the cost model, and the tables of docs/gpu.md."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import count_passes
import pytest
import torch
from count_passes import SHAPES, Layer, Traffic, count, diffusers, ours
from harness.predictions import PREDICTIONS, verdicts
from harness.shapes import GPU_SHAPES

from dualparal.kernels import backend
from dualparal.kernels.qk_norm_rope import Lend, qk_norm_rope
from dualparal.planning.cost import FEATURE_PASSES, PASSES
from places import DOCS


@pytest.fixture(scope="module", name="layers")
def layers_fixture() -> list[Layer]:
    return [Layer.of(model) for model in SHAPES]


def test_bytes_of_ops() -> None:
    x, y = (torch.empty(10, 8, dtype=torch.bfloat16, device="meta") for _ in range(2))
    one = x.nbytes
    cases = {
        "add": (lambda: x + y, 3),
        "in place": (lambda: x.add_(y), 3),
        "copy": (lambda: x.copy_(y), 2),
        "cast": (lambda: x.float(), 1 + 2),
        "no cast": (lambda: x.bfloat16(), 0),
        "half of the columns": (lambda: x[:, ::2] + y[:, ::2], 1.5),
        "a row for all": (lambda: x + y[:1].expand(10, 8), 2.1),
        "views": (lambda: x.unflatten(1, (2, 4)).transpose(0, 1)[0], 0),
        "a view that copies": (lambda: x.t().reshape(-1), 2),
        "new memory": (lambda: torch.empty_like(x), 0),
        "product": (lambda: torch.nn.functional.linear(x, y), 0),
    }
    for name, (run, passes) in cases.items():
        with torch.inference_mode(), Traffic() as traffic:
            run()
        assert sum(traffic.moved.values()) == passes * one, name


def test_the_cost_model_has_what_is_counted(layers: list[Layer]) -> None:
    for layer in layers:
        assert PASSES <= layer.ours.total < PASSES + 0.25  # rotary tables and modulations
        assert layer.ours.launches == 13
        assert layer.diffusers.total > 6 * PASSES and layer.authors.total > 7 * PASSES


def test_features_are_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(GPU_SHAPES[0], context=4, frames=8)
    own = shape.frames * shape.grid.tokens
    two, nobody = (count(shape, ours(neighbours), own).total for neighbours in (2, 0))
    assert two - nobody == pytest.approx(FEATURE_PASSES * 2 * 4 / 8)
    monkeypatch.setattr(backend, "recorded", lambda *_: True)
    empty = lambda *size, dtype=torch.bfloat16: torch.empty(*size, dtype=dtype, device="meta")  # noqa: E731
    norm, angles = empty(shape.inner, dtype=torch.float32), empty(own, shape.head_dim // 2, dtype=torch.float32)
    lent = 4 * shape.grid.tokens
    lend = Lend(*(empty(1, lent, shape.inner) for _ in range(2)), empty(1, dtype=torch.int64), 0)
    moved = []
    for lends in ((), (lend,)):
        rows = [empty(own, shape.inner) for _ in range(2)]
        with torch.inference_mode(), Traffic() as traffic:
            qk_norm_rope(
                empty(own, 3 * shape.inner), norm, norm, angles, angles, *rows, heads=shape.heads, eps=1e-6, lends=lends
            )
        moved.append(traffic.moved.total())
    assert (moved[1] - moved[0]) / (2 * lent * shape.inner) == pytest.approx(FEATURE_PASSES / 2, abs=1e-4)


def test_the_count_does_not_depend_on_the_length() -> None:
    shape = GPU_SHAPES[0]
    short, long = (
        count(replace(shape, frames=frames), diffusers, frames * shape.grid.tokens).total for frames in (2, 21)
    )
    assert short == pytest.approx(long, rel=0.01)


@pytest.mark.parametrize("table", ["passes_table", "step_table", "layer_table"])
def test_the_documented_tables_are_the_commands(layers: list[Layer], table: str) -> None:
    made = getattr(count_passes, table)(layers)
    assert made in Path(DOCS, "gpu.md").read_text(), f"docs/gpu.md lacks what bench/count_passes.py prints:\n{made}"


def test_predictions_are_the_documents() -> None:
    """Every figure that the suite compares a card with is one of docs/gpu.md."""
    whole = (DOCS / "gpu.md").read_text()
    text = "\n".join(line for line in whole[whole.index("## Predictions") :].splitlines() if line.startswith("|"))
    for each in PREDICTIONS:
        for figure in {each.low, each.high, each.target}:
            forms = f"{figure:g}", f"{figure:.2f}", f"{100 * figure:g}"
            assert any(re.search(rf"(?<![\d.]){re.escape(form)}(?![\d.]*\d)", text) for form in forms), each


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("2.36", "found 2.36 (confirmed)"),
        ("2.2", "found 2.2 (confirmed, target missed)"),
        ("2.1", "found 2.1 (refuted: worse, target missed)"),
        ("2.7", "found 2.7 (refuted: better)"),
        (None, "not measured"),
    ],
)
def test_a_figure_stands_beside_its_prediction(tmp_path: Path, found: str | None, words: str) -> None:
    wanted = PREDICTIONS[0]
    columns = {**wanted.where, wanted.column: found, "device": "cuda", "commit": "abc"}
    others = [{"commit": "old", wanted.column: "9"}, {"device": "cpu", wanted.column: "9"}, {"rival": "x"}]
    if found is not None:
        with open(tmp_path / f"{wanted.file}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows([{**columns, **other} for other in [{}, *others]])
    line, *rest = verdicts(tmp_path, "abc")
    assert line == f"{wanted.name}: predicted 2.36, wanted 2.3, {words}"
    assert len(rest) == len(PREDICTIONS) - 1 and all(each.endswith("not measured") for each in rest)
