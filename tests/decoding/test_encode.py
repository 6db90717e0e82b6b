"""The streaming encoder equals diffusers' on the whole, and images become the numbers that diffusers makes of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
from diffusers.video_processor import VideoProcessor
from PIL import Image

from dualparal.io.images import fingerprint, pixels, read_image
from dualparal.models.wan.condition import image_condition
from dualparal.models.wan.encoder import StreamingEncoder
from dualparal.models.wan.vae import latent_scale
from small_vaes import CASES, make_vae


@pytest.mark.parametrize("case", CASES)
def test_frames_in_parts_have_the_latents_of_the_whole_and_still_ones_settle(case: str) -> None:
    vae = make_vae(case)
    side, encoder = int(vae.config.scale_factor_spatial), StreamingEncoder(vae)
    # 20 latent points: of 6, and AVX2 alone, MKL's products of one frame and of four differ in last bits.
    frames = torch.rand(13, 3, 4 * side, 5 * side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, reciprocal = latent_scale(vae)
    whole = (vae.encode(frames.transpose(0, 1)[None]).latent_dist.mode() - mean) * reciprocal
    assert torch.equal(torch.cat([encoder.push(part) for part in frames.split([5, 4, 4])], dim=2), whole)
    with pytest.raises(ValueError, match="a multiple of 4"):
        encoder.push(frames[:1])
    grey = [encoder.push(torch.zeros_like(frames[:4])) for _ in range(encoder.history + 3)]
    assert torch.equal(grey[-2], grey[-1]) and torch.equal(grey[-3], grey[-1])
    assert not torch.equal(grey[-4], grey[-1])  # the first of them still sees what was before


def test_an_image_becomes_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (37, 51, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "image.png")
    wanted = VideoProcessor(vae_scale_factor=8).preprocess(Image.fromarray(array), height=32, width=48)[0]
    found = [read_image(each, "image") for each in (array, array / 255, tmp_path / "image.png", Image.fromarray(array))]
    assert all(np.array_equal(pixels(image, 32, 48), wanted.numpy()) for image in found)
    assert len({fingerprint(image) for image in found}) == 1 != fingerprint(read_image(array[::-1], "image"))


def test_what_is_no_image_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    grey = np.zeros((4, 4, 3), dtype=np.float32)
    cases = [
        (tmp_path / "none.png", "there is no such file"),
        (tmp_path / "text.png", "is not an image that can be read"),
        (grey[0], "use a path, a PIL image, or an array"),
        (grey - 1, "holds numbers from 0 to 1"),
        (grey * np.nan, "holds numbers from 0 to 1"),
        (object(), "is a object: use a path"),
    ]
    for given, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            read_image(given, "image")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [4, 24])  # latent frames: before and after still ones settle
@pytest.mark.parametrize("count", [1, 2])
def test_what_a_model_is_told_is_what_diffusers_tells_of_the_whole_video(length: int, count: int) -> None:
    vae = make_vae("wan2.1-shallow")
    pipe = WanImageToVideoPipeline(None, None, vae, UniPCMultistepScheduler())
    images = (torch.rand(2, 1, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1)[:count]
    latents, frames = torch.zeros(1, 16, length, 4, 5), 4 * length - 3
    last = images[1] if count == 2 else None
    given = (1, 16, 32, 40, frames, torch.float32, torch.device("cpu"), None, latents, last)
    _, wanted = pipe.prepare_latents(images[0], *given)
    spec, encoder = SimpleNamespace(temporal_factor=4, keeps_first_frame=False), StreamingEncoder(vae)
    found = image_condition(spec, encoder, [image[0] for image in images], length, length + 2)
    assert torch.equal(found.of(range(length)), wanted)
    assert found.first.shape[2] <= encoder.history + 1
    whole = found.of(range(length + 2))  # with a surplus of the last block, which is grey
    assert not whole[:, :4, length:].any() and whole[:, 4:, length:].any()
    for start in range(length + 2):
        for stop in (start + 1, start + 3, length + 2):
            assert torch.equal(found.of(range(start, min(stop, length + 2))), whole[:, :, start:stop])
    if count == 1:
        encoder.reset()
        endless = image_condition(spec, encoder, [images[0, 0]], None, None)
        assert torch.equal(endless.of(range(length)), wanted)
        assert torch.equal(endless.of(range(900, 901)), endless.of(range(encoder.history + 1, encoder.history + 2)))
