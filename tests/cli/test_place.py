"""The place of a job: what the flags leave open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dualparal.cli.place import choose_threads
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
