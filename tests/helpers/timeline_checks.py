"""What every timeline must hold, for test_timeline.py and test_cli.py."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

from dualparal.schedule.schedule import Schedule
from dualparal.trace.timeline import STAGE, place

Event = dict[str, Any]


def spans(events: list[Event], kind: str | None = None, row: int | None = None) -> list[Event]:
    found = [e for e in events if e["ph"] == "X" and kind in (None, e["cat"]) and row in (None, place(e)[1])]
    return sorted(found, key=lambda event: event["ts"])


def check_order(events: list[Event], schedule: Schedule) -> None:
    """Every action of every stage, in order, none overlapping the one before, and a message's two ends by an arrow."""
    ends: dict[str, dict[str, Event]] = defaultdict(dict)
    for stage in range(schedule.num_stages):
        own = [e for e in spans(events, row=STAGE) if place(e)[0] == stage and e["cat"] != "wait"]
        assert [e["name"] for e in own] == [str(action) for action in schedule.actions(stage)]
        for before, after in pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.01
        for event in own:
            if event["cat"] in ("send", "receive"):
                way = "flow_out" if event["cat"] == "send" else "flow_in"
                assert event[way] and way not in ends[event["bind_id"]]
                ends[event["bind_id"]][way] = event
    units = schedule.num_units or 0
    assert len(ends) == (units * schedule.num_stages if schedule.num_stages > 1 else 0)
    for both in ends.values():
        sent, received = both["flow_out"], both["flow_in"]
        assert sent["args"] == received["args"]  # the same unit
        assert received["ts"] + received["dur"] >= sent["ts"]  # the clocks of the ranks are one
