"""Ranks that watch one another through a store: who is silent is named by the others, who works or waits is not."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from dualparal.distributed import watch
from dualparal.distributed.watch import StoreWatch
from dualparal.launch.blame import Failure, Limits

pytestmark = pytest.mark.alone  # who was heard when
LIMITS = Limits(heartbeat=1.0, progress=1000.0, startup=1000.0)


class Rank:
    """One rank: its phase, its watch, and whom it blames."""

    def __init__(self, store: Any, rank: int, size: int, limits: Limits) -> None:
        self.where: dict[str, Any] = {"stage": rank, "phase": "run", "block": 3, "step": 1}
        self.blamed: list[Failure] = []
        self.watch = StoreWatch(store, rank, size, lambda: self.where, limits, self.blamed.append)

    def move(self) -> None:
        self.where = dict(self.where)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SECONDS", 0.05)


def _until(condition: Any, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Deaf:
    """A store that one rank does not reach any more, once told so."""

    def __init__(self, store: Any) -> None:
        self._store, self.stopped = store, threading.Event()

    def set(self, key: str, value: str) -> None:
        if not self.stopped.is_set():
            self._store.set(key, value)

    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check(keys))

    def get(self, key: str) -> bytes:
        return bytes(self._store.get(key))


def test_a_silent_rank_is_named_by_the_others() -> None:
    store = dist.HashStore()
    silent = Deaf(store)
    ranks = [Rank(silent if rank == 1 else store, rank, 3, LIMITS) for rank in range(3)]
    for rank in ranks:
        rank.watch.start()
    assert _until(lambda: all(store.check([f"dualparal/watch/{rank}"]) for rank in range(3)))
    time.sleep(0.3)
    assert not any(rank.blamed for rank in ranks)
    silent.stopped.set()
    assert _until(lambda: ranks[0].blamed and ranks[2].blamed)
    for failure in (ranks[0].blamed[0], ranks[2].blamed[0]):
        assert (failure.rank, failure.stage, failure.block, failure.exit_code) == (1, 1, 3, 4)
        assert "no heartbeat for" in failure.cause
    ranks[1].watch.stop()


def test_a_rank_that_beats_and_does_nothing_is_named_and_one_that_waits_is_not() -> None:
    store = dist.HashStore()
    limits = Limits(heartbeat=1000.0, progress=0.6, startup=1000.0)
    ranks = [Rank(store, rank, 2, limits) for rank in range(2)]
    ranks[0].where["phase"] = "wait_recv"
    for rank in ranks:
        rank.watch.start()
    for _ in range(20):
        time.sleep(0.05)
        ranks[1].move()  # at work
    assert not any(rank.blamed for rank in ranks)
    assert _until(lambda: all(rank.blamed for rank in ranks))  # it moves no more
    assert {rank.blamed[0].rank for rank in ranks} == {1}
    assert all("no progress for" in rank.blamed[0].cause for rank in ranks)


def test_who_is_done_may_be_silent_and_a_store_that_is_gone_ends_the_watch() -> None:
    store = dist.HashStore()
    ranks = [Rank(store, rank, 2, LIMITS) for rank in range(2)]
    for rank in ranks:
        rank.watch.start()
    assert _until(lambda: ranks[0].watch._last[1])  # it has been heard
    ranks[1].watch.stop()
    time.sleep(1.5)
    assert not ranks[0].blamed

    def gone(_: Any) -> None:
        raise dist.DistNetworkError("connection closed")

    ranks[0].watch._store = type("Gone", (), {"set": lambda *_: gone(_)})()
    assert _until(lambda: not ranks[0].watch.is_alive()) and not ranks[0].blamed
