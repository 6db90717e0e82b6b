"""Writes docs/attention-8bit.md: what 8 bits cost in attention, as relative error of its output.

Run from anywhere: ``python bench/attention_8bit_error.py``, a minute on two cores; it needs no GPU. Everything goes
through the definition of the family (``backend="torch"``), which the kernels are tested against. With
``--machine-code`` it compiles the Triton kernels for every architecture instead and writes the second table, which
needs triton and a few minutes.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from harness.record import commit

from dualparal.kernels.accuracy import rms
from dualparal.kernels.attention import reference as attention_reference
from dualparal.kernels.attention_8bit import (
    FP8,
    TILE,
    KeysValues8,
    Queries8,
    attention_8bit,
    place,
    quantise_features,
    reference,
    tiles_of,
)
from dualparal.kernels.qk_norm_rope import reference as norm_reference

DOCS = Path(__file__).resolve().parents[1] / "docs"
QUERIES, OWN, LENT, HEADS, HEAD_DIM = 256, 2048, 1024, 2, 128  # 4096 keys
INNER = HEADS * HEAD_DIM

KINDS = {  # name: keys, fp8 values
    "int8 QK, bf16 PV": (torch.int8, False),
    "int8 QK, e4m3 PV": (torch.int8, True),
    "e4m3 QK, e4m3 PV": (FP8, True),
}


class Sample(NamedTuple):
    """Queries [S, inner], and keys and values of up to three segments; in float32."""

    name: str
    q: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    heads: int
    means: list[torch.Tensor] | None = None  # known beforehand; otherwise the true ones of each segment


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, means: list[torch.Tensor] | None = None
) -> Sample:
    lengths = (OWN, LENT, LENT)
    return Sample(name, q, list(k.split(lengths)), list(v.split(lengths)), HEADS, means)


def normed(x: torch.Tensor, weight: torch.Tensor | float, rows: range) -> torch.Tensor:
    """RMSNorm over all heads and rotation, as in a Wan layer: 16 x 16 tokens per frame, row i of the video."""
    from dualparal.models.wan.transformer import _angles

    position, third = torch.tensor(rows), HEAD_DIM // 6
    angles = torch.cat(
        [
            _angles(position // 256, HEAD_DIM - 4 * third),
            _angles(position // 16 % 16, 2 * third),
            _angles(position % 16, 2 * third),
        ],
        dim=1,
    )
    weight = weight * torch.ones(INNER)
    return norm_reference.rotate(
        norm_reference.rms_norm(x, weight, 1e-6), angles.cos().float(), angles.sin().float(), HEADS
    )


def synthetic() -> Iterator[Sample]:
    total = OWN + 2 * LENT
    q, k, v = draw(QUERIES, INNER, seed=1), draw(total, INNER, seed=2), draw(total, INNER, seed=3)
    yield sample("gaussian q, k, v (worst case: nothing stands out)", q, k, v)
    common = draw(total, INNER, seed=4)
    q_like, k_like = q + 1.2 * common[:QUERIES], k + 1.2 * common
    queries, keys = range(QUERIES), range(total)
    yield sample("normed and rotated, q and k related", normed(q_like, 1.4, queries), normed(k_like, 1.4, keys), v)
    yield sample("the same, unrelated", normed(q, 1.4, queries), normed(k, 1.4, keys), v)
    yield sample("the same, v with a mean", normed(q, 1.4, queries), normed(k, 1.4, keys), v + draw(INNER, seed=5))
    channel = torch.arange(INNER) % HEAD_DIM
    for name, which in (("slow", (channel >= 36) & (channel < 44)), ("fast", channel < 8)):
        outliers = normed(k + 8.0 * which, 1.4, keys)
        yield sample(f"outliers in channels of k that rotate {name}ly".replace("fastly", "fast"),
                     normed(q, 1.4, queries), outliers, v)  # fmt: skip


def tiny_wan() -> Iterator[Sample]:
    """What the engine's own layers see: a random tiny Wan2.1, the middle block of three, all steps."""
    from dualparal.engine.engine import Engine
    from dualparal.models.wan import transformer as wan
    from dualparal.models.wan.tiny import build_tiny_pipeline

    layers, heads, frames, context, tokens = 3, 2, 4, 2, 256
    own, lent = frames * tokens, context * tokens
    seen: list[tuple[torch.Tensor, ...]] = []
    attention = wan.attention

    def watch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(k) == own + 2 * lent:
            seen.append(tuple(t.float().clone() for t in (q, k, v)))
        return attention(q, k, v, *args, **kwargs)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(wan, "attention", watch):
        model = build_tiny_pipeline(Path(folder) / "wan", layers=layers, heads=heads, head_dim=64)
        engine = Engine.from_pretrained(model, device="cpu", frames_per_block=frames, context_frames=context)
        engine(
            prompt_embeds=draw(1, 16, engine.source.spec.text_dim, seed=1),
            height=256,
            width=256,
            num_frames=4 * (3 * frames - 1) + 1,
            num_inference_steps=4,
            guidance_scale=1.0,
            output_type="latent",
        )
    lengths = (own, lent, lent)
    steps = len(seen) // layers  # from step 1 on: before, the next block has not begun
    for step in (0, steps - 1):
        for layer in (0, layers - 1):
            q, k, v = seen[step * layers + layer]
            name = f"tiny Wan, layer {layer}, step {step + 1} of 0 to {steps}"
            yield Sample(name, q, list(k.split(lengths)), list(v.split(lengths)), heads)
            if step:
                before = [part.mean(0) for part in seen[(step - 1) * layers + layer][1].split(lengths)]
                yield Sample(f"{name}, means of the step before", q, list(k.split(lengths)), list(v.split(lengths)),
                             heads, before)  # fmt: skip


