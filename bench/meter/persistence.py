"""Persistence of what a video shows: how long it is held, and the events that end it.

Takes what ``scene_metrics.track`` saw. Frames and pixels are the units; numpy only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from scenes import SIZE, SPEEDS

if TYPE_CHECKING:
    from meter.scene_metrics import Seen

STARTUP = 17  # frames at the start that nothing here looks at: five latents
FLICKER = 9  # frames of the running median of counts: what lasts less than half of it is forgiven
NEAR = 8.0  # pixels, and what an object may move in between: the same object in another colour
AT_SEAM = 6  # frames, a latent and a half: an event so near to the start of a block is at a seam
KINDS = ("lost", "gained", "split", "recoloured")


@dataclass(frozen=True)
class Event:
    """Change of the number of objects that stays. ``frame``: the first one that is different."""

    frame: int
    kind: str


@dataclass(frozen=True)
class _Change:
    """One object more (or less) of a colour, as ``events`` finds it. ``place``: [2], x and y."""

    frame: int
    colour: int
    place: np.ndarray


def smoothed(counts: np.ndarray) -> np.ndarray:
    """Running medians over ``FLICKER`` frames of counts [F, colours] after the start-up, only where all nine are there.

    Row i is frame ``STARTUP + FLICKER // 2 + i``: no frame, first or last, has more votes than another.
    """
    windows = np.lib.stride_tricks.sliding_window_view(counts[STARTUP:], FLICKER, axis=0)
    return np.median(windows, axis=-1).astype(int)


def held(seen: Seen) -> float:
    """Share of the video after the start-up before the number of objects of any colour first differs. 1: to the end.

    It asks nothing of the caption: a wrong count that stays is kept. (An empty video keeps nothing: 0.)
    """
    smooth = smoothed(seen.counts)
    if not smooth[0].any():
        return 0.0
    changed = (smooth != smooth[0]).any(1)
    if not changed.any():
        return 1.0
    return float((changed.argmax() + FLICKER // 2) / (seen.frames - STARTUP))


def events(seen: Seen) -> list[Event]:
    """Objects lost, gained, split and recoloured after the start-up, in order of frames.

    Split: one more of a colour whose area as a whole grew by less than half of an object. Recoloured: one lost, and one
    of another colour gained near the same place, within ``FLICKER`` frames. Two that merge are one lost.
    """
    smooth = smoothed(seen.counts)
    lost: list[_Change] = []
    gained: list[_Change] = []
    found: list[Event] = []
    for row, colour in zip(*np.nonzero(np.diff(smooth, axis=0))):
        frame = STARTUP + FLICKER // 2 + int(row) + 1
        old, area = _objects(seen, frame - 1, colour, smooth[row, colour])
        new, area_after = _objects(seen, frame, colour, smooth[row + 1, colour])
        if len(new) < len(old):
            lost += [_Change(frame, colour, place) for place in _odd(old, new)]
        elif len(old) and area_after.sum() - area.sum() < area_after.mean() / 2:
            found += [Event(frame, "split")] * (len(new) - len(old))
        else:
            gained += [_Change(frame, colour, place) for place in _odd(new, old)]
    for change in gained:
        same = [other for other in lost if _is_recoloured(other, change)]
        if same:
            lost.remove(same[0])
        found.append(Event(change.frame, "recoloured" if same else "gained"))
    found += [Event(change.frame, "lost") for change in lost]
    return sorted(found, key=lambda event: event.frame)


def _objects(seen: Seen, frame: int, colour: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [number, 2] and areas [number] of a colour in the frame nearest to ``frame`` that shows so many.

    There is one among those that ``number`` is the median of.
    """
    showing = np.flatnonzero(seen.counts[:, colour] == number)
    at = showing[abs(showing - frame).argmin()]
    own = (seen.blobs.frame == at) & (seen.blobs.colour == colour)
    return seen.blobs.centre[own], seen.blobs.area[own]


def _away(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distance of places [..., 2] on the torus of the picture."""
    step: np.ndarray = np.linalg.norm((first - second + SIZE / 2) % SIZE - SIZE / 2, axis=-1)
    return step


def _odd(many: np.ndarray, few: np.ndarray) -> np.ndarray:
    """Places of ``many`` that are left when each of ``few`` has taken the one nearest to it, the nearest pair first."""
    distance = _away(many[:, None], few[None])
    left = np.ones(len(many), bool)
    for _ in few:
        taken, by = np.unravel_index(distance.argmin(), distance.shape)
        left[taken] = False
        distance[taken], distance[:, by] = np.inf, np.inf
    return many[left]


def _is_recoloured(lost: _Change, gained: _Change) -> bool:
    apart = abs(lost.frame - gained.frame)
    near = _away(lost.place, gained.place) <= NEAR + SPEEDS[1] * apart
    return lost.colour != gained.colour and apart <= FLICKER and bool(near)


def rates(seen: Seen, starts: list[int]) -> dict[str, float]:
    """Events per 100 frames: of each kind, and of all inside blocks and at seams (NaN without block starts).

    starts: latent frames at which blocks begin, without 0; latent l begins at frame 4 l - 3.
    """
    first = STARTUP + FLICKER // 2 + 1
    frames = np.arange(first, seen.frames - FLICKER // 2)
    seams = np.array([4 * start - 3 for start in starts])
    near = (abs(frames[:, None] - seams) <= AT_SEAM).any(1)
    found = events(seen)
    found_near = near[[event.frame - first for event in found]] if found else np.zeros(0, bool)
    rate = {kind: 100 * sum(event.kind == kind for event in found) / len(frames) for kind in KINDS}
    for name, where, there in (("inside", ~near, ~found_near), ("at_seam", near, found_near)):
        rate[name] = 100 * float(there.sum() / where.sum()) if where.any() else float("nan")
    return rate
