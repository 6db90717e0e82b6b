import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed

from dualparal.kernels.accuracy import assert_no_worse, nan_filled_memory
from dualparal.kernels.attention import attention
from dualparal.kernels.qk_norm_rope import Lend, qk_norm_rope, reference
from dualparal.kernels.qk_norm_rope import cases as named
from kernel_common import DEVICES, DTYPES, Stores, cases, native, random
from pairwise import pairwise

EPS = 1e-6


def inputs(case, dtype=torch.float32, device="cpu"):
    angles = 100 * random(case.rows, case.head_dim // 2, device=device, seed=4)
    return [
        random(case.rows, 3 * case.inner, dtype=dtype, device=device, seed=1),
        random(case.inner, device=device, seed=2),
        random(case.inner, device=device, seed=3),
        angles.cos(),
        angles.sin(),
    ]


def arenas(case, dtype, device="cpu"):
    """Two arenas full of NaN, and the slices of them that are to be written."""
    shape = (2, case.rows + 2, case.inner + case.padding)
    both = torch.full(shape, torch.nan, dtype=dtype, device=device)
    return both, both[0, 1 : case.rows + 1, : case.inner], both[1, 1 : case.rows + 1, : case.inner]


def run(case, args, backend, device="cpu", lends=()):
    arena, k, v = arenas(case, args[0].dtype, device)
    q = qk_norm_rope(*args, k, v, heads=case.heads, eps=EPS, backend=backend, lends=lends)
    return q, k, v, arena


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases(named))
def test_no_worse_than_torch(case, dtype, device):
    args = inputs(case, dtype, device)
    with nan_filled_memory():
        q, k, v, arena = run(case, args, native(device), device)
    want_q, want_k, _, _ = run(case, args, "torch", device)
    true_q, true_k, _, _ = run_double(case, args)
    assert_no_worse(q, want_q, true_q, 2.0, f"{case.name} q")
    assert_no_worse(k, want_k, true_k, 2.0, f"{case.name} k")
    assert torch.equal(v, args[0][:, 2 * case.inner :])
    # Written: the two slices. Everything around them is as it was.
    assert arena.isnan().sum() == arena.numel() - 2 * case.rows * case.inner


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case, dtype, plain",
    pairwise([param.values[0] for param in cases(named) if param.values[0].lends], DTYPES, ["native", "torch"]),
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_lent_rows_are_the_rows_made(case, dtype, plain, device):
    backend = "torch" if plain == "torch" else native(device)
    args, stores = inputs(case, dtype, device), Stores(case, dtype, device)
    alone = run(case, args, backend, device)
    made = run(case, args, backend, device, stores.lends)
    assert all(torch.equal(a, b) for a, b in zip(made[:3], alone[:3]))
    stores.check(*made[1:3])


def run_double(case, args):
    arena, k, v = arenas(case, torch.float64, args[0].device)
    q = reference.qk_norm_rope(*(t.double() for t in args), k, v, heads=case.heads, eps=EPS)
    return q, k, v, arena


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_diffusers_attention(dtype, backend):
    """A whole WanAttention of diffusers, against one QKV product, this op and attention."""
    if backend == "cpp":
        native("cpu")
    heads, head_dim, frames, height, width = 2, 24, 3, 4, 6
    inner = heads * head_dim
    torch.manual_seed(0)
    module = WanAttention(inner, heads, head_dim, eps=EPS, processor=WanAttnProcessor())
    torch.nn.init.uniform_(module.norm_q.weight, 0.5, 1.5)
    torch.nn.init.uniform_(module.norm_k.weight, 0.5, 1.5)
    module.to(dtype).requires_grad_(False)
    hidden = random(1, frames * height * width, inner, dtype=dtype)
    rotary = WanRotaryPosEmbed(head_dim, (1, 1, 1), 1024)(torch.empty(1, 1, frames, height, width))
    theirs = module(hidden, None, None, rotary)[0]
    truth = module.double()(hidden.double(), None, None, tuple(t.double() for t in rotary))[0]
    module.to(dtype)

    cos = rotary[0][0, :, 0, 0::2].contiguous()  # [S, head_dim // 2]
    sin = rotary[1][0, :, 0, 1::2].contiguous()
    weight = torch.cat([module.to_q.weight, module.to_k.weight, module.to_v.weight])
    bias = torch.cat([module.to_q.bias, module.to_k.bias, module.to_v.bias])
    qkv = torch.nn.functional.linear(hidden[0], weight, bias)
    k, v = torch.full((2, len(qkv), inner), torch.nan, dtype=dtype)
    q = qk_norm_rope(
        qkv, module.norm_q.weight, module.norm_k.weight, cos, sin, k, v, heads=heads, eps=EPS, backend=backend
    )
    ours = module.to_out[0](attention(q, k, v, heads=heads))
    assert_no_worse(ours, theirs, truth, 2.0, f"WanAttention {dtype}")


