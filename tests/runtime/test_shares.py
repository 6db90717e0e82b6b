"""Places of a stage as threads of one process: the bits of one place, its features in parts, and its failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.distributed.edges import LocalEdge
from dualparal.distributed.messages import Header
from dualparal.distributed.rows import local_rows
from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.planning.memory import stage_memory
from dualparal.planning.workload import Workload
from dualparal.runtime.places import FirstPlaces
from dualparal.runtime.shares import Cut, Share
from dualparal.runtime.stage import Stage, UnitPlan
from dualparal.schedule.layout import token_ranges
from engine_calls import embeds

CALL = {"height": 128, "width": 128, "num_frames": 33, "num_inference_steps": 3, "output_type": "latent"}
OPTIONS = {"frames_per_block": 3, "context_frames": 2}


@pytest.fixture(scope="module")
def three_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("three"), layers=2, heads=3)


def latents(model: Path, call: dict[str, Any] | None = None, **options: Any) -> torch.Tensor:
    built = Engine.from_pretrained(model, device="cpu", **{**OPTIONS, **options})
    guidance = (call or {}).get("guidance_scale", 5.0) > 1
    frames: torch.Tensor = built(**embeds(built, guidance), **{**CALL, **(call or {})}).frames
    return frames


@pytest.mark.parametrize("context", ["cached", "prior", "paper"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_places_give_the_bits_of_one(three_heads: Path, context: str, guidance: float) -> None:
    """In float32, heads that do not divide and frames that do not divide among them."""
    call = {"guidance_scale": guidance}
    plain = latents(three_heads, call, context=context)
    for places, form, stages in ((2, "pipelined", 2), (3, "plain", 1)):
        options = {"sequence_parallel": places, "sequence_parallel_form": form, "stages": stages}
        for _ in range(2 if places == 2 else 1):  # the same bits on repeat
            assert torch.equal(latents(three_heads, call, context=context, **options), plain), options


def test_refreshes_and_linears_in_8_bits_are_the_same(three_heads: Path, wan21: Path) -> None:
    options = {"refresh_every": 2, "stages": 2}
    assert torch.equal(latents(three_heads, sequence_parallel=3, **options), latents(three_heads, **options))
    eight = {"linear_8bit": "fp8", "dtype": "bfloat16"}
    assert torch.equal(latents(wan21, sequence_parallel=2, **eight), latents(wan21, **eight))


def test_a_run_goes_on_with_other_places(tmp_path: Path, three_heads: Path) -> None:
    """A snapshot says nothing of them."""
    options = {**OPTIONS, "refresh_every": 2}
    call = {**CALL, "num_frames": 45, "num_inference_steps": 4}
    whole = Engine.from_pretrained(three_heads, device="cpu", **options)
    expected = whole(**embeds(whole), **call).frames
    for number, (before, after) in enumerate([(1, 2), (3, 1)]):
        first = Engine.from_pretrained(three_heads, device="cpu", sequence_parallel=before, **options)
        folder = tmp_path / str(number)
        chunks = first.stream(**embeds(first), **call, checkpoint=Checkpoint(folder, 1))
        begun = [next(chunks), next(chunks), next(chunks)]
        chunks.close()  # type: ignore[attr-defined]
        then = Engine.from_pretrained(three_heads, device="cpu", sequence_parallel=after, stages=2, **options)
        rest = list(then.resume(folder))
        made = torch.cat([*(c.latents for c in begun if c.block < rest[0].block), *(c.latents for c in rest)], dim=2)
        assert rest[0].block > 0 and torch.equal(made, expected), (before, after)


def test_features_lie_where_their_heads_are(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory on each of two places, as the memory model counts it."""
    made: dict[int | None, int] = {}
    init = Stage.__init__

    def noted(self: Stage, *given: Any, **more: Any) -> None:
        init(self, *given, **more)
        made[self.share and self.share.index] = self.store.nbytes

    monkeypatch.setattr(Stage, "__init__", noted)
    for places in (1, 2):
        built = engine(**OPTIONS, sequence_parallel=places)
        built(**embeds(built), **CALL)
        assert built.source.sizes is not None
        video = SimpleNamespace(**CALL)
        work = Workload(built.source.sizes, _video(video), built.config)
        counted = stage_memory(work, work.schedule(1), [4], 0).features
        assert counted == made[None if places == 1 else 1]
    assert made[0] == made[1] == made[None] / 2 > 0


def _video(call: SimpleNamespace) -> Any:
    from dualparal.config.video import VideoConfig

    return VideoConfig(call.height, call.width, call.num_frames, call.num_inference_steps, output_type="latent")


