"""The light decoder: any cut against the whole video at once, its file, and an engine that decodes with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.checkpoint.snapshot import SnapshotError
from dualparal.cli import resumed
from dualparal.cli.flags import ModelFlags, OutputFlags, PlaceFlags
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.engine.capacity import loaded_bytes
from dualparal.engine.engine import Engine
from dualparal.engine.identity import run_info
from dualparal.models.json_files import ModelError
from dualparal.models.registry import model_sizes
from dualparal.models.wan.light_decoder import LightDecoder, LightFile
from dualparal.models.wan.light_sizes import LightSizes
from dualparal.models.wan.sizes import MODELS
from dualparal.planning.cost import Costing
from dualparal.planning.devices import DEVICES, LINKS
from dualparal.planning.memory import decode_bytes
from dualparal.planning.workload import Workload
from light_files import SMALL, tensors_of, write_light

PATCHED = LightSizes((8, 8, 4, 6), 16, 2)
TAEW = LightSizes((256, 128, 64, 64), 16, 1)
CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 2, "output_type": "pt"}


def make_latents(frames: int, height: int = 4, width: int = 5) -> torch.Tensor:
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(1))


def whole(tensors: dict[str, torch.Tensor], latents: torch.Tensor, patch: int = 1) -> torch.Tensor:
    """The architecture over all frames at once, layer after layer, by the numbers of its layers: [F, 3, H, W].

    Only a convolution takes as many frames together as a latent makes: with another number it may add in another order.
    """

    def layer(number: object, x: torch.Tensor) -> torch.Tensor:
        weight = tensors[f"decoder.{number}.weight"]
        bias, latents_in = tensors.get(f"decoder.{number}.bias"), latents.shape[2]
        return torch.cat(
            [F.conv2d(part, weight, bias, padding=(weight.shape[2] - 1) // 2) for part in x.chunk(latents_in)]
        )

    video = F.relu(layer(1, 3 * torch.tanh(latents[0].permute(1, 0, 2, 3).contiguous() / 3)))
    for begin, times in ((3, 1), (9, 2), (15, 2)):
        for number in range(begin, begin + 3):
            late = torch.zeros_like(video)
            late[1:] = video[:-1]
            change = F.relu(layer(f"{number}.conv.0", torch.cat((video, late), 1)))
            change = layer(f"{number}.conv.4", F.relu(layer(f"{number}.conv.2", change)))
            video = F.relu(change + video)
        video = video.repeat_interleave(2, 2).repeat_interleave(2, 3)
        video = torch.cat(
            [half for frame in layer(f"{begin + 4}.conv", video).split(1) for half in frame.chunk(times, 1)]
        )
        video = layer(begin + 5, video.reshape(-1, tensors[f"decoder.{begin + 5}.weight"].shape[1], *video.shape[-2:]))
    colours = layer(22, F.relu(video))
    frames, _, height, width = colours.shape
    colours = colours.view(frames, 3, patch, patch, height, width).permute(0, 1, 4, 2, 5, 3)
    colours = colours.reshape(frames, 3, height * patch, width * patch)
    return 2 * colours[3:].clip(0, 1) - 1


def pushed(sizes: LightSizes, tensors: dict[str, torch.Tensor], latents: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    decoder = LightDecoder(sizes, tensors)
    return torch.cat([decoder.push(part) for part in latents.split(cuts, dim=2)])


@settings(max_examples=15)
@given(
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    size=st.tuples(st.integers(3, 5), st.integers(4, 6)),
    sizes=st.sampled_from([SMALL, PATCHED]),
)
def test_any_cut_equals_the_whole(cuts: list[int], size: tuple[int, int], sizes: LightSizes) -> None:
    tensors, latents = tensors_of(sizes), make_latents(sum(cuts), *size)
    frames = pushed(sizes, tensors, latents, cuts)
    assert len(frames) == 4 * sum(cuts) - 3  # one for the first latent, four for each other
    assert frames.shape[2:] == (size[0] * sizes.spatial_factor, size[1] * sizes.spatial_factor)
    assert torch.equal(frames, whole(tensors, latents, sizes.patch))
    assert frames.std() > 0.1


def test_16_bits_are_cut_the_same() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of().items()}
    latents = make_latents(5)
    assert torch.equal(pushed(SMALL, tensors, latents, [1, 3, 1]), pushed(SMALL, tensors, latents, [5]))


def test_history_is_as_far_as_it_sees() -> None:
    tensors, latents = tensors_of(), make_latents(14)
    expected = pushed(SMALL, tensors, latents, [14])[-4:]
    history = LightDecoder(SMALL, tensors).history
    assert history == 8
    near = pushed(SMALL, tensors, latents[:, :, 13 - history :], [history + 1])[-4:]
    nearer = pushed(SMALL, tensors, latents[:, :, 14 - history :], [history])[-4:]
    assert torch.equal(near, expected) and not torch.equal(nearer, expected)


def test_reset_begins_another_video_and_a_torn_push_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, latents = LightDecoder(SMALL, tensors_of()), make_latents(3)
    first = decoder.push(latents)
    with pytest.raises(ValueError, match="a video keeps its size"):
        decoder.push(make_latents(1, height=6))
    with pytest.raises(ValueError, match=r"\[1, 16, frames, height, width\]"):
        decoder.push(latents[:, :8])
    decoder.reset()
    assert torch.equal(decoder.push(latents), first)
    with monkeypatch.context() as patch:
        patch.setattr(F, "pixel_shuffle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.push(latents)
    with pytest.raises(RuntimeError, match="call reset"):
        decoder.push(latents)


@pytest.mark.parametrize("sizes", [SMALL, PATCHED, TAEW], ids=str)
def test_its_sizes_are_what_it_has_and_does(sizes: LightSizes) -> None:
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in sizes.shapes.items()}
        decoder, latents = LightDecoder(sizes, tensors), torch.empty(1, 16, 1, 6, 4)
        decoder.push(latents)
        with FlopCounterMode(display=False) as counter:
            assert len(decoder.push(latents)) == sizes.temporal_factor
    assert sizes.flops(24) == counter.get_total_flops()
    assert sizes.cache_bytes(24, 4) == decoder.state_bytes
    assert sizes.parameters == sum(tensor.numel() for tensor in tensors.values())


# The file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_read_without_its_encoder(tmp_path: Path) -> None:
    file = LightFile(write_light(tmp_path / "a.safetensors"), 16, 8)
    assert file.sizes == SMALL
    loaded = file.load(torch.device("cpu"), torch.float16)
    assert set(loaded) == set(SMALL.shapes) and {tensor.dtype for tensor in loaded.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder.23.weight": torch.zeros(2)}, r"decoder\.23\.weight' is unknown; it must be a tiny autoencoder"),
        ({"head.weight": torch.zeros(2)}, r"head\.weight' is unknown"),
        ({"decoder.10.conv.2.bias": None}, r"decoder\.10\.conv\.2\.bias is missing"),
        ({"decoder.13.conv.weight": torch.zeros(6, 6, 1, 1)}, r"\[6, 6, 1, 1\] instead of \[12, 6, 1, 1\]"),
        ({"decoder.8.weight": None}, r"decoder\.8\.weight is missing"),
        ({"decoder.1.weight": torch.zeros(8, 48, 3, 3)}, r"\[8, 48, 3, 3\] instead of \[8, 16, 3, 3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        LightFile(write_light(tmp_path / "bad.safetensors", **changes), 16, 8)
    assert "\n" not in str(error.value)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    torch.save({"decoder.1.weight": torch.zeros(1)}, tmp_path / "taew2_1.pth")
    with pytest.raises(ModelError, match=r"taew2_1\.pth: not a \.safetensors file \(pickles"):
        LightFile(tmp_path / "taew2_1.pth", 16, 8)
    (tmp_path / "taew2_1.pth").rename(tmp_path / "named.safetensors")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        LightFile(tmp_path / "named.safetensors", 16, 8)
    with pytest.raises(ModelError, match=r"nowhere\.safetensors: not a \.safetensors file"):
        LightFile(tmp_path / "nowhere.safetensors", 16, 8)


# In the engine ----------------------------------------------------------------------------------------------------


def test_an_engine_decodes_with_it_and_loads_no_vae(
    engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_light(tmp_path / "a.safetensors")
    latents = engine()("a cat", **{**CALL, "output_type": "latent"}).frames
    for stages in (1, 2):
        found = engine(decoder=path, stages=stages, frames_per_block=8)
        monkeypatch.setattr(found.source.__class__, "load_vae", lambda *_: pytest.fail("the VAE was loaded"))
        frames = torch.cat([chunk.frames for chunk in found.stream("a cat", **CALL)])
        monkeypatch.undo()
        assert torch.equal(frames, whole(tensors_of(), latents) * 0.5 + 0.5)
    work = Workload(model_sizes(str(found.source.path)), VideoConfig(32, 32, 13, 2, output_type="pt"), found.config)  # type: ignore[attr-defined]
    before = loaded_bytes(work, [2, 2], engine(decoder=path, stages=2).parts)
    assert loaded_bytes(work, [2, 2], found.parts) > before == 0
    layers = loaded_bytes(replace(work, video=VideoConfig(32, 32, 13, 2, output_type="latent")), [2, 2], found.parts)
    assert loaded_bytes(work, [2, 2], found.parts) - layers == 4 * SMALL.parameters


def test_ranks_compare_the_file_and_not_its_path(engine: Callable[..., Engine], tmp_path: Path) -> None:
    def compared(**options: Any) -> Any:
        found = engine(**options)
        found.stream("a cat", **CALL)
        assert found._run is not None
        spec = found._run.spec
        return run_info(found.setup, spec.scheduler, spec.requests, spec.schedule, None, None)

    same = [write_light(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    other = write_light(tmp_path / "c.safetensors", seed=1)
    assert compared(decoder=same[0]) == compared(decoder=same[1])
    assert compared(decoder=same[0])["decoder"] != compared(decoder=other)["decoder"] is not compared()["decoder"]


def test_a_snapshot_goes_on_with_its_own_decoder_only(
    engine: Callable[..., Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"frames_per_block": 2, "context_frames": 1, "refresh_every": 1}
    path, checkpoint = write_light(tmp_path / "a.safetensors"), Checkpoint(tmp_path / "kept", 1)
    unbroken = torch.cat([c.frames for c in engine(**options, decoder=path).stream("a cat", **CALL)])
    stream = engine(**options, decoder=path).stream("a cat", checkpoint=checkpoint, **CALL)
    next(stream)
    stream.close()
    for wrong in ({}, {"decoder": write_light(tmp_path / "b.safetensors", seed=1)}):
        with pytest.raises(SnapshotError, match="of another run: decoder: "):
            engine(**options, **wrong).resume(checkpoint)
    moved = path.rename(tmp_path / "moved.safetensors")
    with caplog.at_level(logging.WARNING, "dualparal"):
        chunks = list(engine(**options, decoder=moved).resume(checkpoint))
    assert not caplog.records
    frames = torch.cat([chunk.frames for chunk in chunks])
    assert torch.equal(frames, unbroken[-len(frames) :])


def test_a_family_without_one_says_so(engine: Callable[..., Engine], tmp_path: Path) -> None:
    found = engine()
    family = replace(found.source.family, light_file_class="")
    with pytest.raises(ModelError, match="Wan models have no light decoder; leave it out"):
        family.light_file(tmp_path / "a.safetensors", found.source.spec)
    with pytest.raises(ModelError, match=r"not a \.safetensors file"):
        engine(decoder=tmp_path / "a.pth")


def test_the_planner_counts_it(tmp_path: Path) -> None:
    path = write_light(tmp_path / "a.safetensors", TAEW)
    light, full = (
        Workload(MODELS["wan2.1-t2v-1.3b"], VideoConfig(), EngineConfig(decoder=decoder))
        for decoder in (str(path), None)
    )
    assert light.decoder == TAEW and full.decoder is full.model.vae
    assert decode_bytes(light) < decode_bytes(full) / 3
    seconds = [
        Costing(work, work.schedule(1), [30], [DEVICES["h100"]], [LINKS["nvlink4"]]).decode(0) for work in (light, full)
    ]
    assert seconds[0] < seconds[1] / 20


def test_a_resumed_command_may_say_where_it_lies_now_and_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        resumed, "replace",
        lambda old, **new: replace(old, **new) if is_dataclass(old) else SimpleNamespace(**{**vars(old), **new}),
    )  # fmt: skip
    engine = EngineConfig(decoder="old.safetensors", vae_dtype="float16")
    job = SimpleNamespace(engine=engine, stages=1, device="cpu", threads=1, checkpoint_every=None, model="m")
    for said, wanted in ((None, "old.safetensors"), (Path("new.safetensors"), "new.safetensors")):
        flags = ModelFlags(decoder=said), PlaceFlags(), OutputFlags()
        found = resumed._elsewhere(job, set(), Path("kept"), *flags)  # type: ignore[arg-type]
        assert found.engine.decoder == wanted and found.engine.vae_dtype == "float16"
    flags = ModelFlags(vae_dtype="float32"), PlaceFlags(), OutputFlags()
    found = resumed._elsewhere(job, {"vae_dtype"}, Path("kept"), *flags)  # type: ignore[arg-type]
    assert found.engine.vae_dtype == "float32"
    assert {"decoder", "vae_dtype"} <= resumed._MAY_CHANGE
