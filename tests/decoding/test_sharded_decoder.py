"""Decoders of parts of the picture's rows against one decoder of the whole: by equality on the CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn import functional as F

from dualparal.config.decoding import row_ranges
from dualparal.distributed.messages import PeerLost
from dualparal.distributed.rows import local_rows
from dualparal.models.registry import FAMILIES
from dualparal.models.wan.light_decoder import LightDecoder
from dualparal.models.wan.light_sizes import LightSizes
from dualparal.models.wan.rows import OverRows
from dualparal.models.wan.vae import StreamingDecoder
from light_files import SMALL, tensors_of
from pairwise import pairwise
from places import WORKERS
from row_parts import in_parts, on_threads
from small_vaes import CASES, make_latents, make_vae

PATCHED = LightSizes((8, 8, 4, 6), 16, 2)
SIZES = [(5, 4), (4, 5), (7, 3), (3, 8)]  # of latents
CUTS = [[3], [1, 2], [1, 1, 1]]
random_vae = cache(make_vae)  # nothing here writes to one


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Any:
    """Threads of every convolution: torch gives several another algorithm, and cuts activations for them."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("case", "dtype", "size", "count", "cuts"),
    pairwise(CASES, [torch.float32, torch.bfloat16], SIZES, [1, 2, 3], CUTS),
    ids=str,
)
def test_parts_are_the_whole(case: str, dtype: torch.dtype, size: tuple[int, int], count: int, cuts: list[int]) -> None:
    vae, latents = random_vae(case, dtype), make_latents(3, height=size[0], width=size[1])
    expected = StreamingDecoder(vae).push(latents)
    parts = in_parts(lambda rows: FAMILIES["wan"].decoder(vae, rows), latents, count, cuts)
    scale = vae.config.scale_factor_spatial
    assert [part.shape[2] for part in parts] == [len(rows) * scale for rows in row_ranges(size[0], count)]
    assert torch.equal(torch.cat(parts, dim=2), expected)
    assert expected.float().std() > 0.05


def test_parts_are_the_whole_by_any_number_of_threads(threads: int) -> None:
    vae, latents = random_vae("wan2.1-shallow"), make_latents(3, height=5, width=4)
    expected = StreamingDecoder(vae).push(latents)
    parts = in_parts(lambda rows: StreamingDecoder(vae, rows), latents, 2, [1, 2])
    assert torch.equal(torch.cat(parts, dim=2), expected)


@pytest.mark.parametrize(
    ("sizes", "dtype", "size", "count", "cuts"),
    pairwise([SMALL, PATCHED], [torch.float32, torch.bfloat16], SIZES, [1, 2, 3], CUTS),
    ids=str,
)
def test_parts_of_the_light_decoder_are_the_whole(
    sizes: LightSizes, dtype: torch.dtype, size: tuple[int, int], count: int, cuts: list[int]
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(sizes).items()}
    latents = make_latents(3, height=size[0], width=size[1])
    expected = LightDecoder(sizes, tensors).push(latents)
    parts = in_parts(lambda rows: LightDecoder(sizes, tensors, rows), latents, count, cuts)
    assert torch.equal(torch.cat(parts, dim=2), expected)
    assert expected.float().std() > 0.05


def whole_and_parts(call: Callable[..., Any], x: torch.Tensor, height: int, count: int) -> tuple[Any, Any]:
    """``call`` of the whole ``x`` and of its rows; ``x`` [..., rows, W], of a picture of ``height`` latent rows."""
    factor = x.shape[-2] // height

    def part(rows: Any) -> Any:
        over = OverRows(rows)
        over.begin(height)
        with over:
            return call(x[..., over.part.start * factor : over.part.stop * factor, :])

    return call(x), torch.cat(on_threads(part, count), dim=-2)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Sizes at which a call on the rows alone was measured to have other bits than the whole (torch 2.13, AVX-512).
