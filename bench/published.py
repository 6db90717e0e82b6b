"""The planner held against published timings of other engines, row by row. No torch, no GPU.

    python bench/published.py                            # the tables of docs/plan.md

``published.csv`` has what others timed, each row with its source; nothing in it was run by this project. What a row
took is held against two predictions: ``kernels`` takes every rate that a kernel reaches on its own, ``predicted`` the
share of it that whole runs reach on such a card with such software (``fused`` and ``eager`` of ``planning.devices``).
An eager engine is given its own passes over memory. The shares are medians of these very rows, so ``predicted`` is
right in the middle by construction; its scatter is the band that ``dualparal plan`` prints.

* Rows with attention in 8 bits are printed and decide nothing: the planner has no rate for it.
* ``total`` has the VAE in it, as the planner sees it, but neither the text encoder nor what is moved to the host.
* A decoder in 16 bits is predicted as ours in float32, divided by ``VAE_16_BITS``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from dualparal.config.blocks import BlockConfig
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.models.wan.sizes import MODELS
from dualparal.planning.cost import PASSES, layer_arithmetic
from dualparal.planning.devices import DEVICES, Band, Device, Efficiency
from dualparal.planning.workload import Workload

# Passes over a unit's hidden states in a layer of diffusers' block: bench/count_passes.py counts 130 (14B) and 136.
EAGER_PASSES = 133
# The decoder in float32 against bfloat16: 1.2 to 1.3 (FastVideo, pull request 1472).
VAE_16_BITS = 1.25
FITTED = ("eager", "fused")


class Timing(NamedTuple):
    """A row of ``published.csv``.

    Attributes:
        what: "step" (both guidance branches), "dit" (all steps), "total" (with the VAE) or "decode" (the VAE alone).
        seconds: published.
        kind: "eager", "fused" or "8-bit attention".
    """

    card: Device
    model: str
    video: VideoConfig
    what: str
    seconds: float
    kind: str
    software: str
    source: str

    @property
    def work(self) -> Workload:
        """The clip as one block."""
        model = MODELS["wan2.1-t2v-1.3b" if self.what == "decode" else self.model]
        return Workload(model, self.video, EngineConfig(BlockConfig(21, 0)))

    @property
    def decode(self) -> float:
        """Predicted seconds of the VAE in float32."""
        return (self.work.layout.num_latents or 0) * self.work.model.vae.flops(self.work.pixels) / self.card.conv

    @property
    def layers(self) -> float:
        """Predicted seconds of all layers that the row timed, at the rates of kernels."""
        work, passes = self.work, EAGER_PASSES if self.kind == "eager" else PASSES
        tokens = (work.layout.num_latents or 0) * work.tokens
        layer = layer_arithmetic(work, tokens, tokens)
        layer = layer._replace(moved=layer.moved / PASSES * passes)
        units = 2 * (1 if self.what == "step" else self.video.num_inference_steps)
        return units * work.model.num_layers * layer.seconds(self.card)

    def predicted(self, share: float = 1.0) -> float:
        """Predicted seconds of the row.

        Args:
            share: of the kernels' rates that the layers reach.
        """
        if self.what == "decode":
            return self.decode / VAE_16_BITS
        return self.layers / share + (self.decode if self.what == "total" else 0.0)

    @property
    def share(self) -> float:
        """The share for its card and kind; of a kind that decides nothing, the fused one."""
        shares = self.card.efficiency
        return shares.eager if self.kind == "eager" else shares.fused

    @property
    def reached(self) -> float:
        """FLOP/s of attention and products in the published time, as a share of the card's stated rate."""
        tokens = (self.work.layout.num_latents or 0) * self.work.tokens
        layer = layer_arithmetic(self.work, tokens, tokens)
        units = 2 * (1 if self.what == "step" else self.video.num_inference_steps)
        flops = units * self.work.model.num_layers * (layer.attention + layer.linear)
        return flops / (self.seconds - (self.decode if self.what == "total" else 0.0)) / self.card.tensor

    @property
    def fits(self) -> bool:
        """True when the row is one that shares and bands are taken from."""
        return self.kind in FITTED and self.what != "decode"


