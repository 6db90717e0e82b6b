"""What lies between the ranks of a virtual run: bounded edges, boxes of who decodes, teams, and the word of an end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dualparal.schedule.actions import Unit
from dualparal.schedule.schedule import Schedule
from virtual_world import World

if TYPE_CHECKING:
    from virtual_ranks import Rank

Task = Iterator["float | Gate"]
END = None  # a message: no more units come


class Gate:
    """Tasks that wait for something; when it opens, all of them look again."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], object]] = []

    def open(self) -> None:
        waiting, self.waiting = self.waiting, []
        for go_on in waiting:
            go_on()


class PeerLost(Exception):
    """The rank at the other end of a wait is gone."""


@dataclass
class Edge:
    """Messages from one rank to another, of which the receiver holds ``depth``."""

    sender: int
    receiver: int
    depth: int
    used: int = 0
    wire: float = 0.0  # when it is free
    arrived: deque[Unit | None] = field(default_factory=deque)
    dead: bool = False  # it loses all that is sent from now on


class Run:
    """All ranks of a run, and what lies between them.

    Args:
        places: ranks of each stage.

    Attributes:
        transport_seconds: after them a rank gives up a wait; infinite: never.
        hears_after: seconds until a rank knows that a peer is gone; None: no transport says so.
        committed: by block, when rank 0 told of it, and whether the line went into its pipe.
    """

    def __init__(self, world: World, schedule: Schedule, places: int) -> None:
        self.world, self.schedule, self.places = world, schedule, places
        self.stage_ranks = schedule.num_stages * places
        self.world_size = self.stage_ranks + schedule.decode_ranks
        self.ranks: dict[int, Rank] = {}
        self.ready: set[int] = set()
        self.ends_early = False
        self.unit_seconds, self.decode_seconds = 0.1, 0.2
        self.transport_seconds, self.hears_after = float("inf"), None
        self.leaves_on_peer_error = True
        self.parent_is_gone: Callable[[], bool] = lambda: False
        self.imports: Callable[[Rank], list[float]] = lambda rank: []
        self.count: Callable[[Rank], object] = lambda rank: None
        self.lost_message: Callable[[Edge, Unit | None], object] = lambda edge, unit: None
        self.after_done: Callable[[Rank], Task] = lambda rank: iter(())
        self.committed: list[tuple[float, bool]] = []
        self.finished: dict[int, int] = {}  # block -> parts that are not decoded yet
        self.handed: list[int] = []
        self._iterations: dict[int, int] = {}
        self._met: dict[int, Unit] = {}
        self._order = {unit: index for index, unit in enumerate(schedule.units())}
        self.edges: dict[tuple[int, int], Edge] = {}  # (rank, 0): to it; (rank, 1): from it
        for sender in range(self.stage_ranks if schedule.num_stages > 1 else 0):
            edge = Edge(sender, (sender + places) % self.stage_ranks, schedule.depth)
            self.edges[sender, 1] = self.edges[edge.receiver, 0] = edge
        self.boxes: dict[int, deque[Unit | None]] = {self.rank_of(place): deque() for place in schedule.decoders}

    def rank_of(self, place: int) -> int:
        n = self.schedule.num_stages
        return place * self.places if place < n else self.stage_ranks + place - n

    def open_all(self) -> None:
        for rank in self.ranks.values():
            rank.gate.open()

    def begins(self, rank: Rank, unit: Unit) -> bool:
        """True when it is the rank's first unit of its iteration."""
        now = self.schedule.iteration(unit)
        before = self._iterations.get(rank.number, -1)
        self._iterations[rank.number] = max(before, now)
        return now > before

    def team(self, rank: Rank) -> list[int]:
        """The other ranks of its stage."""
        first = rank.number - rank.place
        return [number for number in range(first, first + self.places) if number != rank.number]

    def meet(self, rank: Rank, unit: Unit) -> None:
        self._met[rank.number] = unit
        for number in self.team(rank):
            self.ranks[number].gate.open()

    def met(self, number: int, unit: Unit) -> bool:
        """True when a rank has come to the unit, or beyond."""
        return number in self._met and self._order[self._met[number]] >= self._order[unit]

    def send(self, edge: Edge, unit: Unit | None) -> None:
        """Carries a message, after those before it; what is lost still holds its buffer."""
        edge.used += 1
        if edge.dead:
            self.lost_message(edge, unit)
            return
        edge.wire = max(edge.wire, self.world.now) + self.world.rng.uniform(0.0005, 0.02)
        self.world.at(edge.wire, lambda: self._arrive(edge, unit))

    def _arrive(self, edge: Edge, unit: Unit | None) -> None:
        edge.arrived.append(unit)
        self.ranks[edge.receiver].gate.open()

    def release(self, edge: Edge) -> None:
        edge.used -= 1
        self.ranks[edge.sender].gate.open()

    def tell_of_end(self, gone: Rank) -> None:
        """Lets the transports of the others notice."""
        if self.hears_after is None or (gone.done and gone.process.code == 0):
            return
        for rank in self.ranks.values():
            if rank is not gone:
                self.world.after(self.hears_after, lambda rank=rank: self._lose(rank, gone.number))

    def _lose(self, rank: Rank, gone: int) -> None:
        rank.lost.add(gone)
        rank.gate.open()
