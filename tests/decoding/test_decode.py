"""The streaming decoder against `vae.decode`, and output conversion against diffusers: by equality."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

from dualparal.decoding.frames import to_output, to_uint8
from dualparal.models.wan.vae import StreamingDecoder, latent_scale
from pairwise import pairwise
from small_vaes import CASES, MEAN, STD, make_latents, make_vae


def decode_whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What WanPipeline does at its end; [F, 3, H, W]."""
    latents = latents.to(vae.dtype)
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1).to(latents.dtype)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1).to(latents.dtype)
    with torch.no_grad():
        return vae.decode(latents / std + mean, return_dict=False)[0][0].transpose(0, 1)


def push_all(decoder: StreamingDecoder, latents: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    return torch.cat([decoder.push(piece) for piece in latents.split(cuts, dim=2)])


@pytest.fixture(params=CASES, name="vae")
def vae_fixture(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return make_vae(request.param)


@pytest.mark.parametrize(
    "case, dtype, cuts",
    pairwise(CASES, [torch.float32, torch.bfloat16], [[7], [1] * 7, [3, 4], [2, 2, 3]]),
    ids=str,
)
def test_any_chunking_equals_the_whole(case: str, dtype: torch.dtype, cuts: list[int]) -> None:
    vae, latents = make_vae(case, dtype), make_latents(7)
    expected = decode_whole(vae, latents)
    frames = push_all(StreamingDecoder(vae), latents, cuts)
    scale = vae.config.scale_factor_spatial
    assert frames.shape == (25, 3, 3 * scale, 5 * scale)
    assert frames.dtype == dtype
    assert torch.equal(frames, expected)
    assert expected.float().std() > 0.05  # a constant picture would prove nothing


@settings(max_examples=10)
@given(
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    size=st.tuples(st.integers(3, 5), st.integers(4, 5)),
)
def test_random_chunkings(cuts: list[int], size: tuple[int, int]) -> None:
    vae, latents = make_vae("wan2.1-shallow"), make_latents(sum(cuts), height=size[0], width=size[1])
    assert torch.equal(push_all(StreamingDecoder(vae), latents, cuts), decode_whole(vae, latents))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 3)], ids=str)
def test_a_few_points_are_decoded_the_same_in_any_chunking(size: tuple[int, int]) -> None:
    # Not bit for bit vae.decode: a 1x1x1 convolution of less than twelve points may add in another order.
    vae, latents = make_vae("wan2.1-shallow"), make_latents(5, height=size[0], width=size[1])
    frames = StreamingDecoder(vae).push(latents)
    assert torch.equal(push_all(StreamingDecoder(vae), latents, [2, 1, 2]), frames)
    assert torch.allclose(frames, decode_whole(vae, latents), rtol=0, atol=1e-5)


def test_memory_layout_of_the_latents_does_not_matter(vae: AutoencoderKLWan) -> None:
    latents = make_latents(4)
    expected = StreamingDecoder(vae).push(latents)
    strided = latents.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert torch.equal(StreamingDecoder(vae).push(strided), expected)
    assert torch.equal(StreamingDecoder(vae).push(latents.double()), expected)


def test_two_decoders_and_the_pipeline_share_a_vae(vae: AutoencoderKLWan) -> None:
    videos = [make_latents(5, seed=1), make_latents(5, seed=2, height=4)]
    expected = [decode_whole(vae, video) for video in videos]
    decoders = [StreamingDecoder(vae), StreamingDecoder(vae)]
    pieces: list[list[torch.Tensor]] = [[], []]
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        for video, decoder, frames in zip(videos, decoders, pieces):
            frames.append(decoder.push(video[:, :, start:stop]))
        decode_whole(vae, videos[0])  # clears the VAE's own cache
    for frames, whole in zip(pieces, expected):
        assert torch.equal(torch.cat(frames), whole)


def test_reset_starts_a_new_video_of_any_size(vae: AutoencoderKLWan) -> None:
    decoder = StreamingDecoder(vae)
    decoder.push(make_latents(3))
    decoder.reset()
    latents = make_latents(2, height=4, width=3)
    assert torch.equal(decoder.push(latents), decode_whole(vae, latents))


def test_memory_is_flat_and_frames_own_nothing_else(vae: AutoencoderKLWan) -> None:
    decoder, latents = StreamingDecoder(vae), make_latents(1)
    decoder.push(latents)
    sizes = []
    for _ in range(6):
        frames = decoder.push(latents)
        assert frames.shape[0] == 4
        assert frames.untyped_storage().nbytes() == frames.nbytes
        storages = {
            cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes()
            for cache in decoder._caches
            if isinstance(cache, torch.Tensor)
        }
        sizes.append((decoder.state_bytes, sum(storages.values())))
        assert not any(cache.requires_grad for cache in decoder._caches if isinstance(cache, torch.Tensor))
    assert len(set(sizes)) == 1
    # What is held is what is counted: no cache is a view that keeps a larger tensor alive.
    assert sizes[0][0] == sizes[0][1] > 0


def test_history_is_enough_to_resume_and_not_more() -> None:
    vae = make_vae("wan2.1").double()
    decoder = StreamingDecoder(vae)
    history = decoder.history
    assert history == 38
    latents = make_latents(history + 2, height=1, width=1)
    expected = decoder.push(latents)[-4:]

    resumed = StreamingDecoder(vae)
    resumed.push(latents[:, :, 1:-1])
    assert torch.equal(resumed.push(latents[:, :, -1:]), expected)

    changed = latents.clone()
    changed[:, :, 1] += 10.0
    decoder.reset()
    assert not torch.equal(decoder.push(changed)[-4:], expected)


