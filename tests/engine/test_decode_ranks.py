"""Who decodes moves no bit: beside stage 0, on ranks of their own, or in place; in one process and between ranks."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.decoding.chunks import NonFiniteError
from dualparal.decoding.parts import PartDecoder
from dualparal.engine.engine import Engine
from dualparal.launch.blame import Limits
from dualparal.launch.supervisor import supervise
from places import WORKERS

CALL: dict[str, Any] = {
    "height": 48, "width": 32, "num_frames": 21, "num_inference_steps": 3, "guidance_scale": 5.0,
}  # fmt: skip
BLOCKS: dict[str, Any] = {"frames_per_block": 2, "context_frames": 1}
PLACES = [
    {"decode_ranks": 1},
    {"decode_ranks": 2},
    {"stages": 4, "decode_ranks": 4},
    {"stages": 2, "decode_in_place": True},
    {"stages": 3, "decode_in_place": True},
    {"decode_in_place": True},
]
_WHOLE: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}


def embeds_of(engine: Engine) -> dict[str, torch.Tensor]:
    rows = torch.randn(2, 16, engine.source.spec.text_dim, generator=torch.Generator().manual_seed(1))
    return {"prompt_embeds": rows[:1], "negative_prompt_embeds": rows[1:]}


def made(model: Path, output_type: str = "uint8", **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and frames of a run in this process."""
    engine = Engine.from_pretrained(model, device="cpu", **BLOCKS, **options)
    chunks = list(engine.stream(**CALL, **embeds_of(engine), output_type=output_type))
    return torch.cat([c.latents for c in chunks], dim=2), torch.cat([torch.as_tensor(c.frames) for c in chunks])


def whole(model: Path, output_type: str = "uint8") -> tuple[torch.Tensor, torch.Tensor]:
    """The same, where one place decodes beside one stage."""
    name = f"{model} {output_type}"
    if name not in _WHOLE:
        _WHOLE[name] = made(model, output_type)
    return _WHOLE[name]


@pytest.mark.parametrize("options", PLACES, ids=str)
def test_the_same_bits_wherever_it_is_decoded(wan21: Path, options: dict[str, Any]) -> None:
    latents, frames = made(wan21, **options)
    assert torch.equal(latents, whole(wan21)[0]) and torch.equal(frames, whole(wan21)[1])
    assert frames.shape == (21, 48, 32, 3) and frames.dtype == torch.uint8 and len(frames.unique()) > 20


@pytest.mark.parametrize("context", ["prior", "paper"])
def test_the_same_bits_with_other_policies_and_the_residual_vae(wan22: Path, context: str) -> None:
    alone, parted = (made(wan22, context=context, **options) for options in ({}, {"stages": 2, "decode_ranks": 2}))
    assert all(torch.equal(a, b) for a, b in zip(alone, parted, strict=True))


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_every_kind_of_frames(wan21: Path, output_type: str) -> None:
    found, wanted = made(wan21, output_type, decode_ranks=2)[1], whole(wan21, output_type)[1]
    assert torch.equal(found, wanted) and found.dtype == wanted.dtype


def test_pictures_are_of_whole_frames(wan21: Path) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", decode_ranks=3, **BLOCKS)
    (frames,) = engine(**CALL, **embeds_of(engine), output_type="pil").frames
    assert np.array_equal(np.stack([np.asarray(frame) for frame in frames]), whole(wan21)[1].numpy())


def test_a_resumed_run_may_decode_elsewhere(wan21: Path, tmp_path: Path) -> None:
    def engine(**options: Any) -> Engine:
        return Engine.from_pretrained(wan21, device="cpu", context="paper", **BLOCKS, **options)

    first = engine(decode_ranks=2)
    chunks = first.stream(
        **CALL, **embeds_of(first), output_type="uint8", checkpoint=Checkpoint(tmp_path / "kept", every=1)
    )
    begun = [next(chunks) for _ in range(2)]
    chunks.close()  # type: ignore[attr-defined]
    frames = made(wan21, context="paper")[1]
    for number, options in enumerate(({}, {"stages": 3, "decode_in_place": True}, {"decode_ranks": 1})):
        folder = shutil.copytree(tmp_path / "kept", tmp_path / str(number))  # a run that has ended leaves nothing to do
        rest = list(engine(**options).resume(folder))
        start = rest[0].start_frame
        assert 0 < start <= sum(len(chunk.frames) for chunk in begun)
        assert np.array_equal(np.concatenate([chunk.frames for chunk in rest]), frames[start:].numpy())


