"""The planner against published timings: its shares and bands are those of the rows, and docs/plan.md has them."""

from __future__ import annotations

from dataclasses import replace

import published
import pytest
from count_passes import SHAPES, Layer
from published import EAGER_PASSES, FITTED, Timing, band, fitted_share, of_family, read

from dualparal.planning.devices import CONV, DEVICES, TIMED, UNTIMED
from places import DOCS

ROWS = read()
FAMILIES = list(dict.fromkeys(row.card.efficiency for row in ROWS if row.fits))


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.origin[:24])
def test_shares_are_the_medians_of_published_runs(family: published.Efficiency, kind: str) -> None:
    own = of_family(ROWS, family)
    share = {"fused": family.fused, "eager": family.eager}
    rows = [row for row in own if row.kind == kind]
    if rows:
        assert share[kind] == pytest.approx(fitted_share(rows), rel=0.015)
    else:  # the other kind's
        assert share["fused"] == share["eager"]
    assert family.timings == len(own)


def test_the_error_is_the_scatter_of_published_runs() -> None:
    rows = [row for row in ROWS if row.fits]
    assert band(rows) == TIMED
    assert band(rows, at_kernels=True) == UNTIMED
    assert not any(row.fits for row in ROWS if row.kind == "8-bit attention" or row.what == "decode")
    assert {card.band for card in DEVICES.values() if card.efficiency not in FAMILIES} == {UNTIMED}


def test_the_decoder_has_the_published_rate() -> None:
    """81 frames of 720p in eager bfloat16, which is 1.25 times as fast as float32."""
    row = next(row for row in ROWS if row.what == "decode" and row.kind == "eager")
    flops = 21 * row.work.model.vae.flops(row.work.pixels)
    assert flops / (row.seconds * published.VAE_16_BITS) / row.card.tf32 == pytest.approx(CONV, rel=0.02)


def test_eager_passes_are_what_is_counted() -> None:
    counted = [Layer.of(model).diffusers.total for model in SHAPES]
    assert min(counted) < EAGER_PASSES < max(counted) < 1.03 * EAGER_PASSES


def test_a_row_is_predicted_by_hand() -> None:
    """FLOPs over rates, with no help from the planner: 1.3B, 81 frames of 480p, one step with guidance."""
    row = next(row for row in ROWS if row.what == "step" and row.card.name == "rtx5090")
    tokens, h, f = 21 * 30 * 52, 1536, 8960
    flops = 4 * tokens * (tokens + 512) * h + tokens * 2 * (6 * h * h + 2 * h * f)
    seconds = 2 * 30 * (flops / (0.85 * 209.5e12) + 20 * 2 * tokens * h / (0.8 * 1792e9))
    assert row.predicted(row.share) == pytest.approx(seconds, rel=1e-6)
    assert row.reached == pytest.approx(2 * 30 * flops / 3.221 / 209.5e12, rel=1e-6)
    whole: Timing = row._replace(what="total", video=replace(row.video, num_inference_steps=10))
    assert whole.predicted(0.5) == pytest.approx(20 * seconds + 21 * whole.work.model.vae.flops(6240) / row.card.conv)


def test_the_documented_tables_are_the_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["published.py"])
    published.main()
    text = (DOCS / "plan.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in text, f"docs/plan.md lacks what bench/published.py prints:\n{table}"
