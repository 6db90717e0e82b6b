"""What few ranks do, in their own right: leave when they are asked to stop, sleep after their work, say much at once.

Chosen by a generator of its own, so that the other choices of a seed stay what they are.
"""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING

from virtual_effects import FOREVER
from virtual_links import Gate, Task

if TYPE_CHECKING:
    from virtual_faults import Scenario
    from virtual_ranks import Rank

# Of a rank that leaves on the request: by itself, or by a signal that came to it, too.
LEAVES = (0, 1, 143, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
_MANY = 80  # phases at once: more than a heartbeat sends without a tick


def plan_habits(scenario: Scenario, seed: int) -> None:
    """Puts at most one of them into the plan."""
    rng = random.Random(f"habits {seed}")
    number, chance = rng.randrange(scenario.run.world_size), rng.random()
    if scenario.run.transport_seconds < FOREVER:  # of these runs the whole plan is made already
        return
    if chance < 0.12:
        _leaves(scenario, number, rng.choice(LEAVES))
    elif chance < 0.16:
        _sleeps(scenario, number, rng.choice((4.0, FOREVER)))
    elif chance < 0.22 and scenario.run.places == 1:  # those of a stage wait for each other and look busy
        _chatters(scenario, number, rng.randint(2, 25))  # 1 is still the start


def _leaves(scenario: Scenario, number: int, code: int) -> None:
    """The rank ends as soon as it is asked to stop, which is no fault."""

    def act() -> None:
        rank = scenario.run.ranks[number]
        before = rank.process.on_stop

        def hear(data: bytes) -> None:
            before(data)
            if data and rank.heeds and rank.heartbeat.stop_requested.is_set() and rank.process.alive:
                rank.process.helper = False
                rank.process.end(code)

        rank.process.on_stop = hear

    scenario._at_action.setdefault((number, 1), []).append(act)
    if scenario.rng.random() < 0.8:
        scenario._signals()


def _sleeps(scenario: Scenario, number: int, seconds: float) -> None:
    """The rank is stopped once its work is done, which is no fault either."""

    def task(rank: Rank) -> Task:
        scenario.lingers = True
        scenario.world.note(f"rank {number} is done, and stopped for {seconds:.0f} s")
        rank.stop(seconds)
        yield seconds if seconds < FOREVER else Gate()

    scenario._at_end.setdefault(number, []).append(task)


def _chatters(scenario: Scenario, number: int, action: int) -> None:
    """The rank hangs after many short phases, the last of which did not go out at once."""

    def task(rank: Rank) -> Task:
        for block in range(_MANY):
            rank.heartbeat.phase("run", **rank.role, block=block, step=0)
        scenario._took("hang", rank)
        while True:
            yield Gate()

    def act() -> None:
        scenario.run.ranks[number].now_what.append(task)

    scenario._at_action.setdefault((number, action), []).append(act)
