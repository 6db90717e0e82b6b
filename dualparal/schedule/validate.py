"""The proof that a schedule can run: no deadlock, every read finds what it names, and every block is decoded once."""

from __future__ import annotations

from itertools import islice

from dualparal.schedule.actions import Action, Features, Op, Unit
from dualparal.schedule.replay import Event, ScheduleError, format_grid, replay
from dualparal.schedule.schedule import Schedule


def validate(schedule: Schedule, units: int | None = None) -> list[Event]:
    """Proves that a schedule can run: no deadlock, every read finds the version that it names, and every finished block
    is decoded once by each place that decodes, in the order in which blocks leave.

    Args:
        units: number of units after which the replay stops (needed for an endless schedule).

    Returns:
        The replayed events, in ticks.

    Raises:
        ScheduleError: the schedule cannot run; with the action at fault and the grid.
        ValueError: an endless schedule and no number of units.
    """
    events = replay(schedule, units=units).events
    try:
        for stage in range(schedule.num_stages):
            _check_features(schedule, [e.action for e in events if e.action.stage == stage])
        first = [e.action for e in events if e.action.stage == 0]
        _check_latents(schedule, first, complete=units is None)
        _check_decodes(schedule, first, complete=units is None)
    except ScheduleError as error:
        raise ScheduleError(f"{error}\n{format_grid(schedule.num_stages, events)}") from None
    return events


def _check_features(schedule: Schedule, actions: list[Action]) -> None:
    """Replays the feature store of one stage. Raises ScheduleError at a read of anything but what it names."""
    store: dict[tuple[str, int, int], Features] = {}
    for action in actions:
        if action.op is not Op.RUN:
            continue
        for wanted in schedule.reads(action.unit):
            found = store.get((wanted.side, wanted.slot, wanted.branch))
            if found != wanted:
                raise ScheduleError(f"{action} on stage {action.stage} <- reads {wanted} and would find {found}")
        for made in schedule.writes(action.unit):
            if made.slot >= schedule.slots(made.side):
                raise ScheduleError(f"{action} on stage {action.stage} <- writes {made}: no such slot")
            store[made.side, made.slot, made.branch] = made


def _check_latents(schedule: Schedule, actions: list[Action], complete: bool) -> None:
    for video in range(schedule.num_videos):
        _check_video(schedule, [action for action in actions if action.unit.video == video], complete)


def _check_video(schedule: Schedule, actions: list[Action], complete: bool) -> None:
    """Replays the latents of one video on stage 0. Raises ScheduleError at a unit whose inputs are not there, an
    update without all velocities, and, if ``complete``, when not all blocks leave in order."""
    version: dict[int, int] = {}
    velocities: dict[tuple[int, int], set[int]] = {}
    emitted: list[int] = []
    for action in actions:
        unit = action.unit
        if action.op is Op.RUN:
            if version.setdefault(unit.block, schedule.steps_done(unit.block)) != unit.step:
                raise ScheduleError(f"{action} <- latents of block {unit.block} are at {version[unit.block]}")
            wanted = schedule.previous_latents(unit)
            before = version.get(unit.block - 1, schedule.steps_done(unit.block - 1))
            if wanted is not None and before != wanted:
                raise ScheduleError(
                    f"{action} <- reads latents of block {unit.block - 1} at {wanted}, which are at {before}"
                )
        if action.op is (Op.RECV if schedule.num_stages > 1 else Op.RUN):
            velocities.setdefault((unit.block, unit.step), set()).add(unit.branch)
        if action.op is Op.UPDATE:
            if velocities.pop((unit.block, unit.step), set()) != set(range(schedule.branches_at(unit.step))):
                raise ScheduleError(f"{action} <- a branch is missing")
            version[unit.block] = unit.step + 1
        if action.op is Op.EMIT:
            if version[unit.block] != schedule.num_steps:
                raise ScheduleError(f"{action} <- block is at version {version[unit.block]}")
            emitted.append(unit.block)
    if complete and emitted != list(range(schedule.first_block, schedule.num_blocks or 0)):
        raise ScheduleError(f"blocks leave in the order {emitted}")


def _check_decodes(schedule: Schedule, actions: list[Action], complete: bool) -> None:
    """Checks that stage 0 hands each block over as it leaves, and what each place that decodes does with them. Raises
    ScheduleError."""
    emitted = [action.unit for action in actions if action.op is Op.EMIT]
    handed = [action.unit for action in actions if action.op is Op.DECODE]
    if handed != (emitted if schedule.decode else []):
        raise ScheduleError(f"stage 0 hands over {_blocks(handed)} <- blocks leave in the order {_blocks(emitted)}")
    for place in schedule.decoders:
        decodes = list(islice(schedule.decodes(place), None if complete else len(emitted)))
        if decodes != [Action(Op.DECODE, place, unit) for unit in emitted]:
            found = _blocks([action.unit for action in decodes])
            raise ScheduleError(f"place {place} decodes {found} <- blocks leave in the order {_blocks(emitted)}")


def _blocks(units: list[Unit]) -> list[tuple[int, int]]:
    return [(unit.video, unit.block) for unit in units]
