"""The place of a job: what the flags leave open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dualparal.cli.place import choose_threads, count_stages
from dualparal.models.registry import BUILT_IN


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("asked", "stages", "model", "threads"),
    [
        (0, 1, "wan2.1-t2v-14b", 16),
        (0, 1, "wan2.1-t2v-1.3b", 12),  # 1,536 columns
        (0, 4, "wan2.1-t2v-1.3b", 4),
        (0, 1, BUILT_IN, 1),
        (5, 4, BUILT_IN, 5),
        (0, 32, "wan2.1-t2v-14b", 1),
        (0, 4, "somebody/s-model", 4),
        (0, 4, None, 4),
    ],
)
def test_threads_are_a_share_of_the_cores_and_few_for_a_small_model(
    asked: int, stages: int, model: str | None, threads: int
) -> None:
    assert choose_threads(asked, stages, model) == threads


def test_a_models_configs_are_enough(wan21: Path) -> None:
    assert choose_threads(0, 2, str(wan21)) == 1


@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("2,4", 2), ("", 8), ("0", 8), ("many", 8)])
def test_threads_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch, given: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert choose_threads(0, 2) == threads
    assert choose_threads(6, 2) == 6


@pytest.mark.parametrize(
    ("gpus", "stages", "decoders", "places", "expected"),
    [(8, None, 0, 2, 4), (8, None, 2, 3, 2), (None, 3, 1, 2, 3), (8, 4, 0, 2, 4), (None, None, 0, 2, 1)],
)
def test_stages_of_several_processes(
    monkeypatch: pytest.MonkeyPatch, gpus: int | None, stages: int | None, decoders: int, places: int, expected: int
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert count_stages(gpus, stages, None, decoders, places) == expected
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(expected * places + decoders))
    assert count_stages(gpus, stages, None, decoders, places) == expected


@pytest.mark.parametrize(
    ("gpus", "stages", "places", "world", "words"),
    [
        (7, None, 2, None, "--sequence-parallel 2 with 7 for the stages of --gpus 7: every stage takes 2"),
        (8, 8, 2, None, "--gpus 8 and --stages 8 with --sequence-parallel 2: --gpus counts all"),
        (None, None, 0, None, "--sequence-parallel 0: use the number"),
        (None, None, 2, 5, "--sequence-parallel 2 with 5 for the stages of a run of 5 processes"),
        (None, 4, 2, 4, "--stages 4 in a run of 4 processes: every process shares a stage with 1; .* start 8"),
    ],
)
def test_processes_that_make_no_whole_stages_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int | None, stages: int | None, places: int, world: int | None, words: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if world is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=words):
        count_stages(gpus, stages, None, 0, places)