@pytest.mark.parametrize("output_type", ["uint8"])  # others: in one process, above
def test_ranks_that_decode_give_the_frames_of_one_process(tmp_path: Path, wan21: Path, output_type: str) -> None:
    """Three ranks, in all roles that they can have; all in the same processes, which import for seconds."""
    places = [{"decode_ranks": 1}, {"decode_ranks": 2}, {"decode_in_place": True}]
    call = {**CALL, "prompt": "a cat", "output_type": output_type}
    cases = [{"model": str(wan21), "options": {**BLOCKS, **place}, "call": call} for place in places]
    if output_type == "uint8":  # a consumer that leaves early; latents alone, for which nobody is needed
        cases += [{**case, "leave_after": 1} for case in cases]
        cases += [{**cases[0], "call": {**call, "output_type": "latent"}}]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    worker = [sys.executable, str(WORKERS / "engine_rank.py"), str(tmp_path)]
    result = supervise(worker, 3, limits=Limits(progress=60.0, startup=120.0), env={"OMP_NUM_THREADS": "1"})
    assert result.exit_code == 0, str(result.failure)
    engine = Engine.from_pretrained(wan21, device="cpu", **BLOCKS)
    chunks = list(engine.stream(**{**CALL, "prompt": "a cat", "output_type": output_type}))
    for index, case in enumerate(cases):
        found, kept = load_file(tmp_path / f"{index}.safetensors"), chunks[: case.get("leave_after", len(chunks)) + 1]
        assert torch.equal(found["latents"], torch.cat([chunk.latents for chunk in kept], dim=2)), case
        if case["call"]["output_type"] != "latent":
            assert torch.equal(found["frames"], torch.cat([torch.as_tensor(chunk.frames) for chunk in kept])), case


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_ranks": -1}, "decode_ranks=-1: use the number of ranks that only decode"),
        ({"decode_ranks": True}, "decode_ranks=True: use the number"),
        ({"decode_in_place": 1}, "decode_in_place=1: it has no modes"),
        ({"decode_in_place": True, "decode_ranks": 2}, "the stages' ranks decode, or others do; leave one out"),
    ],
)
def test_who_decodes_is_checked(wan21: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(wan21, device="cpu", **options)


def test_more_parts_than_rows_are_refused_before_anything_is_loaded(wan21: Path) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", decode_ranks=7, **BLOCKS)
    with pytest.raises(ValueError, match="7 parts of a picture of 6 latent rows: every part needs a row"):
        engine.stream(**CALL, **embeds_of(engine), output_type="uint8")
    assert engine.stream(**CALL, **embeds_of(engine), output_type="latent")


@pytest.mark.parametrize("options", [{}, {"decode_ranks": 2}], ids=str)
def test_frames_with_nan_are_not_given_out(wan21: Path, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", **BLOCKS, **options)
    frames = PartDecoder._frames

    def broken(self: PartDecoder, video: int, block: int, latents: torch.Tensor) -> Any:
        return frames(self, video, block, latents * (float("nan") if block == 2 else 1.0))

    monkeypatch.setattr(PartDecoder, "_frames", broken)
    chunks: list[int] = []
    with pytest.raises(NonFiniteError, match=r"the frames of block 2 hold NaN, first in (the )?decoder"):
        for chunk in engine.stream(**CALL, **embeds_of(engine), output_type="uint8"):
            chunks.append(chunk.block)
    assert chunks == [0, 1]


def test_a_part_that_fails_does_not_keep_the_others(wan21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other part waits for its rows: it is told."""
    engine = Engine.from_pretrained(wan21, device="cpu", decode_ranks=2, **BLOCKS)
    frames = PartDecoder._frames

    def broken(self: PartDecoder, video: int, block: int, latents: torch.Tensor) -> Any:
        if block == 1 and self.name == "decoder 1":
            raise MemoryError("no room")
        return frames(self, video, block, latents)

    monkeypatch.setattr(PartDecoder, "_frames", broken)
    with pytest.raises(MemoryError, match="no room"):
        list(engine.stream(**CALL, **embeds_of(engine), output_type="uint8"))


@pytest.mark.parametrize("options", [{}, {"decode_ranks": 2}, {"stages": 2, "decode_in_place": True}], ids=str)
def test_a_consumer_that_leaves_while_blocks_wait_is_let_go(
    wan21: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """What one part has begun the others finish: a part whose block was dropped would leave them waiting."""
    engine = Engine.from_pretrained(wan21, device="cpu", **BLOCKS, **options)
    frames = PartDecoder._frames

    def slowly(self: PartDecoder, video: int, block: int, latents: torch.Tensor) -> Any:
        time.sleep(0.2 if self.name != "decoder 0" else 0.6)  # so that two blocks wait, begun by one part only
        return frames(self, video, block, latents)

    monkeypatch.setattr(PartDecoder, "_frames", slowly)
    chunks = engine.stream(**CALL, **embeds_of(engine), output_type="uint8")
    next(chunks)
    closing = threading.Thread(target=chunks.close, daemon=True)  # type: ignore[attr-defined]
    closing.start()
    closing.join(60)
    assert not closing.is_alive()


def test_a_failed_part_is_heard_of_before_the_next_block_is_handed_over(
    wan21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait for its rows, and are never done."""
    never = threading.Event()
    frames = PartDecoder._frames

    def broken(self: PartDecoder, video: int, block: int, latents: torch.Tensor) -> Any:
        if self.name == "decoder 0":
            raise MemoryError("no room")
        never.wait(60)
        return frames(self, video, block, latents)

    monkeypatch.setattr(PartDecoder, "_frames", broken)
    engine = Engine.from_pretrained(wan21, device="cpu", decode_ranks=2, **BLOCKS)
    begin = time.monotonic()
    with pytest.raises(MemoryError, match="no room"):
        list(engine.stream(**{**CALL, "num_frames": 5}, **embeds_of(engine), output_type="uint8"))
    assert time.monotonic() - begin < 30
    never.set()
