"""The rivals of the benches compute what they stand for: else a ratio would mean nothing."""

from __future__ import annotations

import pytest
import torch
from harness.rivals import AuthorsStep, Inputs, OursStep8, Weights, diffusers_step, fp8_linears, ours_step
from harness.shapes import Shape

from dualparal.models.keys_values import KeysValues

SHAPE = Shape("tiny", heads=2, head_dim=24, ffn_dim=96, height=32, width=48, frames=3, context=2, text_tokens=5)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(SHAPE, torch.float32, torch.device("cpu"))


@torch.inference_mode()
def test_a_layer_is_diffusers_layer(weights: Weights) -> None:
    inputs = Inputs(weights, SHAPE.frames)
    nobody: list[list[KeysValues]] = [[] for _ in range(SHAPE.layers)]
    assert (ours_step(weights, inputs, nobody) - diffusers_step(weights, inputs)).abs().max() < 1e-4


@torch.inference_mode()
def test_a_step_with_fp8_linears_is_near_ours() -> None:
    weights = Weights(SHAPE, torch.bfloat16, torch.device("cpu"))
    inputs = Inputs(weights, SHAPE.frames)
    nobody: list[list[KeysValues]] = [[] for _ in range(SHAPE.layers)]
    plain, made = (ours_step(each, inputs, nobody) for each in (weights, fp8_linears(weights)))
    assert 5e-3 < (made - plain).norm() / plain.norm() < 0.1
    assert torch.equal(diffusers_step(fp8_linears(weights), inputs), diffusers_step(weights, inputs))


@pytest.mark.parametrize("fp8", [False, True])
@torch.inference_mode()
def test_a_step_in_8_bits_is_near_ours(fp8: bool) -> None:
    weights = Weights(SHAPE, torch.bfloat16, torch.device("cpu"))
    inputs, lent = Inputs(weights, SHAPE.frames), SHAPE.context * SHAPE.grid.tokens
    generator = torch.Generator().manual_seed(0)
    for count in (0, 2):
        neighbours = [
            [KeysValues(*torch.randn(2, lent, SHAPE.inner, generator=generator).bfloat16()) for _ in range(count)]
            for _ in range(SHAPE.layers)
        ]
        plain, step = ours_step(weights, inputs, neighbours), OursStep8(weights, inputs, neighbours, fp8)
        for _ in range(2):  # without a mean, and with that of the step before
            made = step()
            assert 0 < (made - plain).norm() < 0.02 * plain.norm()


@torch.inference_mode()
def test_a_block_step_of_the_authors_is_ours_of_paper(weights: Weights) -> None:
    """Raw cached keys, normalised and rotated again at window-local places, against stored ones at absolute places."""
    frames, tokens = SHAPE.frames + SHAPE.context, SHAPE.grid.tokens
    lent = SHAPE.context * tokens
    later, block = Inputs(weights, frames, start=10 + SHAPE.frames), Inputs(weights, frames, start=10)
    later.hidden = later.hidden.flip(0).contiguous()  # the two blocks differ
    authors = AuthorsStep(weights)
    local = Inputs(weights, frames)
    local.hidden = later.hidden
    first = authors(local, use_cache=False)
    local.hidden = block.hidden
    second = authors(local, use_cache=True)

    stored: list[KeysValues] = []

    class Keeping:
        """Ours, keeping what each layer lends to the block before."""

        num_layers = SHAPE.layers

        def layer(self, index: int, *rest: object) -> object:
            result = weights.ours.layer(index, *rest)  # type: ignore[arg-type]
            context = rest[-1]
            assert isinstance(context, KeysValues)
            stored.append(KeysValues(*(t[lent : 2 * lent].clone() for t in context)))
            return result

        def finish(self, *rest: object) -> torch.Tensor:
            return weights.ours.finish(*rest)  # type: ignore[arg-type]

    ours, weights_ours = weights.ours, Keeping()
    kept = type("Kept", (), {"shape": SHAPE, "ours": weights_ours})()
    made_later = ours_step(kept, later, [[] for _ in range(SHAPE.layers)])
    assert weights.ours is ours
    made = ours_step(weights, block, [[features] for features in stored])
    for branch in range(2):
        assert (first[branch] - made_later).abs().max() < 1e-4
        assert (second[branch] - made).abs().max() < 1e-4
    without = ours_step(weights, block, [[] for _ in range(SHAPE.layers)])
    assert (without - made).abs().max() > 1e-2, "the cache matters"
