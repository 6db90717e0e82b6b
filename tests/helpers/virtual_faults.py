"""A seed as a scenario: the schedule of a run, the weather, and the faults that are put into it, with their effects."""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualparal.launch.heartbeat import STOP_SIGNALS
from dualparal.launch.stragglers import SlowStages
from dualparal.launch.supervisor import Kept, Result, Supervisor
from dualparal.schedule.schedule import Schedule
from virtual_effects import FOREVER, LIMITS, START, Effect
from virtual_habits import plan_habits
from virtual_links import Edge, Gate, Run, Task
from virtual_ranks import Rank, add_rank
from virtual_world import ParentKilled, Process, VirtualMachine, World

DEATHS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)


class Scenario:
    """Everything that a seed decides. ``play`` runs it.

    Attributes:
        effects: what came true, in order. steps: seconds of clock steps.
        signals: accepted by the parent, with their times; told: sent to ranks, likewise.
        heard: the last block that the parent heard of; kept: what it heard when it named a failure.
    """

    def __init__(self, seed: int, error_path: Path | None = None) -> None:
        self.rng = rng = random.Random(seed)
        self.world = world = World(rng)
        places = rng.choice((1, 1, 1, 2))
        self.run = run = Run(world, self._schedule(), places)
        cost = rng.choice((1e-5, 1e-5, 1e-5, 4e-3))
        self.capacity = rng.choice((65536, 65536, 65536, 8192))
        self.machine = VirtualMachine(world, self._make, cost)
        self.effects: list[Effect] = []
        self.signals: list[tuple[float, signal.Signals]] = []
        self.told: list[tuple[float, int, signal.Signals]] = []
        self.steps = 0.0
        self.heard: int | None = None
        self.kept: int | None = None
        self.lingers = False
        self.slow_stage: int | None = None
        self.stragglers = SlowStages(run.schedule.num_stages, places)
        run.unit_seconds = rng.uniform(0.03, 0.12)
        run.decode_seconds = rng.uniform(0.02, 0.4)
        run.hears_after = rng.choice((None, rng.uniform(0.005, 0.3), rng.uniform(0.005, 0.3)))
        run.leaves_on_peer_error = rng.random() < 0.8
        run.parent_is_gone = lambda: self.machine.killed
        run.imports, run.count, run.after_done = self._imports, self._count, self._after_done
        run.lost_message = self._lost_message
        self._at_action: dict[tuple[int, int], list[Callable[[], object]]] = {}
        self._at_end: dict[int, list[Callable[[Rank], Task]]] = {}
        self._slow_start = {rank for rank in range(run.world_size) if rng.random() < 0.15}
        self.length = 1.5 + (run.schedule.num_units or 0) * run.unit_seconds * 1.5
        self.machine.ends_by = START + 400.0
        self.supervisor = Supervisor(
            ["rank"], run.world_size, limits=LIMITS, on_message=self._hear, kept=self._keep, machine=self.machine,
            error_path=error_path,
        )  # fmt: skip
        self._plan()
        plan_habits(self, seed)

    def _schedule(self) -> Schedule:
        rng = self.rng
        stages, decoding = rng.choice((1, 2, 2, 3, 3, 4)), rng.choice(("none", "beside", "beside", "ranks", "place"))
        return Schedule(
            num_stages=stages,
            num_steps=rng.randint(1, 3),
            num_blocks=rng.randint(1, 4),
            context=rng.choice(("cached", "paper", "prior")),
            context_frames=rng.choice((0, 2)),
            guidance=rng.random() < 0.5,
            decode=decoding != "none",
            depth=rng.randint(1, 3),
            max_blocks_in_flight=rng.choice((None, 1, 2)),
            decode_ranks=rng.randint(1, 2) if decoding == "ranks" else 0,
            decode_in_place=decoding == "place",
        )

    def _make(self, number: int) -> Process:
        process = Process(self.world, number, self.capacity)
        process.helper = self.rng.random() < 0.3
        rank = add_rank(self.run, process)
        rank.speed = 3.0 if rank.stage is not None and rank.stage == self.slow_stage else 1.0
        return process

    def _imports(self, rank: Rank) -> list[float]:
        """Seconds for each of which imports hold the GIL."""
        pieces = [self.rng.uniform(0.01, 0.2)]
        if rank.number in self._slow_start:
            pieces.append(self.rng.uniform(2.0, 0.7 * LIMITS.startup))
        return pieces

    # The plan -----------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        rng = self.rng
        if rng.random() < 0.06:
            self._slow_stage()
            return
        if rng.random() < 0.06:
            self._impatient_transport()
            return
        for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 2, 3))):
            kind = rng.choice(FAULTS)
            number = rng.randrange(self.run.world_size)
            getattr(self, f"_{kind}")(number)
        if rng.random() < 0.25:
            self._signals()
        for weather, chance in ((self._pause, 0.1), (self._suspend, 0.1), (self._kill_parent, 0.04)):
            if rng.random() < chance:
                self.world.at(self._some_time(), weather)

    def _some_time(self) -> float:
        return START + self.rng.uniform(0.0, 1.2 * self.length)

    def _somewhere(self, number: int, do: Callable[[Rank], object]) -> None:
        """Does something to a rank: at some time, or at one of its actions."""

        def act() -> None:
            rank = self.run.ranks.get(number)
            if rank is not None and rank.process.alive and not rank.process.killed_by_parent:
                do(rank)

        if self.rng.random() < 0.5:
            self.world.at(self._some_time(), act)
        else:
            self._at_action.setdefault((number, self.rng.randint(1, 40)), []).append(act)

    def _count(self, rank: Rank) -> None:
        for act in self._at_action.pop((rank.number, rank.actions), []):
            act()

    def _took(self, kind: str, rank: Rank, value: Any = None, exit_code: int | None = None) -> None:
        told = [e for e in self.effects if e.rank == rank.number and e.kind in ("error", "glitch")]
        phase = rank.heartbeat.where.get("phase")
        self.effects.append(
            Effect(
                kind, rank.number, self.world.now, value, rank.process.alive and not rank.done and not told,
                phase is None or phase.startswith("start"), phase is not None and phase.startswith("wait"), exit_code,
            )
        )  # fmt: skip
        self.world.note(f"rank {rank.number}: {kind} {'' if value is None else value} in {phase}")

    # Faults: each puts one into the plan ----------------------------------------------------------------------------

    def _kill(self, number: int) -> None:
        death = self.rng.choice(DEATHS)

        def act(rank: Rank) -> None:
            self._took("kill", rank, death)
            rank.process.end(-death)

        self._somewhere(number, act)

    def _exit(self, number: int) -> None:
        code = self.rng.choice((0, 1, 7))

        def act(rank: Rank) -> None:
            if rank.done:
                return
            self._took("exit", rank, code)
            rank.process.helper = False
            rank.process.end(code)

        self._somewhere(number, act)

    def _next(self, number: int, task: Callable[[Rank], Task]) -> None:
        self._somewhere(number, lambda rank: rank.now_what.append(task))

    def _error(self, number: int) -> None:
        code, after = self.rng.choice((None, None, 2, 6)), self.rng.choice(("leaves", "stays", "dies", "dies"))
        text = f"RuntimeError: fault {self.rng.randrange(1000)}"

        def task(rank: Rank) -> Task:
            yield from rank.room()
            self._took("error", rank, text, code)
            rank.heartbeat.error(text, exit_code=code)
            if self.rng.random() < 0.5:
                yield 0.01
                yield from rank.room()
                rank.heartbeat.error("RuntimeError: cleaning up failed")
            yield 0.05
            if after != "stays":
                rank.process.end(3 if after == "leaves" else -signal.SIGSEGV)
            while True:
                yield Gate()

        self._next(number, task)

    def _explained(self, number: int) -> None:
        """A rank dies, and another's own error, which it does not take for a lost peer, comes out first."""
        other = self.rng.randrange(self.run.world_size)
        death = self.rng.choice(DEATHS[:4])

        def act(rank: Rank) -> None:
            found = self.run.ranks.get(other)
            if (
                found is None
                or other == number
                or found.done
                or not found.process.alive
                or not found.process.pipe.room()
            ):
                return
            self._took("error", found, "RuntimeError: short read")
            found.heartbeat.error("RuntimeError: short read")

            def die() -> None:
                if rank.process.alive:
                    self._took("kill", rank, death)
                    rank.process.end(-death)

            self.world.after(self.rng.uniform(0.0, 0.06), die)

        self._somewhere(number, act)

    def _hang(self, number: int) -> None:
        def task(rank: Rank) -> Task:
            self._took("hang", rank)
            while True:
                yield Gate()

        self._next(number, task)

    def _slow(self, number: int) -> None:
        seconds = self.rng.choice((self.rng.uniform(0.5, 3.0), self.rng.uniform(2.7, 5.0), LIMITS.progress + 3.0))

        def task(rank: Rank) -> Task:
            self._took("slow", rank, seconds)
            yield seconds

        self._next(number, task)

    def _drop(self, number: int) -> None:
        def act(rank: Rank) -> None:
            if (edge := self.run.edges.get((number, 1))) is not None:
                edge.dead = True

        self._somewhere(number, act)

    def _lost_message(self, edge: Edge, unit: object) -> None:
        self._took("drop", self.run.ranks[edge.receiver])

    def _stop(self, number: int) -> None:
        seconds = self.rng.choice((self.rng.uniform(0.2, 1.8), FOREVER, LIMITS.startup + 2.0))

        def act(rank: Rank) -> None:
            self._took("stop", rank, seconds)
            rank.stop(seconds)

        self._somewhere(number, act)

    def _mute(self, number: int) -> None:
        seconds = self.rng.choice((self.rng.uniform(0.2, 1.8), LIMITS.startup + 2.0))

        def act(rank: Rank) -> None:
            self._took("mute", rank, seconds)
            rank.process.pipe.hold(seconds)

        self._somewhere(number, act)

    def _glitch(self, number: int) -> None:
        def task(rank: Rank) -> Task:
            yield from rank.room()
            self._took("glitch", rank)
            rank.heartbeat.error("a connection broke", peer=True)
            while True:
                yield Gate()

        self._next(number, task)

    def _late(self, number: int) -> None:
        """Something after the rank has said that its work is done."""
        kind = self.rng.choice(("linger", "exit", "kill", "error"))

        def task(rank: Rank) -> Task:
            yield self.rng.uniform(0.0, 0.3)
            if kind == "linger":
                self.lingers = True
                self.world.note(f"rank {number} lingers")
                while True:
                    yield Gate()
            yield from rank.room()
            self._took(f"late_{kind}", rank, {"exit": 9, "kill": -signal.SIGSEGV, "error": "close failed"}[kind])
            if kind == "error":
                rank.heartbeat.error("close failed")
            rank.process.end({"exit": 9, "kill": -signal.SIGSEGV, "error": 3}[kind])

        self._at_end.setdefault(number, []).append(task)

    def _after_done(self, rank: Rank) -> Task:
        for task in self._at_end.get(rank.number, []):
            yield from task(rank)

    def _slow_stage(self) -> None:
        """One stage is slow from beginning to end, which is no fault: a warning names it."""
        if self.run.schedule.num_stages > 1 and self.run.places == 1:
            self.slow_stage = self.rng.randrange(self.run.schedule.num_stages)
            self.run.unit_seconds = 0.12

    def _impatient_transport(self) -> None:
        """Somebody stops, and a transport gives up before the limits do."""
        self._slow_start.clear()
        self.run.transport_seconds = 1.2 + self.run.unit_seconds
        self.run.decode_seconds = 0.02
        number = self.rng.randrange(self.run.stage_ranks)

        def act() -> None:
            rank = self.run.ranks[number]
            if rank.process.alive and not rank.heartbeat.starting:
                self._took("stop", rank, FOREVER)
                rank.stop(FOREVER)

        self._at_action[number, self.rng.randint(2, 20)] = [act]

    # Weather ------------------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        self.machine.pause(self.rng.choice((0.5, 3.0, 9.0)))

    def _suspend(self) -> None:
        seconds = self.rng.choice((0.5, 3.0, 30.0))
        self.steps += seconds
        self.machine.ends_by += seconds
        self.world.step_clock(seconds)
        for rank in self.run.ranks.values():
            rank.stopped_until += seconds
            rank.process.step_clock(seconds)
        for (_, outgoing), edge in self.run.edges.items():
            edge.wire += seconds if outgoing else 0.0

    def _kill_parent(self) -> None:
        self.machine.kill()

    def _signals(self) -> None:
        """Signals that end a run: to the parent, to the ranks, or to all; sometimes twice; sometimes not heeded."""
        number, to = self.rng.choice(STOP_SIGNALS), self.rng.choice(("parent", "parent", "ranks", "all"))
        deaf, twice = self.rng.random() < 0.25, self.rng.random() < 0.4

        def parent() -> None:
            if self.machine.signal(number):
                self.signals.append((self.world.now, number))

        def act() -> None:
            if deaf and 0 in self.run.ranks:
                self.run.ranks[0].heeds = False
            if to != "ranks":
                parent()
            for rank in self.run.ranks.values() if to != "parent" else ():
                if rank.process.alive and rank.process.pipe.room() and self.world.now >= rank.stopped_until:
                    self.told.append((self.world.now, rank.number, number))
                    if not rank.heartbeat.supervised:
                        self._took("kill", rank, number)
                    rank.take_signal(number)

        when = self._some_time()
        self.world.at(when, act)
        if twice and to == "parent":
            self.world.at(when + self.rng.uniform(0.1, 1.5), parent)

    # The parent ---------------------------------------------------------------------------------------------------

    def _hear(self, rank: int, message: dict[str, Any]) -> None:
        """Does what ``cli.leader`` does."""
        if "committed" in message:
            self.heard = message["committed"]
        if "busy" in message:
            self.stragglers.note(rank, message["iteration"], message["busy"])

    def _keep(self) -> Kept:
        self.kept = self.heard
        return Kept(self.heard)

    def play(self) -> Result | None:
        """Runs the scenario to its end; None: the parent was killed."""
        level, logger = logging.getLogger("dualparal").level, logging.getLogger("dualparal")
        logger.setLevel(logging.CRITICAL + 1)
        try:
            return self.supervisor.run()
        except ParentKilled:
            self.world.advance(self.world.now + 1.0)
            return None
        finally:
            logger.setLevel(level)


FAULTS = (
    *("kill", "kill", "kill", "exit", "error", "error", "explained", "hang", "slow", "slow", "drop", "stop", "stop"),
    *("mute", "glitch", "late", "late"),
)
