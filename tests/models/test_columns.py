"""Small convolutions of the VAE by columns: the bits of torch's own, where torch would be slow, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch.profiler import ProfilerActivity, profile

from dualparal.models.wan import columns
from dualparal.models.wan.columns import by_columns, is_slow
from dualparal.models.wan.cpu_ops import CpuOps
from dualparal.models.wan.vae import StreamingDecoder

PLAIN = ((1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
SHAPES = [  # [C, F, H, W], outputs, kernel
    ((24, 6, 66, 66), 24, (3, 3, 3)),  # the widest of the model in the box
    ((24, 6, 66, 66), 3, (3, 3, 3)),
    ((48, 3, 10, 10), 48, (3, 3, 3)),  # all of it in one piece
    ((24, 4, 35, 71), 5, (3, 3, 3)),  # odd sizes, parts that are not equal
    ((24, 4, 130, 34), 48, (3, 1, 1)),  # of a temporal upsampler
    ((12, 4, 64, 64), 24, (1, 1, 1)),  # of a shortcut
    ((48, 4, 32, 10), 3, (3, 3, 3)),  # over two threads a product of so few rows adds in another order
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape, outputs, kernel", SHAPES)
@torch.no_grad()
def test_the_bits_are_those_of_torch(
    shape: tuple[int, ...], outputs: int, kernel: tuple[int, int, int], threads: int
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(1, *shape, generator=generator)
    weight = torch.randn(outputs, shape[0], *kernel, generator=generator) / 8
    bias = torch.randn(outputs, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert is_slow(x, weight, bias, *PLAIN) == (outputs >= 12 or threads == 1)
        for given in (x, x.transpose(3, 4)):  # as it is, and as a view of another
            wanted = F.conv3d(given, weight, bias)
            with CpuOps():
                assert torch.equal(F.conv3d(given, weight, bias, *PLAIN), wanted)
            assert outputs < 12 or torch.equal(by_columns(given, weight, bias), wanted)
    finally:
        torch.set_num_threads(before)


def test_pieces_hold_everything_once_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(1, 2, 5, 9, 6), torch.randn(3, 2, 3, 3, 3), torch.randn(3)
    with torch.no_grad():
        wanted = F.conv3d(x.double(), weight.double(), bias.double())
        for piece in (1, 4 * 54 * 4, 4 * 54 * 4 * 3, 1 << 20):  # a row even where that is too much; one; three; all
            monkeypatch.setattr(columns, "PIECE", piece)
            assert torch.allclose(by_columns(x, weight, bias).double(), wanted, atol=1e-4)


def test_only_what_torch_is_slow_at() -> None:
    x, weight, bias = torch.randn(1, 8, 4, 12, 12), torch.randn(8, 8, 3, 3, 3), torch.randn(8)
    with torch.no_grad():
        assert is_slow(x, weight, bias, *PLAIN)
        assert not is_slow(x, weight, None, *PLAIN)
        assert not is_slow(x, weight, bias, (1, 1, 1), (1, 1, 1), (1, 1, 1), 1)  # padded
        assert not is_slow(x, weight, bias, (2, 1, 1), (0, 0, 0), (1, 1, 1), 1)
        assert not is_slow(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), *PLAIN)
        assert not is_slow(x.double(), weight.double(), bias.double(), *PLAIN)
        assert not is_slow(x.to("meta"), weight.to("meta"), bias.to("meta"), *PLAIN)
        assert not is_slow(x.repeat(2, 1, 1, 1, 1), weight, bias, *PLAIN)  # a batch: mkldnn's
        large = torch.empty(1, 96, 6, 66, 66)
        assert not is_slow(large, torch.empty(8, 96, 3, 3, 3), bias, *PLAIN)  # as wide as Wan: mkldnn's
        with torch.autocast("cpu", torch.bfloat16):
            assert not is_slow(x, weight, bias, *PLAIN)
    assert not is_slow(x, weight, bias, *PLAIN)  # with a gradient
    with CpuOps():
        assert F.conv3d(x, weight.requires_grad_(), bias).requires_grad


def test_a_decoder_is_quick_and_leaves_nothing_behind() -> None:
    vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1, dim_mult=[1, 1, 1, 1]).eval()
    latents = torch.randn(1, 16, 2, 4, 4)

    def ops() -> set[str]:
        with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
            made = StreamingDecoder(vae).push(latents)
        assert torch.equal(made, vae.decode(_denormalized(vae, latents)).sample[0].transpose(0, 1))
        return {event.key for event in seen.key_averages()}

    found = ops()
    assert "aten::addmm" in found and not any("slow_conv3d" in op for op in found)
    assert not torch.overrides._len_torch_function_stack()  # type: ignore[attr-defined]


def _denormalized(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std))
    return latents / (1.0 / std) + mean
