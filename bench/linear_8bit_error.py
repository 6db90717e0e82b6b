"""Writes docs/linear-8bit.md: relative errors of fp8 linears and 8-bit features, layer by layer and in videos.

Run from anywhere: ``python bench/linear_8bit_error.py``, ten minutes on two busy cores; it needs no GPU. Everything
goes through the definitions, which the kernels are tested against. The model is the one of moving shapes that ships
with the package: trained, but small. ``--rows`` prints without writing.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from harness.record import commit

from dualparal.config.eight_bit import LinearPolicy
from dualparal.engine.engine import Engine
from dualparal.kernels.accuracy import rms
from dualparal.kernels.linear_8bit import linear_8bit, quantise_rows
from dualparal.models.linear import Linear
from dualparal.models.registry import BUILT_IN

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPT = "a red circle moves right"
CALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 29, "num_inference_steps": 4, "guidance_scale": 1.0}
SEEDS = (0, 1, 2)
BLOCKS = {"frames_per_block": 4, "context_frames": 2}
LAYERS = (0, 4, 7)
LINEARS = ("qkv", "out", "cross_q", "cross_out", "ffn_in", "ffn_out")


def relative(made: torch.Tensor, truth: torch.Tensor) -> float:
    return float(rms(made.double() - truth.double()) / rms(truth.double()))


def results(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In bfloat16, in fp8, and in float64 on unrounded inputs."""
    narrow, narrow_bias = x.bfloat16(), bias.bfloat16()
    plain = F.linear(narrow, weight.bfloat16(), narrow_bias)
    truth = F.linear(x.double(), weight.double(), bias.double())
    return plain, linear_8bit(narrow, quantise_rows(weight), narrow_bias), truth


def errors(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[float, float]:
    """Of bfloat16 and of fp8."""
    plain, eight, truth = results(x, weight, bias)
    return relative(plain, truth), relative(eight, truth)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def engine(**options: Any) -> Engine:
    return Engine.from_pretrained(BUILT_IN, device="cpu", **{**BLOCKS, **options})


Rows = dict[str, list[float]]


def synthetic() -> Rows:
    """Outliers by channel and by token: the error of the whole, and what it is for all that is no outlier."""
    x, weight, bias = draw(256, 1536, seed=1), draw(512, 1536, seed=2) / 1536**0.5, torch.zeros(512)
    channels, tokens = x.clone(), x.clone()
    channels[:, :8] *= 30
    tokens[:4] *= 100
    others = F.linear(x[:, 8:].double(), weight[:, 8:].double())
    rows = {}
    for name, given in (("none", x), ("8 of 1536 channels", channels), ("4 of 256 tokens", tokens)):
        *made, truth = results(given, weight, bias)
        whole = [relative(each, truth) for each in made]
        if given is tokens:
            rest = [relative(each[4:], truth[4:]) for each in made]
        elif given is channels:  # of every number there is the outliers' part and the others'; an error is of both
            rest = [float(rms(each.double() - truth) / rms(others)) for each in made]
        else:
            rest = whole
        rows[name] = [*whole, *rest]
    return rows


def layer_by_layer() -> Rows:
    """Inputs as the float32 model's own layers see them: the mean over a linear's first six calls."""
    built = engine(dtype="float32")
    built.parts.load()
    layers = built.parts.slices[0][0]._layers  # type: ignore[attr-defined]
    names = {id(getattr(layers[i], name).weight): (i, name) for i in LAYERS for name in LINEARS}
    found: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)

    def watch(self: Linear, x: torch.Tensor) -> torch.Tensor:
        key = names.get(id(self.weight))
        if key is not None and len(found[key]) < 6:  # of the first steps, both branches
            found[key].append(errors(x, self.weight, self.bias))
        return F.linear(x, self.weight, self.bias)

    with mock.patch.object(Linear, "__call__", watch):
        built(PROMPT, output_type="latent", **{**CALL, "num_frames": 13, "num_inference_steps": 3})
    rows = {}
    for (layer, name), pairs in sorted(found.items(), key=lambda item: (item[0][0], LINEARS.index(item[0][1]))):
        rows[f"layer {layer}, {name}"] = [sum(values) / len(values) for values in zip(*pairs)]
    return rows


VIDEOS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "fp8 linears": {"linear_8bit": "fp8"},
    "fp8 linears but in layers 0 and 7": {"linear_8bit": LinearPolicy("fp8", (0, 7))},
    "features in 8 bits": {"features_8bit": True},
    "int8 attention": {"attention_8bit": "int8"},
}


