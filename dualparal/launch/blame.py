"""The rank to blame when a run fails: a function of what its ranks said and of how they ended."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualparal.launch.exit_codes import BAD_INPUT, NO_PROGRESS, RANK_FAILED
from dualparal.launch.heartbeat import TICK_SECONDS

# Silence that makes a rank suspect when others already say that they lost a peer.
_SUSPECT_SECONDS = 5 * TICK_SECONDS


@dataclass(frozen=True)
class Limits:
    """The limits of the parent's patience, in seconds. Raises ValueError for one below 0."""

    heartbeat: float = 10.0  # without a tick: the process is stopped, or holds the GIL
    progress: float = 600.0  # without a message while busy, or while every rank waits
    startup: float = 120.0  # at least this for either while starting: imports hold the GIL for long
    grace: float = 20.0  # from the request to stop until SIGKILL
    error_hold: float = 0.2  # a rank's own error waits this long for a death by signal that explains it
    peer_error_hold: float = 1.0  # "I lost a peer" waits this long for the peer's own story

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if not value >= 0:
                raise ValueError(f"{item.name}={value!r}: a limit is a number of seconds; use 0 or more")


@dataclass(frozen=True)
class Failure:
    """A rank that failed, its place in the work, and the cause. `str` gives one message for the user.

    Attributes:
        stage, block, step, phase: as the rank said last; None: it did not say.
        decoder: its number among those that only decode, in place of a stage.
        place: its number among the ranks of its stage; None: the stage has one.
        exit_code: that of the whole run (``launch.exit_codes``).
        last_committed_block, resume_command: see ``launch.supervisor.Kept``.
    """

    rank: int
    stage: int | None
    block: int | None
    step: int | None
    phase: str | None
    cause: str
    exit_code: int
    hint: str = ""
    last_committed_block: int | None = None
    resume_command: str | None = None
    decoder: int | None = None
    place: int | None = None

    def __str__(self) -> str:
        if self.exit_code == BAD_INPUT:
            return self.cause  # the caller's mistake: whichever rank found it
        roles = (("stage", self.stage), ("place", self.place), ("decoder", self.decoder))
        names = ", ".join(f"{name} {number}" for name, number in roles if number is not None)
        role = f" ({names})" if names else ""
        places = [
            f"{name} {value}" for name, value in (("block", self.block), ("step", self.step)) if value is not None
        ]
        places.append(f"phase '{self.phase}'" if self.phase else "start-up")
        text = f"rank {self.rank}{role} failed at {', '.join(places)}: {self.cause}"
        more = {
            "hint": self.hint,
            "last block on disk": self.last_committed_block,
            "resume with": self.resume_command,
        }
        return "\n".join([text, *(f"{name}: {value}" for name, value in more.items() if value not in (None, ""))])


@dataclass(frozen=True)
class Report:
    """An error a rank told us about, and the time of it on the machine's monotonic clock."""

    text: str
    at: float
    exit_code: int


@dataclass
class RankState:
    """The knowledge of one rank: its own words on its place, the time of the last one, and its end.

    Times are seconds on the machine's monotonic clock.
    """

    rank: int
    heard: float  # any line
    moved: float  # any line but a tick, by the rank's own account
    stage: int | None = None
    place: int | None = None
    decoder: int | None = None
    block: int | None = None
    step: int | None = None
    action: int | None = None  # its number among those of its stage, the same for all places; None: it did not say
    phase: str | None = None  # None until the first phase: starting up
    done: bool = False
    error: Report | None = None  # its own
    peer_error: Report | None = None  # a consequence of another rank's end
    exit: int | None = None  # as in subprocess: negative for a signal
    exited_at: float = 0.0

    @property
    def active(self) -> bool:
        """Alive, unfinished, and not yet complaining."""
        return self.exit is None and not (self.done or self.error or self.peer_error)

    @property
    def starting(self) -> bool:
        """True while it imports and loads, which may hold the GIL for long."""
        return self.phase is None or self.phase.startswith("start")

    @property
    def waiting(self) -> bool:
        """True while it waits for another rank, by its own account."""
        return self.phase is not None and self.phase.startswith("wait")

    @property
    def unexplained_exit(self) -> int | None:
        """The exit code, if nothing this rank said explains it."""
        if self.error or self.peer_error:
            return None
        # Libraries may crash while they unload, after the work; a code above 0 is somebody's decision.
        return None if self.done and (self.exit or 0) <= 0 else self.exit

    @property
    def finished(self) -> bool:
        """Its work is done, and nothing it did since says otherwise."""
        return self.done and not self.error and self.unexplained_exit is None

    @property
    def told_at(self) -> float:
        """The time of its own error, or else of its end."""
        return self.error.at if self.error else self.exited_at

    def take(self, message: Mapping[str, Any], now: float, away_since: float | None = None) -> None:
        """Updates the state from one line that was read at the time ``now``.

        Args:
            away_since: the parent slept from then until ``now``. That time is not the rank's, which may have slept too.
        """
        self.heard = now
        if "tick" in message:
            return
        at = message.get("at")
        said = min(now, at) if isinstance(at, float) else now
        self.moved = said if away_since is None else said + now - max(said, away_since)
        self.stage = _int(message.get("stage"), self.stage)
        self.place = _int(message.get("place"), self.place)
        self.decoder = _int(message.get("decoder"), self.decoder)
        if "phase" in message:
            self.phase = str(message["phase"])
            self.block, self.step = _int(message.get("block")), _int(message.get("step"))
            self.action = _int(message.get("action"))
        if "error" in message:
            self._take_error(message, said)
        self.done = self.done or bool(message.get("done"))

    def _take_error(self, message: Mapping[str, Any], said: float) -> None:
        code = _int(message.get("exit_code"))
        code = code if code is not None and 0 < code < 256 else RANK_FAILED
        report = Report(str(message["error"]), said, code)
        # The first word counts: what follows is the clean-up talking.
        if message.get("peer"):
            self.peer_error = self.peer_error or report
        else:
            self.error = self.error or report


