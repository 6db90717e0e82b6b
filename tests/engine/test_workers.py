"""Ranks that Python starts: the bits of one process, warm between calls, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dualparal
from dualparal.launch.supervisor import write_error
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.workers import ranks
from dualparal.workers.engine import WorkerEngine
from engine_calls import embeds
from lora_files import write_lora
from places import WORKERS

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
    with pytest.raises(ValueError, match=r"gpus=5 with a model of 4 layers: .*; use 4 or fewer"):
        dualparal.Engine.from_pretrained(wan21, gpus=5, **OPTIONS)
    with dualparal.Engine.from_pretrained(wan21, gpus=2, **OPTIONS) as engine:
        started = {child.pid for child in left()[1]}
        with pytest.raises(ValueError, match="height"):
            engine.stream(**{**first, "height": 33})
        for call, seed, chunks in ((first, 5, wanted[0]), (second, 6, wanted[1])):
            found = list(engine.stream(**call, seed=seed))
            assert [chunk.block for chunk in found] == [chunk.block for chunk in chunks]
            for ours, theirs in zip(found, chunks, strict=True):
                assert torch.equal(ours.latents, theirs.latents) and (ours.frames == theirs.frames).all()
        assert engine.stats is not None and len(engine.stats.ranks) == 2
        if (child := os.fork()) == 0:
            engine.close()  # the ranks are the parent's
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
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
        assert {child.pid for child in left()[1]} == started
        victim = next(c for c in left()[1] if c.environ().get("RANK") == "1")
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(dualparal.RankFailed, match="killed by SIGKILL") as caught:
            for _ in stream:
                pass
        assert caught.value.failure.rank == 1
    assert left() == before
    with pytest.raises(RuntimeError, match="closed"):
        engine.stream(**first)


def check_same(found: Iterable[Any], wanted: Iterable[Any]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.block, ours.start_frame, ours.video) == (theirs.block, theirs.start_frame, theirs.video)
        assert torch.equal(ours.latents, theirs.latents) and (ours.frames == theirs.frames).all()


def shrink(_: Any, step: int, timestep: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
    return {"latents": values["latents"] * 0.75} if step == 0 else {}


def test_ranks_of_every_kind_and_what_they_keep(wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks share a stage and one decodes; a LoRA, a callback, a change of prompt. Then the weights are gone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = tmp_path / "model"
    shutil.copytree(wan21, model)
    state = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    lora = write_lora(tmp_path / "a.safetensors", "diffusers", state).path
    options = {**OPTIONS, "loras": [str(lora)]}
    alone = dualparal.Engine.from_pretrained(model, **options)
    call = {"height": 128, "width": 128, "num_frames": 37, "num_inference_steps": 2, "guidance_scale": 1.0}
    call |= {"output_type": "uint8", "callback_on_step_end": shrink}
    with dualparal.Engine.from_pretrained(model, gpus=3, sequence_parallel=2, decode_ranks=1, **options) as engine:
        stream = engine.stream(["a cat", "a cow"], **call, seed=3)
        found = [next(stream)]
        changed = engine.set_prompt("a dog", video=1)
        found += stream
        frames = {chunk.block: chunk.start_frame for chunk in found}
        assert changed in frames
        check_same(found, alone.stream(["a cat", {0: "a cow", frames[changed]: "a dog"}], **call, seed=3))
        assert engine.stats is not None and (len(engine.stats.ranks), len(engine.stats.decoders)) == (2, 1)
        call["num_frames"] = 5
        second = list(alone.stream("a dog", **call, seed=4))
        for file in [*model.rglob("*.safetensors"), model / "tokenizer" / "tokenizer.json", lora]:
            file.unlink()
        check_same(engine.stream("a dog", **call, seed=4), second)
        with pytest.raises((ValueError, OSError, dualparal.RankFailed)):
            list(engine.stream("a bird", **call))


def test_answers_of_an_earlier_request_are_dropped() -> None:
    engine = WorkerEngine.__new__(WorkerEngine)
    engine._id = 2
    messages = [({"id": number, "kind": kind}, {}) for number, kind in ((1, "checked"), (1, "end"), (2, "refused"))]
    engine._ranks = SimpleNamespace(receive=lambda rank: messages.pop(0))  # type: ignore[assignment]
    assert engine._receive(0)[0]["kind"] == "refused" and not messages


class Pressed:
    """Ctrl-C while the parent waits for its n-th message from now on, in place of that message."""

    def __init__(self, ranks: Any, after: int) -> None:
        self._ranks, self._receive, self._left = ranks, ranks.receive, after
        ranks.receive = self

    def __call__(self, rank: int) -> Any:
        if self._left == 0:
            self._ranks.receive = self._receive
            raise KeyboardInterrupt
        self._left -= 1
        return self._receive(rank)


def test_images_and_ends_of_a_run_on_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the parent at any message, an interrupt and a resume, and a rank that is killed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = build_tiny_pipeline(tmp_path / "model", wan22=True, images="condition")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 25, 35, 3), dtype=np.uint8)
    Image.fromarray(pictures[1]).save(tmp_path / "last.png")
    options = {**OPTIONS, "refresh_every": 2}
    alone = dualparal.Engine.from_pretrained(model, **options)
    call = {**SIZE, **embeds(alone), "num_frames": 49, "image": pictures[0], "last_image": tmp_path / "last.png"}
    wanted = list(alone.stream(**call))
    folder = tmp_path / "snapshots"
    with dualparal.Engine.from_pretrained(model, gpus=2, **options) as engine:
        for after in (0, 1, 2, 3):  # the answers of both ranks, the first chunk, the second
            Pressed(engine._ranks, after)
            with pytest.raises(KeyboardInterrupt):
                list(engine.stream(**call))
        stream = engine.stream(**call)
        next(stream)
        Pressed(engine._ranks, 0)
        with pytest.raises(KeyboardInterrupt):
            stream.close()  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="height"):
            engine.stream(**{**call, "height": 33})
        stream = engine.stream(**call, checkpoint=folder)
        given = [next(stream), next(stream)]
        engine.interrupt()
        given += stream
        assert engine.interrupted and len(given) < len(wanted)
        check_same(given, wanted[: len(given)])
        rest = list(engine.resume(folder))
        check_same(rest, wanted[len(wanted) - len(rest) :])
        assert len(given) + len(rest) >= len(wanted)
        shutil.rmtree(folder)
        stream = engine.stream(**{**call, "num_frames": 4001, "last_image": wanted[-1].frames[-1]}, checkpoint=folder)
        while not any(folder.glob("snapshot-*")):
            next(stream)
        os.kill(next(c.pid for c in left()[1] if c.environ().get("RANK") == "1"), signal.SIGKILL)
        with pytest.raises(dualparal.RankFailed, match="killed by SIGKILL") as caught:
            list(stream)
    failure = caught.value.failure
    assert (failure.rank, failure.stage, failure.resume_command) == (1, 1, f"engine.resume({str(folder)!r})")
    write_error(tmp_path / "error.json", failure)
    assert json.loads((tmp_path / "error.json").read_text()) == {**asdict(failure), "message": str(caught.value)}


def test_fifty_engines_leave_nothing(wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Light ranks (a real one imports for seconds), two of each engine; every other engine is dropped, not closed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ranks, "_PROGRAM", (WORKERS / "light_rank.py").read_text())
    check_nothing_is_left(wan21, tmp_path, 50)


@pytest.mark.slow
def test_engines_leave_nothing(wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exhaustive: bool) -> None:
    """The same of whole ones: two, and 50 with --exhaustive."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    check_nothing_is_left(wan21, tmp_path, 50 if exhaustive else 2)


def check_nothing_is_left(model: Path, temporary: Path, engines: int) -> None:
    shared = Path("/dev/shm")
    things = [*left(), set(shared.iterdir()) if shared.is_dir() else None]
    for number in range(engines):
        engine = dualparal.Engine.from_pretrained(model, gpus=2, **OPTIONS)
        assert len(left()[1]) >= 2
        for chunk in engine.stream("a cat", **{**SIZE, "num_frames": 5}, output_type="uint8"):
            assert len(chunk.frames) == 5
        if number % 2:
            del engine
        else:
            engine.close()
        assert [*left(), set(shared.iterdir()) if shared.is_dir() else None] == things
        assert not list(temporary.iterdir())