def videos() -> Rows:
    """Final latents against those of the same seed in float32: the mean over seeds, and the least and the largest."""

    def make(**options: Any) -> list[torch.Tensor]:
        built = engine(**options)
        return [built(PROMPT, output_type="latent", seed=seed, **CALL).frames for seed in SEEDS]

    truths = make(dtype="float32")
    rows = {}
    for name, options in VIDEOS.items():
        found = [relative(made, truth) for made, truth in zip(make(dtype="bfloat16", **options), truths)]
        rows[name] = [sum(found) / len(found), min(found), max(found)]
        print(name, *rows[name], sep=" | ", flush=True)
    return rows


def percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def table(columns: list[str], rows: Rows) -> str:
    lines = [columns, ["---"] * len(columns), *([name, *map(percent, values)] for name, values in rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def notes(outliers: Rows, layers: Rows, whole: Rows) -> str:
    """The text below the tables, with their numbers."""
    eight = [values[1] for values in (*layers.values(), outliers["none"])]
    times = [values[1] / values[0] for values in layers.values()]
    _, _, plain_rest, rest = outliers["8 of 1536 channels"]
    plain = whole["bfloat16"]
    moved = "".join(
        f"\n  - {name}: {values[0] / plain[0]:.1f} times bfloat16's mean"
        f"{'' if values[1] > plain[2] else ', ranges of seeds overlap'};"
        for name, values in whole.items()
        if values is not plain
    )
    return NOTES.format(
        least=percent(min(eight)), most=percent(max(eight)), fewest=f"{min(times):.0f}", times=f"{max(times):.0f}",
        plain_rest=percent(plain_rest), rest=percent(rest), none=percent(outliers["none"][1]),
        by_token=percent(outliers["4 of 256 tokens"][3]), seeds=len(SEEDS), moved=moved[:-1],
    )  # fmt: skip


HEADER = """\
# 8-bit linears and features: what they cost

Written by `python bench/linear_8bit_error.py` (torch {torch}, commit {commit}) through the PyTorch definitions, on a
CPU. `linear_8bit="fp8"` puts weights (a scale per output channel) and inputs (a scale per token) of six linears of a
layer into e4m3; the product has float32 sums and comes in bfloat16. Embeddings of time, text and patches, the text's
keys and values and the head stay as they are.

Relative error of a linear's result, `rms(error) / rms(truth)`, against float64 over unrounded float32 inputs. First
with gaussian inputs and weights (256 tokens, 1,536 channels, no bias) and outliers: channels 30 times larger, or tokens
100 times larger. "For the rest" is the same error over the part that the other channels have in the result, or the
error of the other tokens:

"""

LAYERS_HEADER = """
The layers of the model of moving shapes, with inputs that they see in a video in float32 (a linear's first six calls):

"""

WHOLE = """
Whole videos of that model ({num_frames} frames, {num_inference_steps} steps, no guidance, two blocks, {seeds} seeds),
against those of the same seeds in float32: relative error of the final latents.

"""

NOTES = """
What it says:

- Two roundings to e4m3 cost {least} to {most} of a linear's result, {fewest} to {times} times what bfloat16 costs.
- Outliers among channels cost the others: against the part of these in the result the error is {rest}, where bfloat16
  has {plain_rest} and fp8 without outliers {none}. The rms of the whole, in which large channels count most, does not
  show it. Outliers among tokens cost the other tokens nothing ({by_token}): each has a scale of its own.
- How far latents move in a video of this model, {seeds} seeds:{moved}.
- Guidance multiplies the difference of two branches, and their errors with it: these would be larger. It is off here.
- What is left of it elsewhere is for the model to say. This one is small, and trained for moving shapes; how far a
  Wan video moves has to be measured on Wan, with a quality gate, before anything but "off" becomes a default.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", action="store_true", help="print the tables and write nothing")
    arguments = parser.parse_args()
    sides = ["bf16", "fp8"]
    text = HEADER.format(torch=torch.__version__, commit=commit())
    outliers, layers, whole = synthetic(), layer_by_layer(), videos()
    text += table(["outliers", *sides, *(f"{side}, for the rest" for side in sides)], outliers)
    text += LAYERS_HEADER + table(["linear", *sides], layers)
    text += WHOLE.format(**CALL, seeds=len(SEEDS)) + table(["video", "mean", "least", "largest"], whole)
    text += notes(outliers, layers, whole)
    if arguments.rows:
        print(text)
    else:
        (DOCS / "linear-8bit.md").write_text(text)


if __name__ == "__main__":
    main()
