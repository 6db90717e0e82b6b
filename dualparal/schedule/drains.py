"""The proof that no stage hangs wherever a device drains: one wait-for graph of hosts, devices and transfers.

Some calls of the host return only when its device has done all that it was given: a capture, the first use of a kernel,
memory that is given back. NCCL's transfers are work of the device, and wait for their other end. If a transfer was
posted ahead of its message, then such a call waits for another rank's host, which may wait for this one.

Nodes are (kind, stage or edge, number): "host" has made an action, "drain" is a wait for the device just before that
action, "device" has done what the action gave it, "transfer" has brought a message of an edge. Every drain is in the
graph: where it has no cycle, there is none with fewer of them.
"""

from __future__ import annotations

from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

from dualparal.schedule.actions import Action, Op
from dualparal.schedule.replay import ScheduleError
from dualparal.schedule.schedule import Schedule

Node = tuple[str, int, int]


def check_drains(schedule: Schedule, units: int | None = None, *, ahead: bool = False) -> None:
    """Proves that every stage goes on though its device drains before every action.

    Args:
        schedule: the order of work.
        units: number of units of each stage that are looked at (needed for an endless schedule).
        ahead: receives are posted as soon as a buffer is free; as it is: when both ends will be (``remote``).

    Raises:
        ScheduleError: some drains can wait for each other; with their cycle.
    """
    actions = [_actions(schedule, stage, units) for stage in range(schedule.num_stages)]
    try:
        TopologicalSorter(wait_for(schedule, actions, ahead=ahead)).prepare()
    except CycleError as error:
        cycle = " <- ".join(_name(actions, node) for node in error.args[1])
        raise ScheduleError(f"a drain of the device would hang: {cycle}") from None


def wait_for(schedule: Schedule, actions: list[list[Action]], *, ahead: bool) -> dict[Node, set[Node]]:
    """The graph: for each node those that it waits for.

    Args:
        schedule: the order of work.
        actions: of each stage.
        ahead: see ``check_drains``.
    """
    n, depth = schedule.num_stages, schedule.depth
    sends = [[i for i, a in enumerate(own) if a.op is Op.SEND] for own in actions]
    releases = [_releases(own, first=stage == 0) for stage, own in enumerate(actions)]
    graph: defaultdict[Node, set[Node]] = defaultdict(set)
    for edge in range(n):
        after = (edge + 1) % n
        for j, at in enumerate(sends[edge]):
            free = ("host", after, releases[after][j - depth]) if 0 <= j - depth < len(releases[after]) else None
            # The device of the sender has the tensor; a communicator moves one after the other.
            graph["transfer", edge, j] |= {("device", edge, at)} | ({("transfer", edge, j - 1)} if j else set())
            if ahead:  # else, when one end is posted the other will be, whatever the hosts do
                graph["transfer", edge, j].add(("host", edge, at))
            if free is not None and ahead:
                graph["transfer", edge, j].add(free)
            elif free is not None:  # a credit, which is said when the device has read
                graph["host", edge, at] |= {free, ("device", *free[1:])}
    for stage, own in enumerate(actions):
        before, sent, received, released = (stage - 1) % n, 0, 0, 0
        for i, action in enumerate(own):
            graph["host", stage, i].add(("drain", stage, i))
            if i:
                graph["host", stage, i].add(("host", stage, i - 1))
                graph["device", stage, i].add(("device", stage, i - 1))
                graph["drain", stage, i].add(("device", stage, i - 1))
            if sent:
                graph["drain", stage, i].add(("transfer", stage, sent - 1))
            if posted := min(released + depth, len(sends[before])):
                graph["drain", stage, i].add(("transfer", before, posted - 1))
            if action.op is Op.RECV:
                graph["host", stage, i].add(("host", before, sends[before][received]))  # the header
                graph["device", stage, i].add(("transfer", before, received))
                received += 1
            sent += action.op is Op.SEND
            released += i in releases[stage][released : released + 1]
            if ahead:
                graph["device", stage, i].add(("host", stage, i))
    return graph


def _actions(schedule: Schedule, stage: int, units: int | None) -> list[Action]:
    """Actions of a stage until it has sent its unit number ``units``, or all of them."""
    if units is None:
        return list(schedule.actions(stage))
    found, left = [], units
    for action in schedule.actions(stage):
        found.append(action)
        left -= action.op is Op.SEND
        if not left:
            break
    return found


def _releases(actions: list[Action], first: bool) -> list[int]:
    """Numbers of the actions that give a buffer back: stage 0 copies at once, the others read it in their RUN."""
    return [i for i, action in enumerate(actions) if action.op is (Op.RECV if first else Op.RUN)]


def _name(actions: list[list[Action]], node: Node) -> str:
    kind, place, number = node
    if kind == "transfer":
        return f"message {number} of edge {place} -> {(place + 1) % len(actions)}"
    return f"{kind} of stage {place} at {actions[place][number]}"
