"""Heartbeats through the store of ranks that torchrun has started, which have no parent of ours to hear them.

Every rank tells where it is, hears all others, and knows from the rule of ``launch.blame`` when to give up. It need not
know what a phase means.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dualparal.distributed.handshake import Store
from dualparal.launch.blame import Failure, Limits, RankState, blame

SECONDS = 1.0  # between two beats
_LAST_SECONDS = 2.0  # for the last word: the store may be gone
_AWAY_SECONDS = 5.0  # between two rounds: this process itself did not run


class StoreWatch(threading.Thread):
    """Beats for this rank and listens for the others, from ``start`` to ``stop``.

    Args:
        store: one of its own, since another thread's ``get`` may hold the ranks' usual one.
        rank, world_size: of this process.
        where: () -> the phase of this rank and its place, see ``Heartbeat.where``; a new object for each phase.
        limits: of the patience.
        on_failure: called once with the rank that is to blame, on this thread.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        where: Callable[[], Mapping[str, Any]],
        limits: Limits,
        on_failure: Callable[[Failure], None],
    ) -> None:
        super().__init__(name="dualparal-watch", daemon=True)
        self._store, self._rank, self._where, self._limits, self._on_failure = store, rank, where, limits, on_failure
        now = time.monotonic()
        self._states = [RankState(r, heard=now, moved=now, phase="start") for r in range(world_size)]
        self._last: list[dict[str, Any]] = [{} for _ in range(world_size)]
        self._told: Mapping[str, Any] = {}
        self._moves = self._beats = 0
        self._listened_at = now
        self._over = threading.Event()

    def stop(self) -> None:
        """Says that the work of this rank is done, and listens no more."""
        self._over.set()
        self.join(_LAST_SECONDS)

    def run(self) -> None:
        try:
            while not self._over.wait(SECONDS):
                self._tell()
                self._hear()
                failure = blame(self._states, self._limits, time.monotonic())
                if failure is not None:
                    self._on_failure(failure)
                    return
            self._tell(done=True)
        except RuntimeError:
            return  # the store is gone, and with it whoever started the ranks: there is nobody to watch

    def _tell(self, **more: Any) -> None:
        where = self._where()
        self._moves += where is not self._told
        self._told = where
        self._beats += 1
        beat = {**where, "beat": self._beats, "moves": self._moves, **more}
        self._store.set(_key(self._rank), json.dumps(beat, default=str))

    def _hear(self) -> None:
        for state in self._states:
            if self._store.check([_key(state.rank)]):
                self._take(state, json.loads(self._store.get(_key(state.rank))))
        now = time.monotonic()
        away = now - self._listened_at - SECONDS
        if away > _AWAY_SECONDS:  # not the others' fault
            for state in self._states:
                state.heard, state.moved = min(now, state.heard + away), min(now, state.moved + away)
        self._listened_at = now

    def _take(self, state: RankState, beat: dict[str, Any]) -> None:
        """Counts by this rank's clock: the others' may be of another machine."""
        last, self._last[state.rank] = self._last[state.rank], beat
        if beat.get("moves") != last.get("moves") or beat.get("done"):
            state.take(beat, time.monotonic())
        elif beat.get("beat") != last.get("beat"):
            state.take({"tick": 1}, time.monotonic())


def _key(rank: int) -> str:
    return f"dualparal/watch/{rank}"