OPS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...], int, int]] = {
    # oneDNN from 20,480 channels * frames * rows (and columns, if two-dimensional) on, a matrix product below
    "3x3x3, large": (
        lambda x: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), drawn(8, 800, 3, 3, 3) * 0.01, drawn(8)),
        (1, 800, 1, 10, 8),
        10,
        2,
    ),
    "3x3, large": (
        lambda x: F.conv2d(x, drawn(8, 64, 3, 3) * 0.1, drawn(8), padding=1),
        (1, 64, 22, 16),
        11,
        2,
    ),
    "3x3, of two frames": (lambda x: F.conv2d(x, drawn(5, 6, 3, 3), padding=1), (2, 6, 10, 8), 5, 3),
    "3x3, one column": (lambda x: F.conv2d(x, drawn(8, 16, 3, 3), drawn(8), padding=1), (1, 16, 3, 1), 3, 3),
    "3x3x3, 48 channels": (
        lambda x: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), drawn(48, 48, 3, 3, 3) * 0.1),
        (1, 48, 4, 8, 13),
        8,
        2,
    ),
    "1x1, few points": (lambda x: F.conv2d(x, drawn(144, 48, 1, 1), drawn(144)), (1, 48, 5, 1), 5, 3),
    "1x1, few points of 16 bits": (
        lambda x: F.conv2d(x.bfloat16(), drawn(144, 48, 1, 1).bfloat16(), drawn(144).bfloat16()),
        (1, 48, 5, 1),
        5,
        2,
    ),
    "silu, odd": (F.silu, (1, 4, 1, 11, 13), 11, 3),
    "silu, in parts for threads": (F.silu, (1, 16, 2, 64, 64), 64, 2),
    "silu, of another order in memory": (lambda x: F.silu(x.transpose(0, 1)[None])[0], (9, 7, 3, 1), 3, 3),
    "norm of one point": (lambda x: F.normalize(x, dim=1), (1, 16, 3, 1), 3, 3),
}


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_the_bits_of_the_whole(name: str, threads: int) -> None:
    call, shape, height, count = OPS[name]
    whole, parts = whole_and_parts(call, drawn(*shape, seed=1), height, count)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(("height", "width", "count"), [(3, 1, 3), (5, 13, 2), (30, 13, 3), (30, 30, 2)])
def test_attention_has_the_bits_of_the_whole(height: int, width: int, count: int, threads: int) -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        """As the decoder's block: [1, 3 * C, rows, W] to [1, C, rows, W]."""
        queries, keys, values = x.flatten(2).permute(0, 2, 1)[:, None].contiguous().chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(queries, keys, values)
        return y.squeeze(1).permute(0, 2, 1).unflatten(2, (-1, width))

    whole, parts = whole_and_parts(attend, drawn(1, 48, height, width), height, count)
    assert torch.equal(whole, parts)


def test_a_part_holds_its_part() -> None:
    vae, latents = random_vae("wan2.1-shallow"), make_latents(2, height=6)
    for make in (
        lambda rows: StreamingDecoder(vae, rows),
        lambda rows: LightDecoder(SMALL, tensors_of(), rows),
    ):

        def held(rows: Any, make: Callable[[Any], Any] = make) -> tuple[int, int]:
            decoder = make(rows)
            frames = decoder.push(latents)
            assert frames.untyped_storage().nbytes() == frames.nbytes
            caches = getattr(decoder, "_caches", None) or [*decoder._last.values()]
            storages = [cache.untyped_storage().nbytes() for cache in caches if isinstance(cache, torch.Tensor)]
            return decoder.state_bytes, sum(storages)

        whole = make(None)
        whole.push(latents)
        assert on_threads(held, 3) == [(whole.state_bytes / 3, whole.state_bytes / 3)] * 3


def test_reset_history_and_a_video_of_another_size() -> None:
    vae = random_vae("wan2.1-shallow")
    first, second = make_latents(2, height=5), make_latents(3, height=4, width=3, seed=1)

    def decode(rows: Any) -> torch.Tensor:
        decoder = StreamingDecoder(vae, rows)
        assert decoder.history == StreamingDecoder(vae).history
        decoder.push(first)
        decoder.reset()
        return decoder.push(second)

    assert torch.equal(torch.cat(on_threads(decode, 2), dim=2), StreamingDecoder(vae).push(second))


def test_the_vae_is_only_read() -> None:
    vae, latents = random_vae("wan2.2-residual"), make_latents(3)
    before = vae.decode(latents).sample

    def decode(rows: Any) -> bool:
        decoder = StreamingDecoder(vae, rows)
        decoder.push(latents[:, :, :1])
        same = StreamingDecoder(vae).push(latents[:, :, :2])  # another video, on this part's own thread
        decoder.push(latents[:, :, 1:])
        return torch.equal(same, expected)

    expected = StreamingDecoder(vae).push(latents[:, :, :2])
    assert on_threads(decode, 2) == [True, True]
    assert torch.equal(vae.decode(latents).sample, before)
    assert not any("forward" in vars(module) for module in vae.modules())