def read() -> list[Timing]:
    """The published rows, in the file's order."""
    with open(Path(__file__).with_name("published.csv"), newline="", encoding="utf-8") as file:
        return [
            Timing(
                DEVICES[row["card"]],
                row["model"],
                VideoConfig(int(row["height"]), int(row["width"]), int(row["frames"]), int(row["steps"] or 1)),
                row["what"],
                float(row["seconds"]),
                row["kind"],
                row["software"],
                row["source"],
            )
            for row in csv.DictReader(file)
        ]


def fitted_share(rows: Iterable[Timing]) -> float:
    """The median share of the kernels' rates that the layers of some rows reach."""
    return median(row.layers / (row.seconds - row.predicted() + row.layers) for row in rows)


def of_family(rows: Iterable[Timing], family: Efficiency) -> list[Timing]:
    """The rows that count for the cards of one family."""
    return [row for row in rows if row.fits and row.card.efficiency == family]


def band(rows: Sequence[Timing], at_kernels: bool = False) -> Band:
    """What the rows took of what is predicted for them.

    Args:
        rows: of any kind.
        at_kernels: predictions are those at the rates of kernels on their own.
    """
    ratios = [row.seconds / row.predicted(1.0 if at_kernels else row.share) for row in rows]
    return Band(round(min(ratios), 2), round(max(ratios), 2), len(ratios))


def table(rows: Sequence[Timing]) -> str:
    """Markdown: each row with its predictions."""
    lines = [
        "| card | what | software | kind | published, s | kernels / published | predicted, s | predicted / published | "
        "of the stated rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = "" if row.what in ("step", "decode") else f", {row.video.num_inference_steps} steps"
        what = f"{row.model}, {row.video.height}p, {row.what}{steps}"
        reached = "" if row.what == "decode" else f"{100 * row.reached:.0f} %"
        predicted = row.predicted(row.share)
        lines.append(
            f"| {row.card.name} | {what} | {row.software} | {row.kind} | {row.seconds:g} | "
            f"{row.predicted() / row.seconds:.2f} | {predicted:.4g} | {predicted / row.seconds:.2f} | {reached} |"
        )
    return "\n".join(lines)


def medians(rows: Sequence[Timing]) -> str:
    """Markdown: medians by card and kind, and by kind."""
    groups: dict[tuple[str, str], list[Timing]] = {}
    for row in rows:
        if row.what != "decode":
            groups.setdefault((row.card.name, row.kind), []).append(row)
            groups.setdefault(("all cards", row.kind), []).append(row)
    lines = [
        "| card | kind | timings | kernels / published | predicted / published | of the stated rate |",
        "|---|---|---|---|---|---|",
    ]
    for (card, kind), found in sorted(groups.items(), key=lambda item: (item[0][0] == "all cards", item[0])):
        kernels = median(row.predicted() / row.seconds for row in found)
        predicted = median(row.predicted(row.share) / row.seconds for row in found)
        reached = 100 * median(row.reached for row in found)
        lines.append(f"| {card} | {kind} | {len(found)} | {kernels:.2f} | {predicted:.2f} | {reached:.0f} % |")
    return "\n".join(lines)


def bands(rows: Sequence[Timing]) -> str:
    """Markdown: published / predicted on every family of cards, and on all of them, as ``dualparal plan`` prints it."""
    lines = [
        "| cards | timings | share of fused engines | of eager ones | published / predicted | published / kernels |",
        "|---|---|---|---|---|---|",
    ]
    fitting = [row for row in rows if row.fits]
    for family in dict.fromkeys(row.card.efficiency for row in fitting):
        cards = ", ".join(card.name for card in DEVICES.values() if card.efficiency == family)
        own = of_family(rows, family)
        lines.append(f"| {cards} | {len(own)} | {family.fused} | {family.eager} | {_range(own)} |")
    lines.append(f"| all | {len(fitting)} | | | {_range(fitting)} |")
    return "\n".join(lines)


def _range(rows: Sequence[Timing]) -> str:
    found = band(rows), band(rows, at_kernels=True)
    return " | ".join(f"{each.low:.2f} to {each.high:.2f}" for each in found)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    rows = read()
    print("\n\n".join([table(rows), medians(rows), bands(rows)]))


if __name__ == "__main__":
    main()
