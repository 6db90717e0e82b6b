"""The promises of a supervised run, held against what a scenario really did."""

from __future__ import annotations

import json
import signal
import tempfile
from pathlib import Path

from dualparal.launch.blame import Failure
from dualparal.launch.exit_codes import BAD_INPUT, NO_PROGRESS, RANK_FAILED
from dualparal.launch.heartbeat import TICK_SECONDS
from dualparal.launch.supervisor import Result
from virtual_effects import FOREVER, LIMITS, START, Broken, Effect
from virtual_faults import Scenario
from virtual_world import Hang

KILLED, OWN, EARLY, SILENT, STALLED, PEER = range(6)  # what beats what


_OLD = "of an earlier run"


def check(seed: int) -> Scenario:
    """Plays a seed and judges it; a sixteenth of them with an error.json. Raises Broken, with the log of events."""
    if seed % 16 != 5:
        return _check(seed, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.error.json"
        path.write_text(_OLD, encoding="utf-8")
        return _check(seed, path)


def _check(seed: int, error_path: Path | None) -> Scenario:
    scenario = Scenario(seed, error_path)
    try:
        try:
            result = scenario.play()
            Judge(scenario, result).judge()
            if error_path is not None:
                check_told(error_path, result)
        except Hang as error:
            raise Broken(str(error)) from None
        except Broken:
            raise
        except Exception as error:
            raise Broken(f"{type(error).__name__}: {error}") from error
    except Broken as error:
        log = "\n".join(f"{at:9.3f}  {text}" for at, text in scenario.world.log)
        raise Broken(f"seed {seed}: {error}\n{scenario.run.schedule}\nplaces={scenario.run.places}\n{log}") from error
    return scenario


def check_told(path: Path, result: Result | None) -> None:
    """Checks that an error.json is of this run's failure. Raises Broken."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text == _OLD:
        raise Broken("the error.json of an earlier run is still there")
    failure = None if result is None else result.failure
    told = failure is not None and failure.exit_code != BAD_INPUT
    if result is not None and bool(text) != told:
        raise Broken(f"an error.json: {text or 'none'}, for {failure}")
    if told and failure is not None and json.loads(text)["cause"] != failure.cause:
        raise Broken(f"an error.json of another failure: {text}")


class Judge:
    """Judges one run; ``at`` is the time at which the supervisor looked last before its verdict."""

    def __init__(self, scenario: Scenario, result: Result | None) -> None:
        self.scenario, self.result = scenario, result
        self.at: float = scenario.supervisor._listened_at
        self.until = min(scenario.machine.decided_at, scenario.world.now)
        self.away = scenario.machine.away + scenario.steps
        # Rounds, exit codes that are seen late, and the parent's own time for its calls.
        self.slack = 0.35
        self.stopping_at = min([at for at, _ in scenario.signals] + [at for at, *_ in scenario.told] + [FOREVER])

    def judge(self) -> None:
        self.no_orphan()
        if self.result is None:
            return
        self.no_wrong_blame(self.result)
        self.nothing_untold(self.result)
        self.interrupted(self.result)
        self.asked_to_stop(self.result)
        self.in_time()
        self.no_lost_block(self.result)
        self.stragglers(self.result)

    def no_orphan(self) -> None:
        for rank in self.scenario.run.ranks.values():
            # Of one that is stopped when its parent is killed the kernel takes care (PDEATHSIG): not simulated.
            if rank.process.alive and not (self.result is None and rank.stopped_until > self.scenario.world.now - 0.1):
                raise Broken(f"rank {rank.number} lives on")
            if self.result is not None and rank.process.helper:
                raise Broken(f"what rank {rank.number} started lives on")

    # Blame --------------------------------------------------------------------------------------------------------

    def rank_of(self, effect: Effect) -> int | None:
        """The place of an effect among those that end a run, or None: it does not."""
        kind, value = effect.kind, effect.value
        if kind == "late_exit":
            return EARLY
        if kind == "late_error":
            return OWN
        if not effect.active:
            return None
        if kind == "kill":
            return OWN if value == signal.SIGABRT else KILLED
        if kind == "error":
            return OWN
        if kind == "exit":
            return EARLY
        if kind in ("stop", "mute"):
            return SILENT
        if kind in ("hang", "drop") or (
            kind == "slow" and (self.slow_for(effect) > LIMITS.progress - 1 or effect.starting)
        ):
            return STALLED
        return PEER if kind == "glitch" else None

    def slow_for(self, effect: Effect) -> float:
        """Seconds in which a rank was slow without a break, around an effect."""
        slow = [e for e in self.scenario.effects if e.kind == "slow" and e.rank == effect.rank]
        more = 0.1 + self.away  # the machine may sleep meanwhile
        one_after_the_other = (e for e in slow if -e.value - more < e.at - effect.at < effect.value + more)
        return float(sum(e.value for e in one_after_the_other))

    def known(self, effect: Effect) -> float:
        """A time at which the parent must know of an effect, apart from holds."""
        limit = {SILENT: LIMITS.heartbeat, STALLED: LIMITS.progress}.get(self.rank_of(effect), 0.0)
        if limit and (effect.starting or effect.kind == "mute"):  # of which the last phase may not be known
            limit = max(limit, LIMITS.startup)
        process = self.scenario.run.ranks[effect.rank].process
        if effect.kind == "mute" and not process.alive and not process.killed_by_parent:
            return FOREVER  # its end was seen, and then its words
        held = [e for e in self.scenario.effects if e.kind in ("mute", "stop") and e.rank == effect.rank]
        if effect.kind in ("error", "late_error", "glitch") and held:
            return FOREVER
        late = sum(e.value for e in held if e is not effect and e.value < FOREVER)
        return effect.at + limit + late + self.slack

    def no_wrong_blame(self, result: Result) -> None:
        effects = [e for e in self.scenario.effects if self.rank_of(e) is not None and e.at <= self.until]
        failure = result.failure
        if failure is None:
            if result.interrupted is None and result.exit_code != 0:
                raise Broken(f"exit code {result.exit_code} without a failure")
            return
        if not effects:
            raise Broken(f"a failure without a fault: {failure}")
        place, cause, code = self.meaning(failure)
        if failure.exit_code != code:
            raise Broken(f"exit code {failure.exit_code} for '{failure.cause}', not {code}")
        self.role(failure)
        if cause is None:
            raise Broken(f"nothing of the kind happened to that rank: {failure}")
        if result.interrupted is not None and place > OWN and self.at > self.stopping_at + self.slack:
            raise Broken(f"blamed while stopping: {failure}")
        hold = LIMITS.peer_error_hold if place == PEER else LIMITS.error_hold
        if place in (OWN, EARLY, PEER) and self.at < cause.at + hold - 0.15:  # a round is a while
            raise Broken(f"blamed before another rank could say why: {failure}")
        for other in effects:
            rank = self.rank_of(other)
            assert rank is not None
            if rank == SILENT and other.value < LIMITS.startup + 1 + self.away:  # it may go on in time
                continue
            first = rank < place or (rank == place and place <= EARLY and other.at < cause.at - self.slack)
            if (
                first
                and self.known(other) + self.away < self.at
                and not (rank == EARLY and other.at > self.stopping_at)
            ):
                raise Broken(f"{other} came first, and not: {failure}")

    def nothing_untold(self, result: Result) -> None:
        """A good run is one in which no rank failed, as far as the parent could know."""
        for effect in self.scenario.effects if result.exit_code == 0 else ():
            place = self.rank_of(effect)
            late_death = effect.kind == "late_exit" and effect.value <= 0  # libraries crash while they unload
            # An exit code is there to see at once, and a run that is done looks no further.
            known = self.known(effect) - (self.slack - 0.15 if effect.kind == "late_exit" else 0.0)
            if place in (KILLED, OWN, EARLY) and not late_death and known + self.away < self.at:
                raise Broken(f"{effect} is not told")

    def meaning(self, failure: Failure) -> tuple[int, Effect | None, int]:
        """The class of a failure, the effect that it tells of (None: there is none), and its exit code."""
        cause = failure.cause
        mine = [e for e in self.scenario.effects if e.rank == failure.rank and self.rank_of(e) is not None]

        def first(*kinds: str, among: list[Effect] = mine) -> Effect | None:
            return next((e for e in among if e.kind in kinds), None)

        if cause.startswith("killed by "):
            found = first("kill")
            if found is not None and f"killed by {found.value.name}" != cause:
                found = None
            abort = cause == "killed by SIGABRT"
            return OWN if abort else KILLED, found, RANK_FAILED
        if cause.startswith("exited with code"):
            found = first("exit", "late_exit")
            if found is not None and f"exited with code {found.value} " not in cause:
                found = None
            return EARLY, found, RANK_FAILED
        if cause.startswith("no heartbeat"):
            return SILENT, next((e for e in mine if self.quiet(e)), None), NO_PROGRESS
        if cause.startswith("no progress"):
            return STALLED, self.stalled(failure), NO_PROGRESS
        if cause.startswith("lost a peer"):
            # Who waits for a message that was lost may hear that its sender is gone, which crashed after its work.
            gone = any(effect.kind == "late_kill" for effect in self.scenario.effects)
            return PEER, first("glitch") or (first("drop") if gone else None), RANK_FAILED
        found = first("error", "late_error")
        if found is not None and found.value != cause:
            found = None
        return OWN, found, (found.exit_code if found is not None else None) or RANK_FAILED

    def quiet(self, effect: Effect) -> bool:
        """True if an effect may have kept a rank silent beyond the limit."""
        limit = max(LIMITS.heartbeat, LIMITS.startup if effect.starting else 0.0)
        # A tick may be due just then, and the parent may have slept for less than it counts.
        enough = limit - TICK_SECONDS - 1.2
        return self.rank_of(effect) == SILENT and min(self.until - effect.at, effect.value) >= enough

    def stalled(self, failure: Failure) -> Effect | None:
        """The effect behind "no progress": of the rank itself if it is busy, else of whom it waits for."""
        run = self.scenario.run
        stalled = [e for e in self.scenario.effects if self.rank_of(e) in (STALLED, PEER) or e.kind in ("slow", "stop")]
        mute = next((e for e in self.scenario.effects if e.kind == "mute" and e.rank == failure.rank), None)
        if mute is not None and mute.at + mute.value + self.away > self.at and mute.value > LIMITS.heartbeat:
            return mute  # its last words are old
        if "every other rank waits" in failure.cause:
            if not (failure.phase or "").startswith("wait"):
                return None
            return next((e for e in stalled if e.waiting or e.kind in ("drop", "glitch", "slow")), None)
        if (failure.phase or "wait").startswith("wait") and failure.phase is not None:
            return None
        if failure.phase is None or failure.phase.startswith("start"):
            # All that have loaded wait for the last one, and say that they start: it cannot be told from them.
            return next((e for e in stalled if e.starting), None)
        team = {failure.rank, *run.team(run.ranks[failure.rank])} if failure.stage is not None else {failure.rank}
        return next((e for e in stalled if e.rank in team), None)

    def role(self, failure: Failure) -> None:
        run = self.scenario.run
        told = {"stage": failure.stage, "place": failure.place, "decoder": failure.decoder}
        told = {name: value for name, value in told.items() if value is not None}
        if failure.phase is not None and told != run.ranks[failure.rank].role:
            raise Broken(f"{told} for rank {failure.rank}, which is {run.ranks[failure.rank].role}")
        mine = [effect for effect in self.scenario.effects if effect.rank == failure.rank]
        where = run.ranks[failure.rank].heartbeat.where
        stuck = failure.cause.startswith("no progress") and [effect.kind for effect in mine] == ["hang"]
        if stuck and not self.away and (failure.phase, failure.block) != (where.get("phase"), where.get("block")):
            raise Broken(f"rank {failure.rank} hangs in {where}, and not: {failure}")

    # Time ---------------------------------------------------------------------------------------------------------

    def in_time(self) -> None:
        """The supervisor ended within what its limits promise."""
        scenario = self.scenario
        deadline = FOREVER
        for effect in scenario.effects:
            place = self.rank_of(effect)
            enough = place != SILENT or effect.value > LIMITS.startup + 1 + self.away
            if place is None or not enough or (effect.kind == "slow"):
                continue
            hold = {OWN: LIMITS.error_hold, EARLY: LIMITS.error_hold, PEER: LIMITS.peer_error_hold}.get(place, 0.0)
            # Others may have work left before all of them wait.
            more = scenario.length * 2 + 10 if place in (STALLED, PEER) else 0.0
            by = self.known(effect) + hold + more + self.away
            if by < self.stopping_at or place <= OWN:  # else the end of grace bounds it
                deadline = min(deadline, by)
        deadline = min(deadline, self.stopping_at + LIMITS.grace + self.slack + self.away)
        signals = [at for at, _ in scenario.signals]
        if len(signals) > 1:
            deadline = min(deadline, signals[1] + self.slack + self.away)
        starting = [
            rank for rank in scenario.run.ranks.values() if rank.heartbeat.starting and rank.process.killed_by_parent
        ]
        if signals and starting and all(rank.process.pipe.held_until <= START for rank in starting):
            deadline = min(deadline, signals[0] + self.slack + self.away)
        if self.at > deadline:
            raise Broken(f"decided at {self.at - START:.2f}, {self.at - deadline:.2f} s late")
        if scenario.world.now - self.at > 1.0 + self.away:
            raise Broken(f"the end took {scenario.world.now - self.at:.2f} s")
        quiet = not (scenario.effects or scenario.lingers or scenario.signals or scenario.told)
        if quiet and self.result is not None and scenario.machine.decided_at < FOREVER:
            raise Broken("somebody was killed in a good run")

    def interrupted(self, result: Result) -> None:
        """A run that a signal ends says so, and by which."""
        scenario = self.scenario
        sent = {number for _, number in scenario.signals} | {number for *_, number in scenario.told}
        if result.interrupted is not None:
            if result.exit_code != 128 + result.interrupted or result.interrupted not in sent:
                raise Broken(f"exit code {result.exit_code}, interrupted by {result.interrupted!r}")
        elif scenario.signals and scenario.signals[0][0] < self.at:
            raise Broken(f"the signal at {scenario.signals[0][0] - START:.3f} is not told: {result}")
        elif result.failure is None:
            for at, number, _ in scenario.told:
                told = not any(e.rank == number for e in scenario.effects)
                if told and at + self.slack + self.away < self.at:
                    raise Broken(f"the signal to rank {number} at {at - START:.3f} is not told: {result}")
        elif result.exit_code != result.failure.exit_code:
            raise Broken(f"exit code {result.exit_code} for a failure of {result.failure.exit_code}")

    def asked_to_stop(self, result: Result) -> None:
        """Every rank that lives on after a signal was asked to stop."""
        stop_by = self.scenario.supervisor._stop_by
        if result.interrupted is None or stop_by is None or self.away:
            return
        asked = stop_by - LIMITS.grace
        for rank in self.scenario.run.ranks.values():
            hears = rank.heeds and rank.heartbeat.supervised and rank.stopped_until < asked
            if hears and rank.process.ended > asked + 1.0 and not rank.heartbeat.stop_requested.is_set():
                raise Broken(f"rank {rank.number} was not asked to stop")

    # Work ---------------------------------------------------------------------------------------------------------

    def no_lost_block(self, result: Result) -> None:
        """What rank 0 told before the verdict is what the parent knows, and a good run has all blocks."""
        scenario, run = self.scenario, self.scenario.run
        told = [block for block, (_, went) in enumerate(run.committed) if went]
        before = [block for block in told if run.committed[block][0] < self.at]
        if scenario.heard is not None and scenario.heard not in told:
            raise Broken(f"block {scenario.heard} is told and not there")
        muted = any(e.kind == "mute" and e.rank == 0 and e.at + e.value >= self.at for e in scenario.effects)
        if before and not muted and (scenario.heard is None or scenario.heard < before[-1]):
            raise Broken(f"block {before[-1]} is on disk, and {scenario.heard} is told")
        if result.failure is not None and result.failure.last_committed_block != scenario.heard:
            raise Broken(f"the failure tells of block {result.failure.last_committed_block}, heard: {scenario.heard}")
        if result.exit_code == 0 and len(run.committed) != run.schedule.num_blocks:
            raise Broken(f"{len(run.committed)} blocks of a good run")

    def stragglers(self, result: Result) -> None:
        """A slow stage is named, and no other."""
        warned, slow = self.scenario.stragglers.warned, self.scenario.slow_stage
        if warned is not None and warned != slow:
            raise Broken(f"rank {warned} is called slow")
        schedule = self.scenario.run.schedule
        iterations = (schedule.num_blocks or 0) * schedule.gap + schedule.num_steps - schedule.gap
        if slow is not None and warned is None and result.exit_code == 0 and iterations > 6:
            raise Broken(f"stage {slow} is slow, and nobody says so")