def test_a_part_that_fails_wakes_the_others_and_is_torn() -> None:
    vae, latents = random_vae("wan2.1-shallow"), make_latents(2, height=6)
    woken = []

    def decode(rows: Any) -> None:
        decoder = StreamingDecoder(vae, rows)
        decoder.push(latents)
        if rows.index == 1:
            raise MemoryError("no memory")
        with pytest.raises(PeerLost, match=r"rows of decoder \d for decoder \d: decoder 1 has stopped"):
            decoder.push(latents)
        with pytest.raises(RuntimeError, match=r"reset\(\)"):
            decoder.push(latents)
        woken.append(rows.index)

    with pytest.raises(MemoryError):
        on_threads(decode, 3)
    assert sorted(woken) == [0, 2]


def test_what_was_sent_may_be_changed() -> None:
    top, bottom = local_rows(2)
    sent, got = torch.ones(3), torch.zeros(3)
    top.swap({1: sent}, {})
    sent.zero_()
    bottom.swap({}, {0: got})
    assert got.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("height", "count", "sizes"),
    [(1, 1, [1]), (9, 1, [9]), (5, 2, [3, 2]), (7, 3, [3, 2, 2]), (8, 3, [3, 3, 2]), (3, 3, [1, 1, 1])],
)
def test_rows_are_dealt_out(height: int, count: int, sizes: list[int]) -> None:
    ranges = row_ranges(height, count)
    assert [len(rows) for rows in ranges] == sizes
    assert [row for rows in ranges for row in rows] == list(range(height))


@pytest.mark.parametrize("count", [0, 4])
def test_a_part_without_rows_is_refused(count: int) -> None:
    message = rf"{count} parts of a picture of 3 latent rows: .*; use 1 to 3 decoders"
    with pytest.raises(ValueError, match=message):
        row_ranges(3, count)
    if count:
        vae = random_vae("wan2.1-shallow")
        for decoder in (StreamingDecoder(vae, local_rows(4)[0]), LightDecoder(SMALL, tensors_of(), local_rows(4)[0])):
            with pytest.raises(ValueError, match=message):
                decoder.push(make_latents(1))


def test_ranks_over_gloo(tmp_path: Path) -> None:
    latents, tensors, ranks = make_latents(3, height=7), tensors_of(), 3
    queries, keys, values = drawn(3, 1, 1, 35, 16).unbind()
    given = {"sizes": astuple(SMALL), "tensors": tensors, "latents": latents}
    torch.save({**given, "queries": queries, "keys": keys, "values": values}, tmp_path / "given.pt")
    command = [sys.executable, str(WORKERS / "row_ranks.py"), str(tmp_path), str(ranks)]
    workers = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(ranks)]
    try:
        errors = [worker.communicate(timeout=60)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * ranks, errors
    for dtype in (torch.float32, torch.bfloat16):
        frames, attended = zip(*(torch.load(tmp_path / f"{part}-{dtype}.pt") for part in range(ranks)))
        decoder = LightDecoder(SMALL, {name: tensor.to(dtype) for name, tensor in tensors.items()})
        assert torch.equal(torch.cat(frames, dim=2), decoder.push(latents))
        whole = F.scaled_dot_product_attention(queries.to(dtype), keys.to(dtype), values.to(dtype))
        assert torch.equal(torch.cat(attended, dim=2), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["wan2.1", "wan2.2-residual"])
def test_on_a_card_parts_are_near_the_whole(case: str, dtype: torch.dtype) -> None:
    """cuDNN chooses by shape: no bits are promised, but no further from the whole than rounding is from float64.

    Each part has its own queries there, which the CPU does otherwise. Seams would show: they are bounded like the rest.
    """
    exact, latents = make_vae(case).double(), make_latents(4, height=7, width=6)
    truth = StreamingDecoder(exact).push(latents)
    vae: AutoencoderKLWan = make_vae(case, dtype).to("cuda")
    whole = StreamingDecoder(vae).push(latents).cpu()
    parts = in_parts(lambda rows: StreamingDecoder(vae, rows), latents, 3, [1, 3])
    rounding = (whole.double() - truth).abs().max()
    assert (torch.cat(parts, dim=2).cpu().double() - truth).abs().max() <= 2 * rounding
    assert rounding < truth.std()
