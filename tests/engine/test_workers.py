"""Ranks that Python starts: the bits of one process, warm between calls, and nothing left behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest
import torch

import dualparal
from engine_calls import embeds

SIZE = {"height": 32, "width": 32, "num_inference_steps": 3, "num_frames": 25}
OPTIONS = {"frames_per_block": 2, "context_frames": 1, "device": "cpu"}


def left() -> tuple[int, list[psutil.Process], list[str]]:
    """Descriptors, children and threads of ours that this process has."""
    own = psutil.Process()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("dualparal")]
    return own.num_fds(), own.children(recursive=True), threads


def test_ranks_from_python(wan21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = dualparal.Engine.from_pretrained(wan21, **OPTIONS)
    first, second = ({**SIZE, **embeds(alone, seed=seed)} for seed in (1, 2))
    wanted = [list(alone.stream(**call, seed=seed)) for call, seed in ((first, 5), (second, 6))]
    before = left()
    with pytest.raises(ValueError, match="use gpus=3"):
        dualparal.Engine.from_pretrained(wan21, gpus=2, stages=3, **OPTIONS)
    with dualparal.Engine.from_pretrained(wan21, gpus=2, **OPTIONS) as engine:
        ranks = {child.pid for child in left()[1]}
        with pytest.raises(ValueError, match="height"):
            engine.stream(**{**first, "height": 33})
        for call, seed, chunks in ((first, 5, wanted[0]), (second, 6, wanted[1])):
            found = list(engine.stream(**call, seed=seed))
            assert [chunk.block for chunk in found] == [chunk.block for chunk in chunks]
            for ours, theirs in zip(found, chunks, strict=True):
                assert torch.equal(ours.latents, theirs.latents) and (ours.frames == theirs.frames).all()
        assert engine.stats is not None and len(engine.stats.ranks) == 2
        steps: list[int] = []
        stream = engine.stream(
            **{**first, "num_frames": None}, callback_on_step_end=lambda _, step, *more: steps.append(step)
        )
        next(stream)
        with pytest.raises(RuntimeError, match="making a video"):
            engine.stream(**first)
        stream.close()  # type: ignore[attr-defined]
        assert steps and len(list(engine.stream(**first))) == len(wanted[0])
        stream = engine.stream(**{**first, "num_frames": None})
        next(stream)
        assert {child.pid for child in left()[1]} == ranks
        victim = next(c for c in left()[1] if c.environ().get("RANK") == "1")
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(dualparal.RankFailed, match="killed by SIGKILL") as caught:
            for _ in stream:
                pass
        assert caught.value.failure.rank == 1
    assert left() == before
    with pytest.raises(RuntimeError, match="closed"):
        engine.stream(**first)
