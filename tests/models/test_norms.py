"""Norms over channels of the VAE on the CPU: the bits of torch's own, where torch would be slow, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from dualparal.models.wan import norms
from dualparal.models.wan.cpu_ops import CpuOps
from dualparal.models.wan.norms import FEW, is_exact, is_slow, lengths
from dualparal.models.wan.vae import StreamingDecoder

exact = pytest.mark.skipif(not is_exact(), reason="this processor's torch adds otherwise, and does it itself")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape, order",
    [
        ((1, 12, 4, 64, 64), (0, 1, 2, 3, 4)),  # the widest of the model in the box
        ((4, 1, 6, 64, 64), (1, 2, 0, 3, 4)),  # as a spatial upsampler leaves them: frames outside of channels
        ((1, 384, 1, 40, 33), (0, 1, 2, 3, 4)),  # as wide as Wan
        ((3, 24, 35, 31), (0, 1, 2, 3)),  # pictures
        ((2, 2, 1, 48, 48), (0, 1, 2, 3, 4)),
    ],
)
@torch.no_grad()
def test_the_bits_and_the_layout_are_those_of_torch(
    shape: tuple[int, ...], order: tuple[int, ...], threads: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).permute(order)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert is_slow(x, 2.0, 1, None) == is_exact()
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                wanted = F.normalize(x, dim=1)
                with CpuOps():
                    found = F.normalize(x, dim=1)
            assert torch.equal(found, wanted) and found.dtype == wanted.dtype and found.stride() == wanted.stride()
    finally:
        torch.set_num_threads(before)


@exact
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(-45, 38), st.integers(0, 2**31))
def test_lengths_are_those_of_torch_at_any_scale(channels: int, exponent: int, seed: int) -> None:
    """From squares that are nothing or too small for a whole number of bits to squares that are infinite."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randint(-2, 3, (1, channels, FEW), generator=generator)
    x = torch.randn(1, channels, FEW, generator=generator) * 10.0 ** (spread + exponent)
    assert torch.equal(lengths(x), torch.linalg.vector_norm(x, 2, 1, keepdim=True))


@torch.no_grad()
def test_what_is_not_a_number_stays_so() -> None:
    x = torch.randn(1, 3, FEW)
    x[0, :, :4] = torch.tensor([[torch.nan, torch.inf, 0, -torch.inf], [1, 1, 0, torch.nan], [1, torch.inf, 0, 1]])
    wanted = F.normalize(x)
    with CpuOps():
        assert torch.equal(F.normalize(x).nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert not wanted[..., 2].any() and wanted[..., 0].isnan().all()


@exact
def test_norms_only_where_torch_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 4, FEW)
    assert is_slow(x, 2.0, 1, None)
    assert not is_slow(x[..., 1:], 2.0, 1, None)  # few points
    assert not is_slow(x.transpose(1, 2).contiguous().transpose(1, 2), 2.0, 1, None)  # adds in another order
    assert not is_slow(x, 1.0, 1, None) and not is_slow(x, 2.0, 2, None) and not is_slow(x, 2.0, 1, x.clone())
    assert not is_slow(x.double(), 2.0, 1, None) and not is_slow(x.to("meta"), 2.0, 1, None)
    assert not is_slow(x[0], 2.0, 1, None) and not is_slow(x[:, :1], 2.0, 1, None)
    with CpuOps():
        assert F.normalize(x.clone().requires_grad_()).requires_grad
    monkeypatch.setattr(norms, "is_exact", lambda: False)  # another processor's torch
    assert not is_slow(x, 2.0, 1, None)


def test_a_processor_whose_torch_adds_otherwise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "lengths", lambda x: (x * x).sum(1, keepdim=True).sqrt())
    norms.is_exact.cache_clear()
    try:
        assert not norms.is_exact()
    finally:
        norms.is_exact.cache_clear()


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_takes_quick_norms_where_there_are_points(dtype: torch.dtype) -> None:
    vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1, dim_mult=[1, 1, 1, 1]).eval().to(dtype)
    latents = torch.randn(1, 16, 2, 4, 4)

    def seen(decoder: StreamingDecoder) -> tuple[torch.Tensor, int]:
        with profile(activities=[ProfilerActivity.CPU]) as ops:
            frames = decoder.push(latents)
        return frames, sum(event.count for event in ops.key_averages() if event.key == "aten::linalg_vector_norm")

    frames, slow = seen(StreamingDecoder(vae))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "is_slow", lambda *_: False)
        wanted, all_slow = seen(StreamingDecoder(vae))
    assert torch.equal(frames, wanted) and slow < all_slow
