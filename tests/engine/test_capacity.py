"""The check of a request against a card's memory: stand-ins for the numbers that torch would give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dualparal.config.engine import EngineConfig
from dualparal.config.units import GIB
from dualparal.config.video import OutputType, VideoConfig
from dualparal.engine import capacity
from dualparal.engine.capacity import TooLarge, loaded_bytes
from dualparal.engine.engine import Engine
from dualparal.models.registry import model_sizes
from dualparal.models.wan.sizes import MODELS
from dualparal.planning.memory import place_memory, stage_memory
from dualparal.planning.workload import Workload

CARD = torch.device("cuda", 1)
SPLIT = [15, 15]
Card = Callable[..., None]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """Sets a card's memory, in GiB; asked for another card, the stand-ins fail."""

    def set_memory(total: float, free: float, reserved: float = 0.0, allocated: float = 0.0) -> None:
        def bytes_of(value: float) -> Callable[[torch.device], int]:
            def get(device: torch.device) -> int:
                assert device == CARD
                return int(value * GIB)

            return get

        properties = type("Properties", (), {"total_memory": int(total * GIB)})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (bytes_of(free)(device), int(total * GIB)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", bytes_of(reserved))
        monkeypatch.setattr(torch.cuda, "memory_allocated", bytes_of(allocated))

    yield set_memory


def workload(output_type: OutputType = "np") -> Workload:
    video = VideoConfig(num_frames=1025, output_type=output_type)
    return Workload(MODELS["wan2.1-t2v-1.3b"], video, EngineConfig())


def need(work: Workload) -> float:
    """GiB of stage 0 while units run."""
    return stage_memory(work, work.schedule(2), SPLIT, 0).running / GIB


def check(work: Workload, encodes: bool = False, loaded: int = 0) -> None:
    capacity.check(work, SPLIT, [0], CARD, encodes, loaded=loaded)


def test_a_rank_that_decodes_is_counted_by_what_it_does(card: Card) -> None:
    """The VAE and the frames lie there, and no longer beside stage 0; where latents are the result, nothing does."""
    work, latents = (
        replace(workload(output), engine=EngineConfig(decode_ranks=2)) for output in ("np", "latent")
    )  # fmt: skip
    decoding = place_memory(work, work.schedule(2), SPLIT, 2).running / GIB
    assert 0.5 < decoding < need(workload()) - need(work) < 2.2 * decoding
    card(total=80, free=decoding - 0.1)
    with pytest.raises(TooLarge):
        capacity.check(work, SPLIT, [3], CARD, False)
    capacity.check(latents, SPLIT, [3], CARD, False)
    card(total=80, free=decoding + 0.1)
    capacity.check(work, SPLIT, [3], CARD, False)


def test_what_others_use_is_not_there(card: Card) -> None:
    work = workload()
    card(total=80, free=need(work) + 0.1)
    check(work)
    card(total=80, free=need(work) - 0.1)
    with pytest.raises(TooLarge, match=rf"the card has {need(work) - 0.1:.1f} free for it, of 80\.0 in all"):
        check(work)


def test_the_allocators_reserve_is_free_and_what_it_gave_out_is_not(card: Card) -> None:
    work = workload()
    card(total=80, free=1, reserved=need(work) + 4, allocated=4.9)
    check(work)
    card(total=80, free=1, reserved=need(work) + 4, allocated=5.1)
    with pytest.raises(TooLarge):
        check(work)


def test_weights_of_an_earlier_run_do_not_count_twice(card: Card) -> None:
    """A second run where the first one had just enough: weights are out of the free memory, and part of the need."""
    work = workload()
    memory = stage_memory(work, work.schedule(2), SPLIT, 0)
    weights = memory.weights + work.decode_itemsize * work.model.vae.parameters
    held = weights / GIB
    card(total=24, free=need(work) - held + 0.1, reserved=held, allocated=held)
    check(work, loaded=weights)
    with pytest.raises(TooLarge):
        check(work)


def test_an_encoder_comes_beside_the_weights_that_are_here(card: Card) -> None:
    work = workload("latent")
    encoder = 60 * GIB
    work = dataclasses.replace(work, model=dataclasses.replace(work.model, text_encoder=int(encoder / work.itemsize)))
    loaded = int(2 * GIB)
    card(total=80, free=61.9, reserved=2, allocated=2)
    check(work, encodes=True, loaded=loaded)
    card(total=80, free=59.9, reserved=2, allocated=2)
    check(work, loaded=loaded)
    with pytest.raises(TooLarge, match=r"need about 62\.0 GiB .* use text_encoder_device='cpu', a smaller"):
        check(work, encodes=True, loaded=loaded)
    elsewhere = EngineConfig(text_encoder_device="cpu")
    check(dataclasses.replace(work, engine=elsewhere), encodes=True, loaded=loaded)


def test_tensors_in_circles_are_let_go_of_before_a_refusal(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload()
    card(total=80, free=0, reserved=60, allocated=60)
    monkeypatch.setattr(capacity.gc, "collect", lambda: card(total=80, free=0, reserved=60, allocated=0))
    check(work)


def test_what_a_run_leaves_is_counted(wan21: Path) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", stages=2, dtype="float32")
    video = VideoConfig(32, 32, 9, 2, output_type="np")
    work = Workload(model_sizes(str(wan21)), video, engine.config)
    split = [2, 2]
    assert loaded_bytes(work, split, engine.parts) == 0
    engine("a cat", height=32, width=32, num_frames=9, num_inference_steps=2)
    stages = [stage_memory(work, work.schedule(2), split, stage) for stage in range(2)]
    weights = sum(stage.weights for stage in stages)
    assert loaded_bytes(work, split, engine.parts) == weights + 4 * work.model.vae.parameters
    latents = dataclasses.replace(work, video=dataclasses.replace(video, output_type="latent"))
    assert loaded_bytes(latents, split, engine.parts) == weights  # the VAE does not help a run that has no need of it
