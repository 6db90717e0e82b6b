"""The passes as torch.library ops: what torch.compile and torch.export see of them."""

import pytest
import torch

from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.kernels.qk_norm_rope import Lend, qk_norm_rope
from dualparal.kernels.residual_norm import residual, residual_norm
from kernel_common import random

ROWS, HEADS, HEAD_DIM = 6, 2, 8
INNER = HEADS * HEAD_DIM
EPS = 1e-6
OPS = torch.ops.dualparal


def inputs(dtype=torch.float32):
    """x, y, qkv, four vectors, cos, sin."""
    x, y = random(2, ROWS, INNER, dtype=dtype)
    cos, sin = random(2, ROWS, HEAD_DIM // 2, seed=2)
    return x, y, random(ROWS, 3 * INNER, dtype=dtype, seed=3), *random(4, INNER, seed=1), cos, sin


def arena(dtype=torch.float32):
    return torch.full((2, ROWS + 3, INNER + 4), torch.nan, dtype=dtype)


def store(dtype=torch.float32):
    """Keys and values of two sides, two slots each."""
    return torch.full((2, 2, 2, 4, INNER), torch.nan, dtype=dtype)


def lends(store, slots):
    return [Lend(*store[0], slots[:1], 0), Lend(*store[1], slots[1:], 2)]


def layer(x, y, qkv, a, b, c, d, cos, sin, arena, store, slots, scale):
    """Every op, with views of an arena and of a store that are read afterwards."""
    first, h = residual_norm(x, weight=a, bias=b, eps=EPS)
    k, v = arena[0, 2 : ROWS + 2, :INNER], arena[1, 2 : ROWS + 2, :INNER]
    q = qk_norm_rope(qkv + 1, c, d, cos, sin, k, v, heads=HEADS, eps=EPS, lends=lends(store, slots))
    x_new, g = residual_norm(first, q + h, a, b, c, eps=EPS)
    out = residual(x_new, g * k + v, d)
    return combine_guidance(out, y, scale), x_new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_opcheck(dtype, backend):
    x, y, qkv, a, b, c, d, cos, sin = inputs(dtype)
    k, v = arena(dtype)[:, :ROWS, :INNER].nan_to_num(0.5)
    strided_k, strided_v = arena(dtype).nan_to_num(0.5)[:, :ROWS, :INNER]
    two_lends = list(map(list, zip(*lends(store(dtype).nan_to_num(0.5), torch.tensor([1, 0])))))
    for op, args in (
        (OPS.residual_norm, (x, y, a, b, c, EPS, backend)),
        (OPS.residual_norm, (x, y, None, None, None, EPS, backend)),
        (OPS.norm, (x, a, None, EPS, backend)),
        (OPS.residual, (x, y, a, backend)),
        (OPS.qk_norm_rope, (qkv, c, d, cos, sin, k, v, [], [], [], [], HEADS, EPS, backend)),
        (OPS.qk_norm_rope, (qkv, c, d, cos, sin, strided_k, strided_v, *two_lends, HEADS, EPS, backend)),
        (OPS.combine_guidance, (x, y, 5.0, backend)),
    ):
        torch.library.opcheck(op.default, args)


def test_schemas_say_what_is_written():
    arguments = OPS.qk_norm_rope.default._schema.arguments
    assert [a.name for a in arguments if a.alias_info and a.alias_info.is_write] == [
        *("k_out", "v_out", "lend_keys", "lend_values")
    ]
    for op in (OPS.residual_norm, OPS.norm, OPS.residual, OPS.combine_guidance):
        assert not op.default._schema.is_mutable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_graph(dtype):
    """No graph break, equal results, arena and store written; aot_eager is inductor without its C++ compiler."""
    torch._dynamo.reset()
    args = inputs(dtype)
    plain, traced = [(arena(dtype), store(dtype)) for _ in range(2)]
    slots = torch.tensor([1, 0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for scale in (5.0, 3.0):
            want, got = layer(*args, *plain, slots, scale), compiled(*args, *traced, slots, scale)
            assert all(torch.equal(a, b) for a, b in zip(want, got))
            torch.testing.assert_close(traced, plain, rtol=0, atol=0, equal_nan=True)
            slots = slots.flip(0)
    assert not plain[1].isnan().any(), "both slots of both sides were written"
    assert torch._dynamo.explain(layer)(*args, *traced, slots, 5.0).graph_break_count == 0


def test_norm_without_update_gives_x_back():
    torch._dynamo.reset()
    x = random(3, 8)
    same, h = torch.compile(lambda x: residual_norm(x, eps=EPS), fullgraph=True, backend="aot_eager")(x)
    assert same is x and torch.equal(h, residual_norm(x, eps=EPS)[1])


def test_export():
    class Module(torch.nn.Module):
        def forward(self, cond, uncond):
            return combine_guidance(cond, uncond, 5.0)

    cond, uncond = random(2, 3, 4)
    program = torch.export.export(Module(), (cond, uncond))
    assert "dualparal.combine_guidance" in program.graph_module.code
    assert torch.equal(program.module()(cond, uncond), combine_guidance(cond, uncond, 5.0))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda x: residual_norm(x, None, x[0], eps=EPS)[1], "without y"),
        (lambda x: residual_norm(x, x[:, :3], eps=EPS)[1], "expected"),
        (lambda x: combine_guidance(x, x[1:], 5.0), "expected"),
        (lambda x: combine_guidance(x.requires_grad_(), x, 5.0), "gradient"),
    ],
    ids=["gate", "shape of y", "shape", "gradient"],
)
def test_mistakes_show_while_compiling(call, says):
    torch._dynamo.reset()
    with pytest.raises(Exception, match=says):
        torch.compile(call, fullgraph=True, backend="aot_eager")(random(4, 6))
