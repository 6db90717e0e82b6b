"""Schedules for tests: all small ones as a strategy of hypothesis, and one that blocks for ever."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from dualparal.config.blocks import CONTEXT_POLICIES, CONTEXT_VERSIONS
from dualparal.schedule.actions import Op
from dualparal.schedule.schedule import Schedule


def _schedule(decoders: dict[str, Any], **numbers: Any) -> Schedule:
    return Schedule(**decoders, **numbers)


schedules = st.builds(
    _schedule,
    decoders=st.sampled_from(
        [{"decode": False}, {}, {}, {"decode_in_place": True}, {"decode_ranks": 1}, {"decode_ranks": 3}]
    ),
    num_stages=st.integers(1, 8),
    num_steps=st.integers(1, 7),
    num_blocks=st.integers(1, 9),
    context=st.sampled_from(CONTEXT_POLICIES),
    context_frames=st.integers(0, 3),
    guidance=st.booleans(),
    depth=st.integers(1, 4),
    max_blocks_in_flight=st.none() | st.integers(1, 8),
    context_version=st.sampled_from(CONTEXT_VERSIONS),
    num_videos=st.sampled_from([1, 1, 2, 3]),
    refresh_every=st.none() | st.integers(1, 9),
)


@st.composite
def partial_schedules(draw: st.DrawFn) -> Schedule:
    """Those with guidance, at some steps of which the unconditional units are left out."""
    whole = replace(draw(schedules), guidance=True)
    only = tuple(step for step in range(whole.num_steps) if draw(st.booleans()))
    return replace(whole, conditional_only=only)


class TooLate(Schedule):
    """Stage 0 never takes a velocity before it has sent everything."""

    def _first_stage(self):  # type: ignore[no-untyped-def]
        actions = list(super()._first_stage())
        late = [a for a in actions if a.op in (Op.RECV, Op.UPDATE, Op.EMIT, Op.DECODE)]
        return iter([a for a in actions if a not in late] + late)
