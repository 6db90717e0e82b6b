"""Flags of cuDNN while a block is decoded, and afterwards: a stand-in for the VAE looks at them in a convolution."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

from dualparal.models.wan.convolutions import STEADY
from dualparal.models.wan.vae import StreamingDecoder

CUDNN: Any = torch.backends.cudnn
BY_OP = hasattr(CUDNN, "conv")


def flags() -> tuple[object, bool]:
    return CUDNN.conv.fp32_precision if BY_OP else CUDNN.allow_tf32, CUDNN.benchmark


STEADY_FLAGS = ("tf32" if BY_OP else True, False)


def set_flags(by_op: bool, tf32: bool, benchmark: bool) -> None:
    if by_op:
        CUDNN.conv.fp32_precision = "tf32" if tf32 else "ieee"
    else:
        CUDNN.allow_tf32 = tf32
    CUDNN.benchmark = benchmark


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    set_flags(False, True, False)  # torch's defaults
    assert flags() == STEADY_FLAGS


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=4, num_res_blocks=1, dim_mult=[1, 1, 1, 1]).eval()


@pytest.mark.parametrize("by_op", [False, True])
@pytest.mark.parametrize("tf32, benchmark", [(True, False), (False, False), (True, True), (False, True)])
def test_decoding_has_flags_of_its_own(vae: AutoencoderKLWan, by_op: bool, tf32: bool, benchmark: bool) -> None:
    if by_op and not BY_OP:
        pytest.skip("this torch has one flag for all ops")
    seen = set()
    hook = vae.decoder.conv_in.register_forward_pre_hook(lambda *_: seen.add(flags()))
    set_flags(by_op, tf32, benchmark)
    before = flags()
    StreamingDecoder(vae).push(torch.zeros(1, 16, 2, 4, 4))
    hook.remove()
    assert seen == {STEADY_FLAGS}
    assert flags() == before


def test_flags_come_back_when_decoding_fails(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    set_flags(False, False, True)
    before = flags()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vae.decoder, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        StreamingDecoder(vae).push(torch.zeros(1, 16, 1, 4, 4))
    assert flags() == before


def test_two_threads_that_overlap_leave_what_was_there() -> None:
    """The first one in is the first one out: alone it would restore the flags under the other, which then keeps its."""
    set_flags(False, False, True)
    before, seen = flags(), []
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with STEADY:
            entered.set()
            left.wait(10)
            seen.append(flags())

    thread = threading.Thread(target=second)
    with STEADY:
        thread.start()
        assert entered.wait(10)
    left.set()
    thread.join()
    assert seen == [STEADY_FLAGS]
    assert flags() == before
