"""The JSON that ranks exchange through a store: their configuration before a run, what it cost afterwards.

A difference found before the first tensor moves is one sentence; found later it is a hang or a wrong picture. It
works on any store with torch.distributed's `set`, `get` and `check`, and need not know what the fields mean. No
collective is used: gloo runs those in threads of its own, and such a thread that lets go of the last reference to a
tensor while Python ends aborts the process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

_POLL_SECONDS = 0.01
_SLOW_POLL_SECONDS = 0.1
# A rank that found a difference stays for this long, so that the others can read it too: it may host the store.
_LINGER_SECONDS = 2.0
_ABSENT = "absent"


class Store(Protocol):
    """The part of torch.distributed.Store that is used."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


def handshake(store: Store, rank: int, world_size: int, info: Mapping[str, Any], timeout: float = 30.0) -> None:
    """Returns once every rank has published the same `info`; all ranks call it, once per store.

    Args:
        store: where the ranks meet. For a second handshake on one store, wrap it in a PrefixStore.
        rank: this rank.
        world_size: the number of ranks that this rank expects; compared like a field.
        info: JSON values, nested as you like.
        timeout: seconds to wait for the slowest rank.

    Raises:
        ValueError: the ranks disagree; names every field and its value on each rank, in the same words.
        TimeoutError: a rank did not report in time; names it.
    """
    store.set(_key("info", rank), json.dumps({"world_size": world_size, **info}, sort_keys=True))
    reports = _collect(store, world_size, timeout)
    differences = _differences(reports)
    if not differences:
        return
    store.set(_key("read", rank), "1")
    wait_for(store, [_key("read", r) for r in reports], min(timeout, _LINGER_SECONDS))
    raise ValueError("ranks disagree: " + "; ".join(differences))


def gather(
    store: Store, rank: int, world_size: int, value: Any, timeout: float = 30.0, patience: float = 1800.0
) -> list[Any] | None:
    """The JSON value of every rank, on rank 0; None on the others, which leave when rank 0 has come. Once per store.

    Args:
        store, rank, world_size: as in ``handshake``.
        value: this rank's.
        timeout: seconds that rank 0 waits for the slowest rank.
        patience: seconds that the others wait for rank 0, whose consumer may take its time.

    Raises:
        TimeoutError: a rank did not report in time; names it.
    """
    store.set(_key("value", rank), json.dumps(value))
    expected = range(world_size) if rank == 0 else range(1)
    keys = {r: _key("value", r) for r in expected}
    limit = timeout if rank == 0 else patience
    if not wait_for(store, list(keys.values()), limit):
        missing = [r for r, key in keys.items() if not store.check([key])]
        raise TimeoutError(f"rank(s) {missing} did not come to the end of the run within {limit:g} s")
    return [json.loads(store.get(key)) for key in keys.values()] if rank == 0 else None


def _key(kind: str, rank: int) -> str:
    return f"dualparal/handshake/{kind}/{rank}"


def _collect(store: Store, world_size: int, timeout: float) -> dict[int, dict[str, Any]]:
    """Waits for the report of every rank, and returns them by rank. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    reports: dict[int, dict[str, Any]] = {}
    expected = world_size
    while True:
        for r in range(expected):
            if r not in reports and store.check([_key("info", r)]):
                reports[r] = json.loads(store.get(_key("info", r)))
        # Where the ranks disagree on their number, only those of the smallest count are sure to exist.
        expected = min([expected, *(report["world_size"] for report in reports.values())])
        missing = [r for r in range(expected) if r not in reports]
        if not missing:
            return {r: reports[r] for r in range(expected)}
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank(s) {missing} did not report within {timeout:g} s")
        time.sleep(_POLL_SECONDS)


def wait_for(store: Store, keys: list[str], timeout: float) -> bool:
    """Waits until all keys are there; returns False when they are not within ``timeout`` seconds."""
    begin = time.monotonic()
    while not store.check(keys):
        waited = time.monotonic() - begin
        if waited > timeout:
            return False
        time.sleep(_POLL_SECONDS if waited < 1.0 else _SLOW_POLL_SECONDS)
    return True


def _differences(reports: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """A text for each field in which the ranks differ."""
    flat = {r: dict(_flatten(report)) for r, report in reports.items()}
    names = sorted({name for fields in flat.values() for name in fields})
    by_name = {name: {r: fields.get(name, _ABSENT) for r, fields in flat.items()} for name in names}
    return [f"{name}: {_values(values)}" for name, values in by_name.items() if len(set(values.values())) > 1]


def _flatten(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Leaves of nested objects as ("args.height", "480"); a list is one leaf."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flatten(item, f"{path}.{name}" if path else name)
    else:
        yield path, json.dumps(value, sort_keys=True)


def _values(by_rank: Mapping[int, str]) -> str:
    """'rank 0, 2 = "2.13.0", rank 1 = "2.12.1"': ranks that agree share one entry."""
    ranks: dict[str, list[int]] = {}
    for r, value in sorted(by_rank.items()):
        ranks.setdefault(value, []).append(r)
    return ", ".join(f"rank {', '.join(map(str, group))} = {value}" for value, group in ranks.items())