def test_frames_may_be_edited_and_carry_no_graph(vae: AutoencoderKLWan) -> None:
    frames = StreamingDecoder(vae).push(make_latents(2).requires_grad_())
    assert not frames.requires_grad
    frames.mul_(0.5)
    with torch.inference_mode():
        decoder = StreamingDecoder(vae)
        decoder.push(make_latents(2))
    decoder.push(make_latents(1))  # a state made in inference mode serves outside of it


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 2, 3, 5), r"\[16, 2, 3, 5\].*one video"),
        ((2, 16, 2, 3, 5), "one decoder for each"),
        ((1, 12, 2, 3, 5), r"\[1, 16, frames"),
        ((1, 16, 0, 3, 5), "at least one frame"),
        ((1, 16, 1, 3, 4), r"\[3, 4\] after latents of \[3, 5\].*reset"),
    ],
)
def test_refuses_wrong_latents_and_goes_on(shape: tuple[int, ...], message: str) -> None:
    vae, latents = make_vae("wan2.1-shallow"), make_latents(3)
    decoder = StreamingDecoder(vae)
    first = decoder.push(latents[:, :, :2])
    with pytest.raises(ValueError, match=message):
        decoder.push(torch.zeros(shape))
    assert torch.equal(torch.cat([first, decoder.push(latents[:, :, 2:])]), decode_whole(vae, latents))


def test_refuses_tiling_offload_and_other_vaes() -> None:
    vae = make_vae("wan2.1-shallow")
    decoder = StreamingDecoder(vae)
    vae.enable_tiling()
    with pytest.raises(ValueError, match=r"use_tiling=True.*disable_tiling"):
        StreamingDecoder(vae)
    with pytest.raises(ValueError, match="use_tiling=True"):
        decoder.push(make_latents(1))
    vae.disable_tiling()
    vae.enable_slicing()  # splits batches only: nothing to refuse
    assert torch.equal(decoder.push(make_latents(2)), decode_whole(vae, make_latents(2)))
    vae._hf_hook = object()
    with pytest.raises(ValueError, match=r"offload.*remove_all_hooks"):
        decoder.push(make_latents(1))
    with pytest.raises(ValueError, match=r"SimpleNamespace.*AutoencoderKLWan"):
        StreamingDecoder(SimpleNamespace())


def test_a_failed_push_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = make_vae("wan2.1-shallow")
    decoder, latents = StreamingDecoder(vae), make_latents(4)
    decoder.push(latents[:, :, :1])
    with monkeypatch.context() as patch:
        patch.setattr(vae.decoder.up_blocks[2], "forward", _raise(torch.OutOfMemoryError("no memory")))
        with pytest.raises(torch.OutOfMemoryError):
            decoder.push(latents[:, :, 1:2])
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        decoder.push(latents[:, :, 1:2])
    decoder.reset()
    assert torch.equal(decoder.push(latents), decode_whole(vae, latents))


def _raise(error: Exception) -> Callable[..., None]:
    def forward(*_: object, **__: object) -> None:
        raise error

    return forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_those_of_diffusers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = (torch.rand(3, 3, 40, 56, generator=generator) * 2.2 - 1.1).clamp(-1, 1).to(dtype)
    # Every 8-bit level and the halves between two of them, where rounding is decided.
    frames[0].view(-1)[:1021] = (torch.arange(1021) / 510 - 1).to(dtype)
    video, processor = frames.transpose(0, 1)[None], VideoProcessor(vae_scale_factor=8)

    assert torch.equal(to_output(frames, "pt"), processor.postprocess_video(video, "pt")[0])
    ours, theirs = to_output(frames, "np"), processor.postprocess_video(video, "np")[0]
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == (3, 40, 56, 3)
    assert np.array_equal(ours, theirs)
    pictures = processor.postprocess_video(video, "pil")[0]
    assert [image.tobytes() for image in to_output(frames, "pil")] == [image.tobytes() for image in pictures]
    levels = to_uint8(frames)
    assert levels.dtype == np.uint8
    assert levels.flags.c_contiguous
    assert np.array_equal(levels, np.stack([np.asarray(image) for image in pictures]))


def test_outputs_leave_the_frames_alone_and_refuse_other_types() -> None:
    frames = torch.linspace(-1, 1, 24).view(1, 3, 2, 4)
    before = frames.clone()
    for output_type in ("pt", "np", "pil"):
        to_output(frames, output_type)  # type: ignore[call-overload]
    assert torch.equal(frames, before)
    with pytest.raises(ValueError, match="output_type='latent'"):
        to_output(frames, "latent")  # type: ignore[call-overload]


def test_denormalize_rounds_as_wan_pipeline_does() -> None:
    vae = make_vae("wan2.1-shallow", torch.bfloat16)
    mean = torch.tensor(MEAN).view(1, 16, 1, 1, 1).bfloat16()
    reciprocal = 1.0 / torch.tensor(STD).view(1, 16, 1, 1, 1).bfloat16()
    assert all(map(torch.equal, latent_scale(vae), (mean, reciprocal)))
