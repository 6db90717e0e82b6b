"""Passes over memory of a layer, counted from the ops that it calls. No GPU, no memory: tensors are on "meta".

    python bench/count_passes.py                         # tables of docs/gpu.md

A pass reads or writes one tensor [tokens, inner] in 16 bits. Counted are the bytes of the elements that every op takes
and makes, each tensor once per op. Not counted: matrix products and attention with all that they read and write, whose
own rate covers it; views; memory that is only allocated. An op that reads every other element (diffusers' rotary
embedding) counts half, though a card fetches whole lines: rivals are a little slower than counted.

A layer is what one more layer adds to a step, in bfloat16 at 480p with B = C = 8, on the way that a card takes:

* ours: ``WanSlice.layer``, every fused op as one op, the GELU in its product's epilogue.
* diffusers: its own WanTransformerBlock, eager, on the same tokens.
* authors: ``harness.rivals.AuthorsStep``, both branches of B + C frames at once.

Predictions: arithmetic and bytes of ``planning.cost`` at the rates of ``planning.devices`` for an H200. Diffusers and
the authors have their own counted passes in place of ours.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from harness.rivals import AuthorsStep, Inputs, Weights, diffusers_step, ours_step
from harness.shapes import GPU_SHAPES, Shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualparal.config.blocks import BlockConfig
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.kernels import backend
from dualparal.models.keys_values import KeysValues
from dualparal.models.wan.sizes import MODELS
from dualparal.planning.cost import FEATURE_PASSES, PASSES, Arithmetic, layer_arithmetic
from dualparal.planning.devices import DEVICES
from dualparal.planning.workload import Workload

# Products and attention: by arithmetic, not by bytes.
ARITHMETIC = {"aten::linear", "aten::_addmm_activation", "aten::scaled_dot_product_attention", "dualparal::attention"}
# Ops that read nothing of what they write.
WRITES_ONLY = {"aten::copy_", "dualparal::qk_norm_rope"}
ALLOCATES = {"aten::empty", "aten::empty_like", "aten::new_empty"}
CARD = DEVICES["h200"]
SHAPES = {"wan2.1-t2v-1.3b": "wan1.3b-480p-c8", "wan2.1-t2v-14b": "wan14b-480p-c8"}
# Self-attention in 8 bits: FLOP/s that a kernel may reach.
FAST_ATTENTION = (800e12, 1000e12)


class Traffic(TorchDispatchMode):
    """Counts what ops move while it is entered.

    Attributes:
        moved: bytes by name of the op.
        launches: calls by name of the op, views and allocations left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, given = op._schema.name, [*args, *(kwargs or {}).values()]
        if name == "aten::scaled_dot_product_attention":
            result = torch.empty_like(args[0])  # in the queries' layout, as a card's kernels leave it
        else:
            result = op(*args, **(kwargs or {}))
        moved = 0 if name in ALLOCATES else _moved(op, given, result)
        self.launches[name] += moved > 0
        if name not in ARITHMETIC:
            self.moved[name] += moved
        return result


def _moved(op: Any, given: Sequence[Any], result: Any) -> int:
    """Bytes that a call reads and writes; 0 for a view."""
    inputs = list(_tensors(given))
    written = {
        id(tensor)
        for argument, value in zip(op._schema.arguments, given, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value)
    }
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    made = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in storages]
    if not made and not written:
        return 0
    reads_all = op._schema.name not in WRITES_ONLY
    read = [tensor for tensor in inputs if reads_all or id(tensor) not in written]
    return sum(map(_bytes, [*read, *(tensor for tensor in inputs if id(tensor) in written), *made]))


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements of a tensor; what is expanded counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * tensor.itemsize


class Count(NamedTuple):
    """The passes of a layer over a unit's hidden states, by name of the op, and its launches."""

    passes: dict[str, float]
    launches: int

    @property
    def total(self) -> float:
        return sum(self.passes.values())


Step = Callable[[Weights], Callable[[], object]]


def ours(neighbours: int = 0) -> Step:
    """A unit of B frames that reads C frames of so many neighbours."""

    def prepare(weights: Weights) -> Callable[[], object]:
        shape = weights.shape
        rows = torch.empty(shape.context * shape.grid.tokens, shape.inner, dtype=weights.dtype, device="meta")
        inputs = Inputs(weights, shape.frames)
        return lambda: ours_step(weights, inputs, [[KeysValues(rows, rows)] * neighbours] * shape.layers)

    return prepare