def truth(x: Sample) -> torch.Tensor:
    q, k, v = x.q.double(), torch.cat(x.keys).double(), torch.cat(x.values).double()
    return attention_reference.attention(q, k, v, heads=x.heads)


def bf16(x: Sample) -> torch.Tensor:
    """The usual kernel: operands and weights rounded to bfloat16, everything between in float32."""
    return bf16_values(x, x.q.bfloat16().float(), torch.cat(x.keys).bfloat16().float())


def bf16_values(x: Sample, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention with these queries and keys as they are, and values and weights in bfloat16."""

    def by_head(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (x.heads, -1)).transpose(0, 1)

    q, k, v = by_head(queries), by_head(keys), by_head(torch.cat(x.values).bfloat16().float())
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = weights.bfloat16().float() @ v / weights.sum(-1, keepdim=True)
    return out.transpose(0, 1).flatten(1).bfloat16()


def eight_bit(x: Sample, keys: torch.dtype, fp8: bool, smooth: bool) -> torch.Tensor:
    """The definition, over an arena of all segments, each with a mean of its own."""
    means = torch.stack(x.means or [k.mean(0) for k in x.keys]) * float(smooth)
    spans = place([(len(k), 0) for k in x.keys])
    rows, inner = tiles_of(spans[-1]) * TILE, x.q.shape[1]
    arena = KeysValues8.empty(rows, inner, x.heads, FP8 if fp8 else torch.bfloat16, keys=keys)
    for start, k, v, mean in zip(spans[::2], x.keys, x.values, means):
        made = quantise_features(k, v, mean, heads=x.heads, fp8=fp8, dtype=keys)
        for target, source in zip(arena.rows(start, len(k)), made):
            if target is not None and source is not None:
                target.copy_(source)
    queries = Queries8(*reference.quantise_rows(x.q, x.heads, keys), reference.key_bias(x.q, means, x.heads))
    return attention_8bit(queries, arena, spans, heads=x.heads, backend="torch")


def scale_table() -> str:
    """int8 queries and keys, bfloat16 values: how many keys may share a scale?"""
    lines = [["inputs", "one key", "64 keys", "128 keys"], ["---"] * 4]
    for x in list(synthetic())[:2]:
        want, cells = truth(x), []
        for shared in (1, 64, 128):
            keys = torch.cat(x.keys).unflatten(1, (x.heads, -1)).unflatten(0, (-1, shared))  # tiles, shared, heads, dim
            values, scale = reference.quantise(keys, keys.abs().amax((1, 3), keepdim=True), torch.int8)
            q, q_scale = reference.quantise_rows(x.q, x.heads, torch.int8)
            restored = (values * scale).flatten(0, 1).flatten(1)
            queries = (q.unflatten(1, (x.heads, -1)) * q_scale.T[..., None]).flatten(1)
            out = bf16_values(x, queries, restored)
            cells.append(f"{(rms(out.double() - want) / rms(want)).item():.2e}")
        lines.append([x.name, *cells])
        print(*lines[-1], sep=" | ", flush=True)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


HEADER = """\
# 8-bit attention: what it costs

Relative error of the output of attention, `rms(error) / rms(truth)` over all elements, against float64 attention over
unrounded float32 inputs. Written by `python bench/attention_8bit_error.py` (torch {torch}, commit {commit}) through
the PyTorch definition; the Triton kernels are tested to be as near as it is. The output is bfloat16 in every column,
which alone costs about 1.7e-3. Segments: {own} own keys and twice {lent} of neighbours, {head_dim} numbers per head
(tiny Wan: 1024 and twice 512, 64 per head). "Smooth": every segment less a mean of its own, and the exact
correction between segments; the true mean of the segment unless the row says otherwise.

"""

SCALES = """
How many keys share a scale (int8 queries and keys, bfloat16 values, not smoothed):

"""

NOTES = """
What it says:

- int8 queries and keys: 1.4 to 4 times the error of bfloat16, most where queries and keys are unrelated; 5 to 6
  times with outliers in the keys, if not smoothed.
- e4m3 values and weights: up to 2.6 % more, since e4m3 has three bits of mantissa whatever the scale; less where
  values have a mean, as in the tiny Wan.
- e4m3 queries and keys: always worse than int8. For cards without int8 units.
- Smoothing halves the error of int8 with outliers in channels that rotate slowly. It hardly helps those that rotate
  fast, whose mean over many positions is nearly nothing after rotation, and changes little where there are none.
- A mean from the step before gives nearly what the true one gives. It only has to be the same for a segment and its
  correction.
- Tiny Wan has random weights. How far a trained model's video moves has to be measured on one, with a quality gate,
  before anything but "off" becomes a default.

In the engine it is an option (`attention_8bit=`, `--attention-8bit`) for self-attention; attention to the text stays in
16 bits. Keys are int8 in both modes. A block takes from its keys, per layer and branch, their mean of the step before;
at its first step in 8 bits it looks at them twice and takes their own. Layers and steps can be kept in 16 bits, and
features that were made on the other side of that border are converted by their reader. A layer in 8 bits at all steps
keeps features of three quarters ("int8") or half ("fp8") the size, and up to a tile of 128 tokens each more; one that
changes keeps slots for the larger of the two.

What the machine code looks like: [attention-8bit-code.md](attention-8bit-code.md).
"""

CODE_HEADER = """\
# 8-bit attention as machine code

Compiled without a GPU by `python bench/attention_8bit_error.py --machine-code`, Triton {version}, in the
configuration a launch takes. Facts about the code, not timings: nothing here was run. Registers are per thread, stack
is bytes per thread (more than none means spills), shared is bytes per thread block, `24x16` is 24 instructions that
move 16 bytes each for one thread. On sm_90 queries meet int8 keys in IGMMA, weights meet values in HGMMA or QGMMA.
The narrow loads are scales and the ragged ends of segments, which run once per segment.

"""


def error_table() -> str:
    columns = ["bf16", *(f"{kind}{smooth}" for kind in KINDS for smooth in ("", ", smooth"))]
    lines = [["inputs", *columns], ["---"] * (len(columns) + 1)]
    for x in (*synthetic(), *tiny_wan()):
        want = truth(x)
        made = [bf16(x), *(eight_bit(x, *kind, smooth) for kind in KINDS.values() for smooth in (False, True))]
        errors = [f"{(rms(out.double() - want) / rms(want)).item():.1e}" for out in made]
        lines.append([x.name, *errors])
        print(x.name, *(f"{name}: {error}" for name, error in zip(columns, errors)), sep=" | ", flush=True)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code_table() -> str:
    from dualparal.kernels.attention_8bit import triton_kernel
    from dualparal.kernels.offline import ARCHS, row, write_table

    rows = []
    for arch in ARCHS:
        for case in triton_kernel.offline_cases(arch):
            rows.append(row("attention_8bit", case, case.compile(arch)))
            print(*rows[-1].values(), sep=" | ", flush=True)
    return write_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine-code", action="store_true", help="compile the kernels and write the second table")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.machine_code:
        import triton

        text = CODE_HEADER.format(version=triton.__version__) + code_table()
        (arguments.out / "attention-8bit-code.md").write_text(text)
        return
    header = HEADER.format(torch=torch.__version__, commit=commit(), own=OWN, lent=LENT, head_dim=HEAD_DIM)
    (arguments.out / "attention-8bit.md").write_text(header + error_table() + SCALES + scale_table() + NOTES)


if __name__ == "__main__":
    main()
