"""Ranks in virtual time: each walks its own actions of a real schedule, and talks to its parent by a real Heartbeat.

A task is a generator: it yields seconds, or a Gate that somebody opens. Edges between ranks are bounded, as those of a
run are; who decodes, and where, follows from the schedule.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable

from dualparal.launch.heartbeat import TICK_SECONDS, Heartbeat
from dualparal.schedule.actions import DECODE_BOUND, Action, Op
from virtual_links import END, Gate, PeerLost, Run, Task
from virtual_world import Process, World


class _Idle(Exception):
    """Nothing is left to listen to."""


class Rank:
    """One rank: its process, its heartbeat and its tasks.

    Attributes:
        stopped_until: nothing of it runs until then (SIGSTOP, or the GIL is held).
        lost: ranks that it knows to be gone.
        heeds: it hears the request to stop.
        speed: what its units cost, as a factor.
        now_what: tasks that faults have put before its next action, in order.
    """

    def __init__(self, run: Run, number: int, process: Process) -> None:
        self.run, self.number, self.process = run, number, process
        self.world: World = run.world
        self.gate = Gate()
        self.stopped_until = 0.0
        self.lost: set[int] = set()
        self.heeds, self.speed = True, 1.0
        self.now_what: list[Callable[[Rank], Task]] = []
        self.heartbeat = Heartbeat()
        self.done = False
        self.busy = 0.0
        self.actions = 0  # so far
        self.begun = 0  # actions of its stage
        self._served = False  # its decoder has nothing left to do
        self._early = False  # its walk ended before the schedule's end
        self._beat: Callable[[], object] | None = None
        self._said: deque[bytes | None] = deque()
        process.on_stop, process.on_orphaned = self._hear, lambda: self._hear(b"")
        process.on_end = lambda: run.tell_of_end(self)
        stage, self.place = divmod(number, run.places)
        self.stage = stage if stage < run.schedule.num_stages else None
        self.role = {"stage": stage} if self.stage is not None else {"decoder": number - run.stage_ranks}
        if run.places > 1 and self.stage is not None:
            self.role["place"] = self.place

    # Its threads ------------------------------------------------------------------------------------------------

    def spawn(self, task: Task, seconds: float = 0.0) -> None:
        self.world.after(seconds, lambda: self._step(task))

    def _step(self, task: Task) -> None:
        if not self.process.alive:
            return
        if self.world.now < self.stopped_until:
            if self.stopped_until < float("inf"):
                self.world.at(self.stopped_until, lambda: self._step(task))
            return
        try:
            wanted = next(task)
        except StopIteration:
            return
        except PeerLost as error:
            self.spawn(self._lose_peer(error))
            return
        if isinstance(wanted, Gate):
            wanted.waiting.append(lambda: self.world.after(0.0, lambda: self._step(task)))
        else:
            self.world.after(wanted, lambda: self._step(task))

    def _lose_peer(self, error: PeerLost) -> Task:
        yield from self.room()
        self.heartbeat.error(error, peer=True)
        if self.run.leaves_on_peer_error:
            yield 0.05
            self.process.end(3)

    def room(self) -> Task:
        """Waits until the pipe to the parent takes a line of any length."""
        while not self.process.pipe.room():
            yield 0.01

    def stop(self, seconds: float) -> None:
        """Stops all of its threads for a time."""
        self.stopped_until = max(self.stopped_until, self.world.now + seconds)
        if self.stopped_until < float("inf"):
            self.world.at(self.stopped_until, self._beat_once)

    # The line to its parent: the calls of launch.heartbeat.Pipes -------------------------------------------------

    def now(self) -> float:
        return self.world.now

    def sleep(self, seconds: float) -> None:
        raise AssertionError(f"rank {self.number} waits for room in its pipe where it should have some")

    def write(self, line: bytes) -> None:
        if self.run.parent_is_gone():
            raise BrokenPipeError
        self.process.pipe.write(line)

    def listen(self, seconds: float) -> bytes | None:
        if not self._said:
            raise _Idle
        return self._said.popleft()

    def beside(self, work: Callable[[], object]) -> None:
        self._beat = work
        self.world.after(TICK_SECONDS, self._tick)

    def die(self) -> None:
        self.process.helper = False  # its group goes with it
        self.process.end(-signal.SIGKILL)

    def _tick(self) -> None:
        self._beat_once()
        if self.process.alive:
            self.world.after(TICK_SECONDS, self._tick)

    def _beat_once(self) -> None:
        if self.world.now >= self.stopped_until:
            self._said.append(None)
            self._listen()

    def _hear(self, data: bytes) -> None:
        if self.heeds or not data:
            self._said.append(data)
            self._listen()

    def _listen(self) -> None:
        """Lets the thread of the heartbeat do what has come."""
        if not self.process.alive or self.world.now < self.stopped_until or self._beat is None:
            return
        try:
            self._beat()
        except (_Idle, SystemExit):
            self._said.clear()
        self.gate.open()

    def take_signal(self, number: int) -> None:
        """A signal that ends a run, sent to this process."""
        if self.process.alive and self.world.now >= self.stopped_until:
            if self.heartbeat.supervised:
                self.heartbeat.pass_on(number)
            else:
                self.process.end(-number)

    # Its work ---------------------------------------------------------------------------------------------------

    def main(self) -> Task:
        """Everything from the start of the process to its end."""
        yield self.world.rng.uniform(0.02, 0.1)
        self.heartbeat = Heartbeat(0, 0, pipes=lambda *_: self)
        for seconds in self.run.imports(self):
            self.stop(seconds)
            yield seconds + 0.01
        self.heartbeat.phase("start", **self.role)
        yield from self.before_action()
        yield self.world.rng.uniform(0.1, 0.5)
        self.run.ready.add(self.number)
        self.run.open_all()
        while len(self.run.ready) < self.run.world_size:
            yield self.gate
        work = self.decode() if self.stage is None else self.lead() if self.number == 0 else self.follow()
        yield from work
        yield from self.room()
        self.heartbeat.done()
        self.done = True
        yield from self.run.after_done(self)
        yield self.world.rng.uniform(0.0, 0.2)
        self.process.helper = False
        self.process.end(0)

    def before_action(self) -> Task:
        """Plays what faults have in store for this moment."""
        self.actions += 1
        self.run.count(self)
        if not self.process.alive or self.world.now < self.stopped_until:
            yield 0.0
        while self.now_what:
            yield from self.now_what.pop(0)(self)

    def say(self, action: Action) -> None:
        """Reports an action, as the engine does."""
        unit, more = action.unit, {"action": self.begun}
        self.begun += 1
        if action.op is Op.RUN and self.run.begins(self, unit):
            more |= {"iteration": self.run.schedule.iteration(unit), "busy": self.busy}
        name = {"recv": "wait_recv", "send": "wait_send"}.get(action.op.value, action.op.value)
        self.heartbeat.phase(name, **self.role, block=unit.block, step=unit.step, **more)

    def walk(self) -> Task:
        """The actions of its stage, until the run ends early."""
        run = self.run
        assert self.stage is not None
        for action in run.schedule.actions(self.stage):
            if self.number == 0 and action.op is Op.RUN and self.heartbeat.stop_requested.is_set():
                run.ends_early = True
                run.open_all()
            if action.op is Op.RUN and self.asked():
                self._early = True
                return
            self.say(action)
            yield from self.before_action()
            if action.op is Op.RECV:
                edge = run.edges[self.number, 0]
                yield from self.wait(lambda edge=edge: bool(edge.arrived), edge.sender)
                found = edge.arrived.popleft()
                if found is END:
                    self._early = True
                    return
                assert found == action.unit, f"{found} in place of {action.unit}"
                if self.stage == 0:
                    run.release(edge)
            elif action.op is Op.RUN:
                if run.places > 1:
                    run.meet(self, action.unit)
                    for peer in run.team(self):
                        yield from self.wait(
                            lambda peer=peer, unit=action.unit: run.met(peer, unit) or self.asked(), peer
                        )
                    if self.asked():
                        self._early = True
                        return
                seconds = run.unit_seconds * self.speed * self.world.rng.uniform(0.95, 1.05)
                yield seconds
                self.busy += seconds
                if self.stage:
                    run.release(run.edges[self.number, 0])
            elif action.op is Op.SEND:
                edge = run.edges[self.number, 1]
                yield from self.wait(lambda edge=edge: edge.used < edge.depth, edge.receiver)
                run.send(edge, action.unit)
            elif self.number == 0:
                yield from self.lead_action(action)
            if self.number == 0:
                yield from self.commit()

    def wait(self, there: Callable[[], bool], peer: int, timed: bool = True) -> Task:
        """Waits for something of a peer. Raises PeerLost."""
        patient_until = self.world.now + self.run.transport_seconds
        if timed and patient_until < float("inf") and not there():
            self.world.at(patient_until, self.gate.open)
        while not there():
            if peer in self.lost:
                raise PeerLost(f"rank {peer} closed the connection")
            if timed and self.world.now >= patient_until:
                raise PeerLost(f"rank {peer} did not answer in time")
            yield self.gate

    def asked(self) -> bool:
        """True when its stage is to end early."""
        return self.stage == 0 and self.run.ends_early

    def follow(self) -> Task:
        """The work of a stage, or of a place in one."""
        yield from self.walk()
        yield from self.close_ring()
        if self.number in self.run.boxes:
            self.heartbeat.phase("wait_end", **self.role)
        while self.number in self.run.boxes and not self._served:
            yield self.gate

    def close_ring(self) -> Task:
        """Sends the end round: stage 0 takes what is on its way until it is back, others pass it on."""
        if self._early and self.run.schedule.num_stages > 1:
            self.run.send(self.run.edges[self.number, 1], END)
            edge = self.run.edges[self.number, 0]
            while self.stage == 0:
                yield from self.wait(lambda: bool(edge.arrived), edge.sender)
                if edge.arrived.popleft() is END:
                    return
                self.run.release(edge)

    def lead(self) -> Task:
        """The work of rank 0: stage 0, and what becomes of finished blocks."""
        run = self.run
        yield from self.walk()
        yield from self.close_ring()
        if run.schedule.decode:
            while len(run.committed) < len(run.handed):
                self.heartbeat.phase("wait_decoder", **self.role)
                yield from self.wait_for_blocks(len(run.handed))
        for box in run.boxes.values():
            box.append(END)
        run.open_all()
        self.heartbeat.phase("write")
        yield from self.before_action()
        yield self.world.rng.uniform(0.0, 0.3)

    def lead_action(self, action: Action) -> Task:
        run, unit = self.run, action.unit
        if action.op is Op.UPDATE:
            yield 0.001
        elif action.op is Op.EMIT and not run.schedule.decode:
            run.finished[unit.block] = 0
        elif action.op is Op.DECODE:
            self.heartbeat.phase("wait_decoder", **self.role, block=unit.block)
            yield from self.wait_for_blocks(len(run.handed) - DECODE_BOUND + 1)
            run.handed.append(unit.block)
            run.finished[unit.block] = len(run.schedule.decoders)
            for box in run.boxes.values():
                box.append(unit)
            run.open_all()

    def wait_for_blocks(self, number: int) -> Task:
        """Waits until so many blocks are decoded, and commits them."""
        ranks = [run_rank for run_rank in self.run.boxes if run_rank]
        while len(self.run.committed) < number:
            yield from self.commit()
            if len(self.run.committed) < number:
                if lost := [rank for rank in ranks if rank in self.lost]:
                    raise PeerLost(f"rank {lost[0]} closed the connection")
                yield self.gate

    def commit(self) -> Task:
        """Tells of blocks that are finished and on disk, in order."""
        run = self.run
        while run.finished.get(len(run.committed)) == 0:
            block, before = len(run.committed), self.process.pipe.told
            self.heartbeat.message(progress={"block": block}, committed=block)
            run.committed.append((self.world.now, self.process.pipe.told > before))
            yield from self.before_action()

    def decode(self) -> Task:
        """Decodes blocks: all that a rank of this kind does, or beside a stage."""
        alone, box = self.stage is None, self.run.boxes[self.number]
        while True:
            if alone:
                self.heartbeat.phase("wait_latents", **self.role)
                yield from self.wait(lambda: bool(box), 0, timed=False)
            while not box:
                yield self.gate
            unit = box.popleft()
            if unit is END:
                self._served = True
                self.gate.open()
                return
            if alone:
                self.heartbeat.phase("decode", **self.role, block=unit.block)
                yield from self.before_action()
            yield self.run.decode_seconds * self.world.rng.uniform(0.8, 1.2)
            self.run.finished[unit.block] -= 1
            self.run.ranks[0].gate.open()


def add_rank(run: Run, process: Process) -> Rank:
    """Starts the rank of a process."""
    rank = run.ranks[process.pid] = Rank(run, process.pid, process)
    rank.spawn(rank.main())
    if rank.number in run.boxes and rank.stage is not None:
        rank.spawn(rank.decode())
    return rank