def test_a_place_that_fails_ends_the_others(three_heads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is the one that is told of: the others only miss it."""
    run, before = Stage.run, threading.active_count()

    def failing(self: Stage, hidden: torch.Tensor, plan: UnitPlan) -> torch.Tensor:
        if self.share is not None and self.share.index == 1 and plan.unit.block == 1:
            raise MemoryError("no room in place 1")
        return run(self, hidden, plan)

    monkeypatch.setattr(Stage, "run", failing)
    with pytest.raises(MemoryError, match="no room in place 1"):
        latents(three_heads, sequence_parallel=3, stages=2)
    assert threading.active_count() == before, "their threads have ended"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sequence_parallel": 3}, "sequence_parallel=3 with a model of 2 heads: .* use 2 at most"),
        ({"sequence_parallel": 2, "graphs": True}, "graphs=True with sequence_parallel=2: an exchange"),
        ({"sequence_parallel": 2, "features_8bit": True}, "features_8bit=True with sequence_parallel=2: its scales"),
        (
            {"sequence_parallel": 2, "attention_8bit": "int8", "dtype": "bfloat16"},
            "attention_8bit='int8' with sequence_parallel=2: its scales",
        ),
        ({"sequence_parallel": 0}, "sequence_parallel=0: use the number of ranks"),
        ({"sequence_parallel_form": "ring"}, "sequence_parallel_form='ring' is not a form; use one of plain, pipe"),
    ],
)
def test_what_cannot_be_shared_is_refused(wan21: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        Engine.from_pretrained(wan21, device="cpu", **OPTIONS, **options)
    assert "\n" not in str(refused.value)


def test_windows_too_small_to_share_are_refused_before_weights_are_read(engine: Callable[..., Engine]) -> None:
    built = engine(**OPTIONS, sequence_parallel=2)
    with pytest.raises(ValueError, match=r"sequence_parallel=2 with windows of 12 tokens: every place takes 64"):
        built.stream(**embeds(built), **{**CALL, "height": 32, "width": 32})
    assert not built.parts.slices


def test_tokens_are_cut_at_frames_or_at_tiles() -> None:
    assert token_ranges(8, 1560, 2) == [range(0, 6240), range(6240, 12480)], "whole frames"
    assert token_ranges(3, 64, 2) == [range(0, 128), range(128, 192)], "whole tiles"
    assert token_ranges(5, 30, 2) == [range(0, 64), range(64, 150)], "what is left goes to the last"
    for frames in range(1, 14):
        for places in (2, 3, 4, 8):
            rows = token_ranges(frames, 600, places)
            assert [r.start for r in rows[1:]] == [r.stop for r in rows[:-1]] and rows[-1].stop == 600 * frames
            assert min(map(len, rows)) >= 64 and max(map(len, rows)) <= -(-600 * frames // places) + 128


def test_own_tokens_are_those_behind_what_is_fed() -> None:
    cut = Cut([range(0, 128), range(128, 256), range(256, 320)], 150)
    assert [cut.own(place) for place in range(3)] == [range(128, 128), range(22, 128), range(0, 64)]


def test_heads_of_a_place_travel_in_groups() -> None:
    exchange = local_rows(2)[1]
    plain, pipelined = (Share(exchange, 11, 4, form) for form in (False, True))
    assert plain.heads == [range(0, 6), range(6, 11)] and plain.width == 5 * 4
    assert plain.groups(0) == [range(0, 6)]
    assert pipelined.groups(1) == [range(6, 8), range(8, 9), range(9, 10), range(10, 11)]


@pytest.mark.parametrize(("marks", "expected"), [((0, 0), 0), ((0, 3), 3), ((2, 3), 2), ((2, 0), 2)])
def test_the_first_stage_whose_output_was_not_finite_is_kept(marks: tuple[int, int], expected: int) -> None:
    """Whichever place saw it: the others see it later."""
    ways = local_rows(2)
    slice_ = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"), picture=lambda patches, grid: patches)
    plan: Any = SimpleNamespace(window=range(2), fed_context=0)
    places = []
    for way in ways:
        spec = SimpleNamespace(patch=2, velocity_patch=2, grid=None)
        stage: Any = SimpleNamespace(experts=[slice_], spec=spec, cut=lambda *_: Cut([range(0, 3), range(3, 5)], 1))
        team: Any = SimpleNamespace(exchange=way)
        places.append(FirstPlaces(team, stage))
    first, second = (torch.tensor([float(mark)]) for mark in marks)
    places[1].give(torch.full((2, 2), 7.0), second)
    whole, found = places[0].collect(torch.ones(2, 2), first, plan)
    assert whole.tolist() == [[1.0, 1.0]] * 2 + [[7.0, 7.0]] * 2 and found.tolist() == [expected]


@pytest.mark.parametrize("places", [1, 2])
def test_messages_are_as_long_as_their_window(
    engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    """Of a refresh, which feeds more, and of the other steps, which once were as long."""
    receive, heard = LocalEdge.receive, {}

    def noted(self: LocalEdge) -> tuple[Header, torch.Tensor]:
        header, tensor = receive(self)
        heard[self.name, header.unit.block, header.unit.step] = len(tensor)
        return header, tensor

    monkeypatch.setattr(LocalEdge, "receive", noted)
    built = engine(**OPTIONS, stages=2, refresh_every=2, sequence_parallel=places)
    built(**embeds(built), **{**CALL, "num_inference_steps": 4})
    tokens, inner, patch = 64, 48, 64
    assert heard["edge 0 -> 1", 2, 1] == 3 * tokens * inner + 1
    assert heard["edge 0 -> 1", 2, 0] == (3 + 2) * tokens * inner + 1, "iteration 2 is a refresh"
    assert heard["edge 1 -> 0", 2, 0] == heard["edge 1 -> 0", 2, 1] == 3 * tokens * patch + 1