def diffusers(weights: Weights) -> Callable[[], object]:
    """A unit of B frames through diffusers' blocks."""
    inputs = Inputs(weights, weights.shape.frames)
    return lambda: diffusers_step(weights, inputs)


def authors(weights: Weights) -> Callable[[], object]:
    """Both branches of B + C frames, attending to C cached ones besides."""
    inputs, step = Inputs(weights, weights.shape.frames + weights.shape.context), AuthorsStep(weights)
    step(inputs, use_cache=False)  # fills the cache
    return lambda: step(inputs, use_cache=True)


def count(shape: Shape, step: Step, tokens: int) -> Count:
    """Counts what a third layer adds to two.

    Args:
        shape: the model and the blocks.
        step: prepares a step with given weights.
        tokens: of a pass, [tokens, inner].
    """
    found = []
    for layers in (2, 3):
        run = step(Weights(replace(shape, layers=layers), torch.bfloat16, torch.device("meta")))
        # Our ops show themselves to whoever records them
        with mock.patch.object(backend, "recorded", lambda *_: True), torch.inference_mode(), Traffic() as traffic:
            run()
        found.append(traffic)
    one = 2 * tokens * shape.inner
    moved = found[1].moved - found[0].moved
    return Count(
        {name: size / one for name, size in moved.items()}, sum((found[1].launches - found[0].launches).values())
    )


class Layer(NamedTuple):
    """Counted and predicted figures of a layer of one model.

    Attributes:
        ours, diffusers, authors: passes.
        work: the model at 480p.
    """

    ours: Count
    diffusers: Count
    authors: Count
    work: Workload

    @classmethod
    def of(cls, model: str) -> Layer:
        """Counts a model's layer."""
        shape = next(shape for shape in GPU_SHAPES if shape.name == SHAPES[model])
        work = Workload(MODELS[model], VideoConfig(num_frames=1025), EngineConfig(BlockConfig(8, 8)))
        own = shape.frames * shape.grid.tokens
        return cls(count(shape, ours(), own), count(shape, diffusers, own), count(shape, authors, 4 * own), work)

    @property
    def own(self) -> int:
        """Tokens of a block."""
        return 8 * self.work.tokens

    def plain(self) -> Arithmetic:
        """One unit of ours without neighbours."""
        return layer_arithmetic(self.work, self.own, self.own)

    def step(self) -> Arithmetic:
        """Both units of ours with both neighbours, features left out."""
        return _times(2, layer_arithmetic(self.work, self.own, 3 * self.own))

    def features(self) -> float:
        """Bytes of the features that both units borrow and lend."""
        lending = layer_arithmetic(self.work, self.own, 3 * self.own, 2 * self.own, 2 * self.own)
        return 2 * lending.moved - self.step().moved

    def step_of_authors(self) -> Arithmetic:
        """Both branches of the authors' step."""
        both = _times(2, layer_arithmetic(self.work, 2 * self.own, 3 * self.own))
        return both._replace(moved=both.moved / PASSES * self.authors.total)

    def plain_of_diffusers(self) -> Arithmetic:
        """Diffusers' layer on a unit without neighbours."""
        mine = self.plain()
        return mine._replace(moved=mine.moved / PASSES * self.diffusers.total)

    def saved(self, keys: int, rate: float) -> float:
        """Seconds that self-attention of a unit saves at another rate."""
        flops = 4.0 * self.own * keys * self.work.model.inner
        return flops / CARD.attention - flops / rate


def _times(factor: int, work: Arithmetic) -> Arithmetic:
    return Arithmetic(*(factor * part for part in work))


def passes_table(layers: Sequence[Layer]) -> str:
    """Markdown: counted passes of each way, by kind of op."""
    lines = ["| passes of a layer | Wan2.1-1.3B | Wan2.1-14B | launches | most of them |", "|---|---|---|---|---|"]
    names = {
        "ours": "ours",
        "diffusers": "diffusers' block, eager",
        "authors": "the authors' layer, eager",
    }
    for key, name in names.items():
        counts: list[Count] = [getattr(layer, key) for layer in layers]
        most = sorted(counts[0].passes.items(), key=lambda item: -item[1])[:5]
        kinds = ", ".join(f"{op.split('::')[1]} {passes:.1f}" for op, passes in most)
        lines.append(f"| {name} | {counts[0].total:.1f} | {counts[1].total:.1f} | {counts[0].launches} | {kinds} |")
    return "\n".join(lines)


