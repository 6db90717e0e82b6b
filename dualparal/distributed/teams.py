"""The ranks that share a stage: their communicators, and on stage 0 the words of its first rank to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dualparal.distributed.messages import guard
from dualparal.distributed.parcels import PATIENCE
from dualparal.distributed.private import host_backend
from dualparal.distributed.rows import RankRows

STOP = -1  # in place of a prompt's number: no more units come


class TeamGroups(NamedTuple):
    """The communicators of the ranks of a stage.

    Attributes:
        control: between CPUs, for words.
        data: for tensors; on the CPU the same one.
    """

    control: Any
    data: Any


class Team:
    """The ranks of a stage as one of them sees it.

    Args:
        groups: the stage's own communicators.
        ranks: of the stage, by place.
        place: this rank's.
        stage: number of the stage, for error messages.

    Attributes:
        exchange: the way of tensors to the others.
    """

    def __init__(self, groups: TeamGroups, ranks: Sequence[int], place: int, stage: int) -> None:
        self.exchange = RankRows(groups.data, ranks, place, f"stage {stage}, place")
        self._control, self._ranks, self._place = groups.control, ranks, place
        self._name = f"stage {stage}, place {place}"
        self._said: list[tuple[Any, torch.Tensor]] = []

    @property
    def leads(self) -> bool:
        """True on the first place."""
        return self._place == 0

    def tell(self, word: int) -> None:
        """Tells all other places a number; called on the first. Raises PeerLost."""
        self.finish()
        for rank in self._ranks[1:]:
            said = torch.tensor([word])
            self._said.append((guard(self._name, dist.isend, said, rank, group=self._control), said))

    def hear(self) -> int:
        """The next number that the first place tells. Raises PeerLost."""
        heard = torch.zeros(1, dtype=torch.int64)
        guard(self._name, guard(self._name, dist.irecv, heard, self._ranks[0], group=self._control).wait, PATIENCE)
        return int(heard.item())

    def finish(self) -> None:
        """Waits until what was told has left. Raises PeerLost."""
        for work, _ in self._said:
            guard(self._name, work.wait, PATIENCE)
        self._said.clear()


def make_team_groups(num_stages: int, places: int, device: torch.device) -> list[TeamGroups]:
    """The communicators of every stage's ranks; none where a stage has one. Collective: all ranks of the run call it.

    Args:
        num_stages: stages of the run, N.
        places: ranks of each, P.
        device: this rank's, whose type is that of all.
    """
    found = []
    for stage in range(num_stages if places > 1 else 0):
        ranks = list(range(stage * places, (stage + 1) * places))
        control = dist.new_group(ranks, backend=host_backend(), timeout=PATIENCE)
        data = dist.new_group(ranks, backend="nccl", timeout=PATIENCE) if device.type == "cuda" else control
        found.append(TeamGroups(control, data))
    return found