def test_threads_do_not_matter():
    backend = native("cpu")
    case = named.Case("threads", rows=37, heads=3, head_dim=128)
    args = inputs(case, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(case, args, backend)[:3])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_a_row_does_not_know_its_neighbours():
    """A cached key is the key that would be made again: the same whatever is computed beside it."""
    backend = native("cpu")
    case = named.Case("all", rows=9, heads=3, head_dim=24)
    args = inputs(case, torch.bfloat16)
    q, k, v, _ = run(case, args, backend)
    qkv, norm_q, norm_k, cos, sin = args
    some = named.Case("some", rows=4, heads=3, head_dim=24)
    part = run(some, [qkv[3:7], norm_q, norm_k, cos[3:7], sin[3:7]], backend)
    assert all(torch.equal(a, b[3:7]) for a, b in zip(part[:3], (q, k, v)))


QKV = torch.zeros(5, 3 * 12)
W = torch.ones(12)
ANGLES = torch.zeros(5, 3)
OUT = torch.zeros(5, 12)
LEND = Lend(torch.zeros(3, 4, 12), torch.zeros(3, 4, 12), torch.tensor([2]), 1)
GOOD = dict(
    qkv=QKV, norm_q=W, norm_k=W, cos=ANGLES, sin=ANGLES, k_out=OUT, v_out=OUT.clone(), heads=2, lends=[LEND]
)  # fmt: skip
BAD = {
    "batch dimension": (dict(qkv=QKV[None]), "[1, 5, 36]"),
    "odd head_dim": (dict(heads=4), "heads=4"),
    "no heads": (dict(heads=0), "heads=0"),
    "integers": (dict(qkv=QKV.int()), "torch.int32"),
    "qkv is a view": (dict(qkv=torch.zeros(5, 72)[:, :36]), "(72, 1)"),
    "length of norm_q": (dict(norm_q=W[:6]), "[6]"),
    "full-width cos": (dict(cos=torch.zeros(5, 6)), "[5, 6]"),
    "rows of sin": (dict(sin=torch.zeros(4, 3)), "[4, 3]"),
    "double cos": (dict(cos=ANGLES.double()), "torch.float64"),
    "dtype of k_out": (dict(k_out=OUT.bfloat16()), "torch.bfloat16"),
    "rows of v_out": (dict(v_out=torch.zeros(6, 12)), "[6, 12]"),
    "columns of v_out": (dict(v_out=torch.zeros(12, 5).T), "(1, 5)"),
    "overlapping rows": (dict(k_out=torch.zeros(16).as_strided((5, 12), (1, 1))), "(1, 1)"),
    "backend": (dict(backend="triton"), "'triton'"),
    "three lends": (dict(lends=[LEND] * 3), "3 lends: a block has 2 neighbours"),
    "no slots": (dict(lends=[LEND._replace(keys=torch.zeros(0, 4, 12))]), "[0, 4, 12]"),
    "one slot without its dimension": (dict(lends=[LEND._replace(keys=OUT)]), "keys of lends[0] are [5, 12]"),
    "other values than keys": (dict(lends=[LEND._replace(values=torch.zeros(3, 3, 12))]), "[3, 3, 12]"),
    "width of a store": (dict(lends=[LEND._replace(keys=torch.zeros(3, 4, 6))]), "[3, 4, 6]"),
    "dtype of a store": (dict(lends=[LEND._replace(values=LEND.values.half())]), "torch.float16"),
    "a store is a view": (dict(lends=[LEND._replace(keys=torch.zeros(3, 8, 12)[:, ::2])]), "(96, 24, 1)"),
    "slot is a number": (dict(lends=[LEND._replace(slot=torch.tensor(2))]), "slot of lends[0] is torch.int64 []"),
    "narrow slot": (dict(lends=[LEND._replace(slot=torch.tensor([2]).int())]), "torch.int32"),
    "slot behind the last": (dict(lends=[LEND, LEND._replace(slot=torch.tensor([3]))]), "slot of lends[1] is 3"),
    "slot before the first": (dict(lends=[LEND._replace(slot=torch.tensor([-1]))]), "is -1; its store has 3"),
    "lends more than there is": (dict(lends=[LEND._replace(first=2)]), "4 tokens from first=2 on, and qkv has 5 rows"),
    "lends from before": (dict(lends=[LEND._replace(first=-1)]), "first=-1"),
}


@pytest.mark.parametrize("change, says", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(change, says):
    qk_norm_rope(**GOOD, eps=EPS)
    with pytest.raises(ValueError) as error:
        qk_norm_rope(**{**GOOD, **change}, eps=EPS)
    assert says in str(error.value)