def _pair(values: Iterator[float] | Sequence[float], form: str) -> str:
    return " | ".join(format(value, form) for value in values)


def step_table(layers: Sequence[Layer]) -> str:
    """Markdown: predicted milliseconds of a block-step's layer."""
    theirs = [layer.step_of_authors() for layer in layers]
    mine = [layer.step() for layer in layers]
    features = [layer.features() / CARD.copy for layer in layers]
    seconds = [work.seconds(CARD) for work in mine]
    rival = [work.seconds(CARD) for work in theirs]
    fast = [t - 2 * layer.saved(3 * layer.own, FAST_ATTENTION[1]) for t, layer in zip(seconds, layers, strict=True)]
    unit = [4e-6 * layer.own * layer.work.model.inner * layer.work.itemsize for layer in layers]
    ratio = lambda ours: [r / (o + f) for r, o, f in zip(rival, ours, features, strict=True)]  # noqa: E731
    ms = lambda values: _pair([1e3 * value for value in values], ".1f")  # noqa: E731

    def flops(works: Sequence[Arithmetic]) -> str:
        kinds = [" / ".join(f"{1e-12 * getattr(work, kind):.1f}" for work in works) for kind in ("attention", "linear")]
        return f"attention {kinds[0]} TFLOP, linears {kinds[1]} TFLOP"

    eager = " / ".join(f"{layer.authors.total:.1f}" for layer in layers)
    share = " / ".join(f"{100 * f / s:.1f}" for f, s in zip(features, seconds, strict=True))
    return "\n".join([
        "| milliseconds per layer, both branches | Wan2.1-1.3B | Wan2.1-14B | from |",
        "|---|---|---|---|",
        f"| authors' way: 16 frames of queries, 24 of keys, eager | {ms(rival)} | {flops(theirs)}, {eager} passes "
        f"over {unit[0]:.0f} / {unit[1]:.0f} MB |",
        f"| ours, `cached`: 8 frames of queries, 24 of keys, fused | {ms(seconds)} | {flops(mine)}, {PASSES} passes "
        f"over {unit[0] / 2:.0f} / {unit[1] / 2:.0f} MB |",
        f"| features moved (C = 8, two neighbours in, two out) | {_pair([1e3 * f for f in features], '.2f')} | a "
        f"neighbour's token: {FEATURE_PASSES} passes to borrow, {FEATURE_PASSES // 2} to lend; {share} % of a layer |",
        f"| ratio, features included | {_pair(ratio(seconds), '.2f')} | the target is 2.3 |",
        f"| ours with self-attention at {1e-12 * FAST_ATTENTION[1]:,.0f} TFLOP/s (fp8) | {ms(fast)} | the rest stays |",
        f"| ratio, features included | {_pair(ratio(fast), '.2f')} | the target is 2.8 |",
    ])  # fmt: skip


def layer_table(layers: Sequence[Layer]) -> str:
    """Markdown: predicted milliseconds of a layer on equal tokens, as ``bench_layer.py`` measures it."""
    theirs = [layer.plain_of_diffusers().seconds(CARD) for layer in layers]
    mine = [layer.plain().seconds(CARD) for layer in layers]
    ratio = lambda ours: _pair([t / o for t, o in zip(theirs, ours, strict=True)], ".2f")  # noqa: E731
    lines = [
        "| milliseconds per layer, 8 frames, no neighbours | Wan2.1-1.3B | Wan2.1-14B | target |",
        "|---|---|---|---|",
        f"| diffusers' block, eager | {_pair([1e3 * t for t in theirs], '.2f')} | |",
        f"| ours | {_pair([1e3 * t for t in mine], '.2f')} | |",
        f"| ratio | {ratio(mine)} | 1.15 |",
    ]
    for rate in FAST_ATTENTION:
        fast = [t - layer.saved(layer.own, rate) for t, layer in zip(mine, layers, strict=True)]
        lines.append(
            f"| ratio with self-attention at {1e-12 * rate:,.0f} TFLOP/s (8 bits) | {ratio(fast)} | 1.45 / 1.35 |"
        )
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    layers = [Layer.of(model) for model in SHAPES]
    print("\n\n".join([passes_table(layers), step_table(layers), layer_table(layers)]))


if __name__ == "__main__":
    main()
