"""Two products of Wan's transformer that could be something else: patch embedding and the feed-forward's first."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from count_passes import Traffic
from harness.rivals import Inputs, Weights, ours_step
from harness.shapes import Shape

from dualparal.kernels import backend
from dualparal.kernels.accuracy import assert_no_worse
from dualparal.models.linear import Linear
from dualparal.models.wan.feed_forward import linear_gelu

SHAPE = Shape("tiny", heads=2, head_dim=24, ffn_dim=96, height=32, width=48, frames=3, context=0, text_tokens=5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_patches_are_embedded_as_a_convolution_does(dtype: torch.dtype) -> None:
    weights = Weights(SHAPE, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 3, 4, 6, generator=generator)
    kernel, bias = (weights.tensors[f"patch_embedding.{name}"] for name in ("weight", "bias"))
    with Traffic() as traffic:
        made = weights.ours.embed(weights.ours.patches(latents))
    assert made.is_contiguous() and made.dtype == dtype
    assert not [name for name in traffic.launches if "conv" in name]

    def convolved(to: torch.dtype) -> torch.Tensor:
        given = latents.to(dtype).to(to)
        return F.conv3d(given, kernel.to(to), bias.to(to), stride=(1, 2, 2)).flatten(2)[0].T

    assert_no_worse(made, convolved(dtype), convolved(torch.float64), 1.1, str(dtype))


@torch.inference_mode()
def test_a_stage_calls_no_convolution_and_no_gelu_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of embedding, layers and head on "meta", which takes the way of a card: 13 launches per layer."""
    monkeypatch.setattr(backend, "recorded", lambda *_: True)
    weights = Weights(SHAPE, torch.bfloat16, torch.device("meta"))
    inputs = Inputs(weights, SHAPE.frames)
    head = inputs.time._replace(head=torch.empty(2, SHAPE.inner, device="meta"))
    with Traffic() as traffic:
        hidden = weights.ours.embed(weights.ours.patches(torch.empty(1, 16, 3, 4, 6, device="meta")))
        ours_step(weights, inputs, [[]] * SHAPE.layers)
        velocity = weights.ours.picture(weights.ours.head(hidden, (hidden, None), head), SHAPE.grid)
    assert velocity.shape == (1, 16, 3, 4, 6)
    names = set(traffic.launches)
    assert not [name for name in names if "conv" in name or "gelu" in name]
    assert traffic.launches["aten::_addmm_activation"] == SHAPE.layers
    assert traffic.launches["dualparal::residual_norm"] == 3 * SHAPE.layers  # the head's, and not the first layer's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gelu_on_the_cpu_is_the_definition(dtype: torch.dtype) -> None:
    x, weight, bias = tensors(dtype)
    assert torch.equal(linear_gelu(x, Linear(weight, bias)), F.gelu(F.linear(x, weight, bias), approximate="tanh"))


class OnACard(torch.Tensor):
    """A tensor on the CPU that says it is on a card."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_card_is_given_the_same_product(dtype: torch.dtype) -> None:
    """The op that a card runs, run by the CPU: there its GELU is the exact one, and the product before it the same."""
    x, weight, bias = tensors(dtype)
    made = linear_gelu(x.as_subclass(OnACard), Linear(weight, bias)).as_subclass(torch.Tensor)
    assert torch.equal(made, F.gelu(F.linear(x, weight, bias)))
    assert not torch.equal(made, linear_gelu(x, Linear(weight, bias)))


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [40, 48], weight [96, 48], bias [96]."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((40, 48), (96, 48), (96,)))
    return x.to(dtype), (weight / 7).to(dtype), bias.to(dtype)
