"""The picture of a timeline: a bar per action, a row per stage, one for the decoder. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from dualparal.io.files import whole_file
from dualparal.trace.timeline import DECODER, STAGE, TimelineError, place, read

# Of a longer run only the beginning is drawn: more bars cannot be told apart, and take minutes.
LIMIT = 20_000
GREY = {"wait": "0.88", "receive": "0.55", "send": "0.55", "update": "black", "emit": "black", "queue": "0.7"}
BLOCKS = 10  # colours, which come again


class Bar(NamedTuple):
    """A bar of the picture: one span of a timeline.

    Attributes:
        row: (stage, row within it).
        kind: one of ``timeline.KINDS``, "wait" or "decode".
        block: number of the block, for the colour.
        begin: seconds from the first bar.
        seconds: its length.
    """

    row: tuple[int, int]  # stage, row within it
    kind: str
    block: int
    begin: float  # seconds from the first bar
    seconds: float


def picture_of(path: Path) -> Path:
    """The path of a timeline's picture: ``run.png`` for ``run.json.gz``."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".json") + ".png")


def check_matplotlib() -> None:
    """Raises TimelineError when there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TimelineError(
            "the picture of a timeline needs matplotlib, which is not installed: pip install 'dualparal[timeline]'"
        )


def draw(path: Path) -> Path:
    """Draws the timeline at ``path`` beside it and returns the path of the picture.

    Raises:
        TimelineError: matplotlib is missing, the file is not a timeline of ours or holds nothing.
        OSError: a file cannot be read or written.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    bars, more = _bars(path)
    if not bars:
        raise TimelineError(f"{path}: nothing was done, so there is nothing to draw")
    rows = sorted({bar.row for bar in bars})
    figure = Figure(figsize=(14, 1.2 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    groups: dict[tuple[int, str], list[tuple[int, Bar]]] = defaultdict(list)
    for bar in bars:
        coloured = bar.block % BLOCKS if bar.kind in ("compute", "decode") else 0
        groups[coloured, bar.kind].append((rows.index(bar.row), bar))
    for (block, kind), members in groups.items():
        colour = GREY.get(kind, f"C{block}")
        for y in {y for y, _ in members}:
            spans = [(bar.begin, bar.seconds) for at, bar in members if at == y]
            over = kind == "wait"  # lies within its transfer
            axes.broken_barh(spans, (y - 0.4, 0.8), facecolors=colour, linewidth=0, zorder=2 + over)
    end = max(bar.begin + bar.seconds for bar in bars)
    busy: dict[int, float] = defaultdict(float)
    for bar in bars:
        if bar.kind == "compute":
            busy[bar.row[0]] += bar.seconds
    labels = [
        f"stage {stage}, {100 * busy[stage] / end:.0f} % busy" if row == STAGE else f"stage {stage}, decode"
        for stage, row in rows
    ]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_xlabel("seconds" + (f" (the first {end:.1f} of a longer run)" if more else ""))
    axes.spines[["top", "right"]].set_visible(False)
    legend = {
        "compute, decode: a colour per block": "C0",
        "update": "black",
        "receive, send": GREY["send"],
        "wait for another stage": GREY["wait"],
        "wait for the decoder": GREY["queue"],
    }
    axes.legend(
        handles=[Patch(facecolor=colour, label=name) for name, colour in legend.items()],
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(legend), fontsize=8, frameon=False,
    )  # fmt: skip
    target = picture_of(path)
    with whole_file(target) as file:
        figure.savefig(file, dpi=120, format="png")
    return target


def _bars(path: Path) -> tuple[list[Bar], bool]:
    """The bars of a timeline, by time, and True if there were more than ``LIMIT``."""
    spans: list[dict[str, Any]] = []
    more = False
    for event in read(path):
        # A file holds the stages one after the other, each by time: of each its share.
        if event["ph"] != "X" or place(event)[1] not in (STAGE, DECODER):
            continue
        spans.append(event)
        if len(spans) > 2 * LIMIT:
            spans, more = _earliest(spans), True
    if len(spans) > LIMIT:
        spans, more = _earliest(spans), True
    start = min((event["ts"] for event in spans), default=0.0)
    bars = [
        Bar(
            place(event),
            event["cat"],
            event["args"].get("block", 0),
            (event["ts"] - start) / 1e6,
            event["dur"] / 1e6,
        )
        for event in spans
    ]
    return bars, more


def _earliest(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(spans, key=lambda event: event["ts"])[:LIMIT]
