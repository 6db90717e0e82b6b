"""An edge between cards on the late device: no order that streams and events permit gives other numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from late_device import LateDevice, recording
from late_edges import SIZE, exchange
from late_replay import Different, Program, races

_REMOTE = "dualparal.distributed.remote:"
_UNPAID = f"{_REMOTE}ReceiveEdge.release", "self._later.call(event, ", "self._later.call(None, "
MUTANTS = {
    "the reader waits for the transfer": [
        (f"{_REMOTE}ReceiveEdge.receive", "guard(self.name, message.work.wait)", "pass")
    ],
    "transfers have ended when the buffers go": [(f"{_REMOTE}SendEdge.finish", "self._wait(slot.works)", "pass")],
    "a tensor is sent when it is made": [
        (f"{_REMOTE}SendEdge.send", "self._later.call(event_on(self._device), ", "self._later.call(None, ")
    ],
    "a receive waits for the buffer's last reader, and a credit too": [
        (f"{_REMOTE}ReceiveEdge._post", "self._stream.wait_event(self._read[slot])", "pass"),
        _UNPAID,
    ],
}


def expected(messages: int) -> list[torch.Tensor]:
    number, made = torch.ones(SIZE), []
    for turn in range(messages):
        number = number * 1.5 + turn
        made.append(number * 2)
    return made


def findings(depth: int, messages: int, orders: int, changes: Sequence[tuple[str, str, str]] = ()) -> set[str]:
    late = LateDevice()
    with recording(late, ()):
        made = exchange(late, depth, messages, changes)
    found = set() if all(map(torch.equal, made, expected(messages))) else {"bits"}
    if races(late):
        found.add("race")
    program = Program(late)
    try:
        for seed in range(orders):
            program.run(seed)
    except Different:
        found.add("order")
    return found


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_order_gives_the_same_numbers(depth: int) -> None:
    assert findings(depth, 9, orders=60) == set()


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_found(name: str) -> None:
    assert findings(2, 9, orders=60, changes=MUTANTS[name]) == {"race", "order"}
