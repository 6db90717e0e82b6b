"""Engines and threads: engines of one process load side by side, and one engine makes one video at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dualparal.engine.engine import Engine
from dualparal.models import loading
from engine_calls import embeds

Build = Callable[..., Engine]
CALL: dict[str, Any] = {"num_frames": 9, "num_inference_steps": 1, "height": 32, "width": 32, "output_type": "pt"}


def test_engines_in_several_threads_load_and_make_the_same(engine: Build) -> None:
    """VAE and text encoder are loaded in every thread, all at once, three times over."""
    barrier = threading.Barrier(4)

    def make(_: int) -> Any:
        barrier.wait(60)
        return engine(frames_per_block=2, context_frames=1)("a cat", **CALL).frames

    with ThreadPoolExecutor(4) as pool:
        made = [frames for _ in range(3) for frames in pool.map(make, range(4))]
    assert all(torch.equal(frames, made[0]) for frames in made)


def test_loading_waits_for_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [], []

    @loading.one_at_a_time
    def load(number: int) -> None:
        inside.append(number)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, range(8)))
    assert set(most) == {1}


def test_an_engine_is_taken_when_a_stream_is_asked_for(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1)
    prompt = embeds(built)
    asked = built.stream(**prompt, **CALL)  # not begun
    for other in (lambda: built.stream(**prompt, **CALL), lambda: built(**prompt, **CALL)):
        with pytest.raises(RuntimeError, match="this engine is making a video"):
            other()
    asked.close()  # type: ignore[attr-defined]
    dropped = built.stream(**prompt, **CALL)
    del dropped
    chunks = built.stream(**prompt, **CALL)
    list(chunks)
    assert built(**prompt, **CALL).frames is not None and list(chunks) == []


def test_of_two_threads_one_gets_the_engine(engine: Build) -> None:
    built = engine(frames_per_block=2, context_frames=1)
    prompt, barrier = embeds(built), threading.Barrier(4)

    def make(_: int) -> str:
        barrier.wait(60)
        try:
            return str(len(list(built.stream(**prompt, **CALL))))
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        told = sorted(pool.map(make, range(4)))
    assert told[0] == "2" and told.count("2") >= 1
    assert all(text == "2" or text.startswith("this engine is making a video") for text in told)


def test_a_stream_is_read_by_one_thread(engine: Build, tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    built = engine(frames_per_block=2, context_frames=1)
    chunks = built.stream(**embeds(built), **CALL, callback_on_step_end=wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, chunks)
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="one thread reads a stream"):
            next(chunks)
        with pytest.raises(RuntimeError, match="one thread reads a stream"):
            chunks.close()  # type: ignore[attr-defined]
        go_on.set()
        assert first.result().block == 0
    assert [chunk.block for chunk in chunks] == [1]