def blame(states: Sequence[RankState], limits: Limits, now: float, stopping: bool = False) -> Failure | None:
    """The failure that explains what is known so far, or None: all is well, or it is too early to say.

    A death by signal beats an error a rank reports itself, which beats an early exit, which beats silence,
    which beats no progress, which beats any "I lost a peer". SIGABRT counts as a report: it is how C++ ends
    on an exception that nobody caught, often about a peer. While stopping, ranks may leave early, and grace
    bounds the rest.
    """
    expected = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} if stopping else set()
    exits = [(s, s.unexplained_exit) for s in states]
    killed = [s for s, code in exits if code is not None and code < 0 and -code not in expected | {signal.SIGABRT}]
    if killed:
        return _death(min(killed, key=lambda s: s.exited_at))
    own = [s for s, code in exits if s.error or code == -signal.SIGABRT]
    early = [s for s, code in exits if code is not None and code >= 0 and not stopping]
    if own or early:
        first = min(own or early, key=lambda s: s.told_at)
        return _own_fault(first) if now - first.told_at >= limits.error_hold else None
    if stopping:
        return None
    return (
        _silent(states, limits, limits.heartbeat, now)
        or _stalled(states, limits, limits.progress, now)
        or _peer_lost(states, limits, now)
    )


def _own_fault(state: RankState) -> Failure:
    if state.error:
        return _failure(state, state.error.text, state.error.exit_code, _hint_for(state.error.text))
    if state.exit is not None and state.exit < 0:
        return _death(state)
    when = "after it had reported the end of its work" if state.done else "before its work was done"
    return _failure(state, f"exited with code {state.exit} {when}", RANK_FAILED, "its own output above says more")


def _death(state: RankState) -> Failure:
    assert state.exit is not None
    number = -state.exit
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        hint = "often the system ran out of memory (see dmesg); otherwise somebody killed it"
    elif number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
        hint = "a crash in native code; PYTHONFAULTHANDLER=1 shows where"
    else:
        hint = "somebody sent it that signal"
    return _failure(state, f"killed by {name}", RANK_FAILED, hint)


def _limit(state: RankState, limits: Limits, limit: float) -> float:
    return max(limit, limits.startup) if state.starting else limit


def _silent(states: Sequence[RankState], limits: Limits, limit: float, now: float) -> Failure | None:
    quiet = [s for s in states if s.active and now - s.heard > _limit(s, limits, limit)]
    if not quiet:
        return None
    worst = min(quiet, key=lambda s: s.heard)
    hint = "the process is stopped, swapping, or stuck in native code that holds the GIL"
    return _failure(worst, f"no heartbeat for {now - worst.heard:.1f} s", NO_PROGRESS, hint)


def _held(state: RankState, states: Sequence[RankState]) -> bool:
    """True where another place of its stage waits, by its own account, for what comes before the action of this one.

    Places of a stage need each other's shares of every unit: one that has begun a unit waits for those that have not.
    """
    return state.action is not None and any(
        s.stage == state.stage and s.waiting and s.action is not None and s.action < state.action for s in states
    )


def _stalled(
    states: Sequence[RankState], limits: Limits, limit: float, now: float, busy_only: bool = False
) -> Failure | None:
    active = [s for s in states if s.active]
    late = [s for s in active if now - s.moved > _limit(s, limits, limit)]
    busy = [s for s in late if not (s.waiting or _held(s, states))]
    # One rank at work may keep the others waiting as long as it likes: they are late, but innocent.
    deadlock = len(late) == len(active) and not busy_only
    if not busy and not (late and deadlock):
        return None
    worst = min(busy or [s for s in late if s.waiting] or late, key=lambda s: s.moved)
    cause = f"no progress for {now - worst.moved:.1f} s"
    if busy:
        return _failure(worst, cause, NO_PROGRESS, "a GPU kernel or an input/output call that never returns")
    hint = "a transfer that nobody answers; this rank waits longest"
    return _failure(worst, f"{cause}, and every other rank waits too", NO_PROGRESS, hint)


def _peer_lost(states: Sequence[RankState], limits: Limits, now: float) -> Failure | None:
    reports = [(s.peer_error, s) for s in states if s.peer_error]
    if not reports:
        return None
    report, state = min(reports, key=lambda item: item[0].at)
    if now - report.at < limits.peer_error_hold:
        return None
    # A transport may give up before our own limits do. Then whoever is quiet, or busy for long, is the peer.
    suspect = _silent(states, limits, min(_SUSPECT_SECONDS, limits.heartbeat), now)
    suspect = suspect or _stalled(states, limits, limits.heartbeat, now, busy_only=True)
    hint = "no rank gave a cause of its own; the output above may"
    return suspect or _failure(state, f"lost a peer: {report.text}", report.exit_code, hint)


def _failure(state: RankState, cause: str, exit_code: int, hint: str) -> Failure:
    where = state.stage, state.block, state.step, state.phase
    return Failure(state.rank, *where, cause, exit_code, hint, decoder=state.decoder, place=state.place)


def _hint_for(text: str) -> str:
    if "out of memory" in text.lower():
        return "use smaller blocks, less context, a smaller picture or more GPUs; see `dualparal plan`"
    return ""


def _int(value: object, default: int | None = None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
