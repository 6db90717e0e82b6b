"""Embeddings of prompts: what is loaded for them, where, for how long, and what is kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.engine import texts
from dualparal.engine.capacity import TooLarge, check_requests
from dualparal.engine.engine import Engine
from dualparal.engine.inputs import VideoInputs
from dualparal.engine.request import check_request
from dualparal.engine.setup import Setup
from dualparal.engine.texts import Text, Texts
from dualparal.models.files import ModelFiles

CALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
CAT = Text("a cat", "", True, 16)
CPU = torch.device("cpu")


class Loads(list[str]):
    """Types of the devices for which the encoder was loaded (which is then on the CPU), and those that live on."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Any]] = []

    def add(self, device: torch.device, encoder: Any) -> None:
        self.append(device.type)
        self._made.append(weakref.ref(encoder))

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(made() is not None for made in self._made)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    load, found = ModelFiles.load_text_encoder, Loads()

    def count(self: ModelFiles, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        tokenizer, encoder = load(self, CPU, dtype)
        found.add(device, encoder)
        return tokenizer, encoder

    monkeypatch.setattr(ModelFiles, "load_text_encoder", count)
    return found


def on_card(engine: Engine, **options: Any) -> Setup:
    """The setup that an engine would have on a card, for what asks no card for anything."""
    setup = engine.setup
    mesh = replace(setup.mesh, device=torch.device("cuda", 0))
    return replace(setup, mesh=mesh, config=replace(setup.config, device="cuda:0", **options))


def test_repeated_prompts_load_nothing(wan21: Path, loads: Loads) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", dtype="float32")
    first = engine("a cat", num_frames=9, **CALL).frames
    assert loads == ["cpu"]
    again = engine("a cat", num_frames=9, **CALL).frames
    assert torch.equal(first, again) and loads == ["cpu"] and loads.alive == 0
    for number, changed in enumerate(
        [{"prompt": "a dog"}, {"negative_prompt": "red"}, {"guidance_scale": 1.0}, {"max_sequence_length": 32}], 2
    ):
        engine(**{"prompt": "a cat", "num_frames": 9, **CALL, **changed})
        assert len(loads) == number, changed


def test_what_is_kept_is_bounded_and_the_oldest_goes(
    wan21: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Texts(Engine.from_pretrained(wan21, device="cpu").setup)
    prompts = [CAT._replace(prompt=word) for word in ("a cat", "a dog", "a fox")]
    one = found.encode(prompts[:1])[0].nbytes
    monkeypatch.setattr(texts, "_MOST_BYTES", 2 * one)
    found.encode(prompts[1:2])
    found.encode(prompts[:1])  # used again: the other one is older now
    found.encode(prompts[2:])
    assert [found.new([prompt]) for prompt in prompts] == [False, True, False]
    monkeypatch.setattr(texts, "_MOST_BYTES", 0)
    assert len(found.encode(prompts)) == 3 and found.new(prompts[2:])


def test_set_prompt_leaves_no_encoder_behind(wan21: Path, loads: Loads) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", dtype="float32", frames_per_block=2, context_frames=1)
    stream = engine.stream("a cat", num_frames=49, **CALL)
    next(stream)
    engine.set_prompt("a dog")
    assert (loads, loads.alive) == (["cpu", "cpu"], 0)
    engine.set_prompt("a cat")
    engine.set_prompt("a dog")
    assert len(loads) == 2
    stream.close()


def test_beside_a_stage_on_a_card_the_cpu_encodes(wan21: Path, loads: Loads) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", dtype="bfloat16")
    expected = engine.parts.texts.encode([CAT])[0]
    card = Texts(on_card(engine))
    assert torch.equal(card.encode([CAT], beside=True)[0], expected) and loads == ["cpu", "cpu"]
    assert card.device() == torch.device("cuda", 0)
    assert card.new([CAT]) and not card.new([CAT], beside=True)  # other bits than the card would make
    always = Texts(on_card(engine, text_encoder_device="cpu"))
    assert torch.equal(always.encode([CAT])[0], expected) and loads == ["cpu"] * 3
    assert not always.new([CAT], beside=True)


def test_an_encoder_that_fails_is_dropped(wan21: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanPipeline

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    found = Texts(Engine.from_pretrained(wan21, device="cpu").setup)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="out of memory"):
        patched.setattr(WanPipeline, "encode_prompt", fail)
        found.encode([CAT])
    assert (len(loads), loads.alive) == (1, 0) and found.new([CAT])


def test_a_loaded_pipelines_texts_are_not_kept(wan21: Path) -> None:
    from diffusers import WanPipeline

    found = Texts(Engine.from_pretrained(WanPipeline.from_pretrained(wan21), device="cpu").setup)
    found.encode([CAT])
    assert found.new([CAT])


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    memory = SimpleNamespace(total=2**40, available=100)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    yield


def test_a_prompt_that_does_not_fit_beside_the_run_is_refused_and_the_run_goes_on(
    wan21: Path, loads: Loads, short_of_memory: None
) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", frames_per_block=2, context_frames=1)
    stream = engine.stream("a cat", num_frames=25, **CALL)
    next(stream)
    with pytest.raises(TooLarge, match=r"the text encoder needs about .* on the CPU .*, where 0\.0 are free: give all"):
        engine.set_prompt("a dog")
    assert loads == ["cpu"]
    engine.set_prompt("a cat")  # known
    assert len(list(stream)) == 3


def test_the_host_is_asked_for_room_when_it_encodes_for_a_card(
    wan21: Path, short_of_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", dtype="bfloat16")
    monkeypatch.setattr("dualparal.engine.capacity.card_memory", lambda device: 2**40)
    video = VideoConfig(32, 32, 9, 2)
    request = check_request(engine.setup, engine.scheduler, video, VideoInputs("a cat"))
    check_requests(on_card(engine), engine.parts, [request], None)
    elsewhere = on_card(engine, text_encoder_device="cpu")
    with pytest.raises(TooLarge, match="the text encoder needs"):
        check_requests(elsewhere, engine.parts, [request], None)
    engine.parts.texts.encode([Text.of(request, "a cat", None)])
    check_requests(elsewhere, engine.parts, [request], None)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="text_encoder_device='cuda': use 'cpu', or leave it out"):
        EngineConfig(text_encoder_device="cuda")
