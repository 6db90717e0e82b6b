"""Measures of a video whose truth is known (tools/scenes.py): what is there, does it stay, does it move as it was told.

Every measure takes uint8 frames [F, 64, 64, 3] or what ``track`` saw in them, and numbers that it needs of the
``Scene`` that was asked for. Times are in frames, lengths in pixels, colours in [0, 1]. numpy only; what needs many
videos (Frechet distance, diversity) is in ``quality.py``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from scenes import BACKGROUNDS, COLOURS, ORBIT, SIZE, SPEEDS, SWING, Scene

from meter import persistence

COLOUR_NAMES, COLOUR_VALUES = tuple(COLOURS), np.array(list(COLOURS.values()), np.float32)
GROUND_VALUES = np.array(list(BACKGROUNDS.values()), np.float32)
OPAQUE = 0.5  # a pixel that is more object than background
OFF_PALETTE = 0.25  # a pixel this far from any mix of the background and one colour belongs to nobody
DEEP = 12  # pixels of a piece that is left three pixels in; a circle of radius 7 has 50
MIN_AREA = 25.0  # pixels; the smallest object of a scene, a triangle of radius 7, has 64
FAR = 8.0  # pixels between two frames: not the same object
ENDS = 16  # frames at the start and at the end that drift compares
WINDOW = 24  # frames in which a motion is judged
SLOW = SPEEDS[0] / 2  # pixels per frame: less does not count as moving
CHUNK = 64  # frames at a time, for memory


@dataclass(frozen=True)
class Blobs:
    """Objects found, one row each, in order of frames."""

    frame: np.ndarray  # [blobs]
    colour: np.ndarray  # [blobs], index into COLOUR_NAMES
    area: np.ndarray  # [blobs], pixels; edge pixels count by their share
    centre: np.ndarray  # [blobs, 2], x and y
    contrast: np.ndarray  # [blobs], its inner pixels' distance from the background over that of the palette's colours


@dataclass(frozen=True)
class Track:
    """The objects of one colour while their number stays: positions [frames, objects, 2], not wrapped."""

    start: int
    colour: int
    positions: np.ndarray


@dataclass(frozen=True)
class Seen:
    """What ``track`` saw."""

    blobs: Blobs
    counts: np.ndarray  # [frames, colours]
    background: np.ndarray  # [frames, 3]
    tracks: tuple[Track, ...]

    @property
    def frames(self) -> int:
        return len(self.counts)


# Seeing --------------------------------------------------------------------------------------------------------


def track(frames: np.ndarray) -> Seen:
    """Finds the objects in every frame and follows them.

    The background of a frame is its median colour. A pixel is a mix of the background and one palette colour: the
    colour whose line from the background passes nearest; the share of colour is its alpha. Objects are 4-connected
    pixels of one colour on the torus of the picture with alpha of at least ``OPAQUE``, without their outermost
    pixels and cut where they only touch (``_split``), then grown back by three with their blurred rim. Less than
    ``MIN_AREA``: nobody.
    """
    parts, background = [], np.empty((len(frames), 3), np.float32)
    for first in range(0, len(frames), CHUNK):
        pixels = frames[first : first + CHUNK].astype(np.float32) / 255
        found, background[first : first + CHUNK] = _find(pixels)
        found["frame"] += first
        parts.append(found)
    blobs = Blobs(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    counts = np.zeros((len(frames), len(COLOUR_NAMES)), int)
    np.add.at(counts, (blobs.frame, blobs.colour), 1)
    return Seen(blobs, counts, background, tuple(_follow(blobs, counts)))


def _find(pixels: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    ground = np.median(pixels.reshape(len(pixels), -1, 3), axis=1)  # [F, 3]
    colour, alpha, off = _unmix(pixels, ground)
    kind = np.where((alpha >= OPAQUE) & (off <= OFF_PALETTE), colour, -1)
    core = _split(kind)
    label, rim = core, (alpha > 0.1) & (off <= OFF_PALETTE)
    for _ in range(3):
        label = _grow(label, colour, rim)
    # A checkered background has two levels, and the median is one of them.
    away = (alpha < OPAQUE) & (label < 0)
    background = np.where(away[..., None], pixels, 0).sum((1, 2)) / np.maximum(away.sum((1, 2)), 1)[:, None]
    return _measure(label, core, colour, alpha, pixels, background), background


def _split(kind: np.ndarray) -> np.ndarray:
    """Labels of objects without their outermost pixels; -1 elsewhere. kind: colour or -1.

    Circles a fraction of a pixel apart are joined by some rows of full pixels. Three pixels in they are two again,
    whereas what is convex stays in one piece however much is taken off.
    """
    inner = _erode(kind)
    label, deep = _components(inner), _components(_erode(_erode(inner)))
    for piece in np.flatnonzero(np.bincount(deep[deep >= 0], minlength=1) < DEEP):
        deep[deep == piece] = -1
    pairs = np.unique(np.stack([label[deep >= 0], deep[deep >= 0]]), axis=1)
    parents, pieces = np.unique(pairs[0], return_counts=True)
    joined = np.isin(label, parents[pieces > 1])
    if joined.any():
        parts = np.where(joined & (deep >= 0), deep + label.max() + 1, -1)
        for _ in range(2):
            parts = _grow(parts, inner, joined)
        label = np.where(joined, parts, label)
        label[label >= 0] = np.unique(label[label >= 0], return_inverse=True)[1]  # no gaps in the numbers
    return label


def _erode(kind: np.ndarray) -> np.ndarray:
    inside = kind >= 0
    for shift in _NEIGHBOURS:
        inside &= np.roll(kind, shift, (1, 2)) == kind
    return np.where(inside, kind, -1)


def _grow(label: np.ndarray, colour: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Labels by one pixel larger, into pixels of ``where`` of their colour."""
    for shift in _NEIGHBOURS:
        free = (label < 0) & where & (np.roll(colour, shift, (1, 2)) == colour)
        label = np.where(free, np.roll(label, shift, (1, 2)), label)
    return label


_NEIGHBOURS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def _unmix(pixels: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, ...]:
    """Per pixel: the colour it is mixed with, that colour's share in [0, 1], and the distance that is left."""
    line = COLOUR_VALUES[None] - ground[:, None]  # [F, K, 3]
    length = (line**2).sum(-1)[:, None]
    delta = (pixels - ground[:, None, None]).reshape(len(pixels), -1, 3)
    dot = delta @ line.transpose(0, 2, 1)  # [F, pixels, K]
    share = np.clip(dot / length, 0, 1)
    left = (delta**2).sum(-1, keepdims=True) - 2 * share * dot + share**2 * length
    colour = left.argmin(-1)

    def of(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, colour[..., None], -1)[..., 0].reshape(pixels.shape[:3])

    return colour.reshape(pixels.shape[:3]), of(share), np.sqrt(np.maximum(of(left), 0))


def _components(kind: np.ndarray) -> np.ndarray:
    """Labels [F, H, W] from 0 of 4-connected equal pixels on the torus; -1 where kind is negative."""
    node = np.full(kind.shape, -1)
    inside = kind >= 0
    node[inside] = np.arange(inside.sum())
    edges = []
    for axis in (1, 2):
        joined = inside & (np.roll(kind, -1, axis) == kind)
        edges.append(np.stack([node[joined], np.roll(node, -1, axis)[joined]]))
    a, b = np.concatenate(edges, axis=1)
    root = np.arange(inside.sum())
    while True:  # smallest number wins; every pass halves the way to it
        least = np.minimum(root[a], root[b])
        if (root[a] == root[b]).all():
            break
        np.minimum.at(root, root[a], least)
        np.minimum.at(root, root[b], least)
        root = root[root]
    label = np.full(kind.shape, -1)
    label[inside] = np.unique(root, return_inverse=True)[1]
    return label


def _measure(
    label: np.ndarray,
    core: np.ndarray,
    colour: np.ndarray,
    alpha: np.ndarray,
    pixels: np.ndarray,
    background: np.ndarray,
) -> dict[str, np.ndarray]:
    number = int(label.max(initial=-1)) + 1
    frame, y, x = np.nonzero(label >= 0)
    which = label[label >= 0]
    _, first = np.unique(which, return_index=True)
    in_core = core[label >= 0] >= 0

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(which, weights, number)

    def inner_mean(values: np.ndarray) -> np.ndarray:
        return total(values * in_core) / np.maximum(total(in_core), 1)

    share = alpha[label >= 0]
    share = np.minimum(share / inner_mean(share)[which], 1)  # a pale object is not a small one
    origin = np.stack([x[first], y[first]], -1)
    offset = (np.stack([x, y], -1) - origin[which] + SIZE // 2) % SIZE - SIZE // 2
    area = total(share)
    mean = np.stack([total(share * offset[:, axis]) for axis in range(2)], -1) / np.maximum(area, 1e-9)[:, None]
    kind, at = colour[frame[first], y[first], x[first]], frame[first]
    inside = np.stack([inner_mean(pixels[label >= 0][:, channel]) for channel in range(3)], -1)
    nearest = np.linalg.norm(background[:, None] - GROUND_VALUES, axis=-1).argmin(1)
    full = np.linalg.norm(COLOUR_VALUES[kind] - GROUND_VALUES[nearest[at]], axis=-1)
    found = {
        "frame": at,
        "colour": kind,
        "area": area,
        "centre": (origin + mean + 0.5) % SIZE,
        "contrast": np.linalg.norm(inside - background[at], axis=-1) / full,
    }
    keep = np.flatnonzero(area >= MIN_AREA)
    keep = keep[np.argsort(found["frame"][keep], kind="stable")]
    return {name: values[keep] for name, values in found.items()}


def _follow(blobs: Blobs, counts: np.ndarray) -> list[Track]:
    """Per colour, runs of frames with the same number of objects, each matched to the nearest of the frame before."""
    tracks = []
    for colour in range(counts.shape[1]):
        own = blobs.colour == colour
        places = np.split(blobs.centre[own], np.cumsum(counts[:, colour])[:-1])
        run: list[np.ndarray] = []
        for frame, here in enumerate([*places, np.zeros((0, 2))]):  # the last one ends the last run
            if run and len(run[-1]) == len(here):
                moves = [(here[list(order)] - run[-1] + SIZE / 2) % SIZE - SIZE / 2 for order in _orders(len(here))]
                move = min(moves, key=lambda step: (step**2).sum())
                if (move**2).sum(-1).max() <= FAR**2:
                    run.append(run[-1] + move)
                    continue
            if len(run) > 2:
                tracks.append(Track(frame - len(run), colour, np.stack(run)))
            run = [here] if len(here) else []
    return tracks


def _orders(number: int) -> list[tuple[int, ...]]:
    """Ways to match; of more objects than a scene has, only the first ones are tried in every order."""
    return [(*order, *range(min(number, 4), number)) for order in permutations(range(min(number, 4)))]


# Measures of one video -----------------------------------------------------------------------------------------


def expected_counts(scene: Scene) -> np.ndarray:
    """Objects per colour that the caption asks for."""
    return np.array([sum(thing.colour == name for thing in scene.things) for name in COLOUR_NAMES])


def seam_energy(frames: np.ndarray, starts: list[int]) -> float:
    """Second temporal difference where a block begins, over that where another latent frame begins.

    starts: latent frames at which blocks begin, without 0. Latent l > 0 is frames 4l - 3 to 4l. Its energy is the
    mean square over pixels of x[t-1] - 2 x[t] + x[t+1] at t = 4l - 4 to 4l - 1: from the step into it on, as a
    decoder smears a step over some frames. The figure is the mean energy of block starts over that of the latents
    near it: 2 and 1 before and 2 after (1 after may still ring, the decoder is causal). Objects swing and bounce:
    frames far away have another motion. 1: seams cannot be told from other frames. NaN without block starts.
    """
    latents, seams = (len(frames) - 1) // 4 + 1, set(starts)
    inside = [start + shift for start in starts for shift in (-2, -1, 2)]
    inside = [latent for latent in inside if 2 <= latent < latents and latent not in seams]
    if not starts or not inside:
        return float("nan")

    def energy(latent: int) -> float:
        near = frames[4 * latent - 5 : 4 * latent + 1].astype(np.float32) / 255
        return float(np.square(np.diff(near, n=2, axis=0)).mean())

    tiny = 1e-6  # of a picture that stands still
    return (np.mean([*map(energy, starts)]) + tiny) / (np.mean([*map(energy, inside)]) + tiny)


def counts_right(seen: Seen, scene: Scene) -> np.ndarray:
    """[frames] bool: as many objects of every colour as the caption says, and none of another colour."""
    return (seen.counts == expected_counts(scene)).all(1)


def counts_wrong(seen: Seen, scene: Scene) -> dict[str, float]:
    """Shares of frames with too many objects, with too few, and with as many as asked for but in other colours."""
    asked = expected_counts(scene)
    more = seen.counts.sum(1) - asked.sum()
    other = (more == 0) & (seen.counts != asked).any(1)
    return {"many": float((more > 0).mean()), "few": float((more < 0).mean()), "colour": float(other.mean())}


def motion_right(seen: Seen, scene: Scene) -> float:
    """Share of windows of ``WINDOW`` frames, over tracked objects, in which they move as the caption says.

    Drifting: the mean velocity has at least ``SLOW`` in the direction, and at most half of that across.
    Circling: the mean velocity along the circle round the middle of the picture is at least ``SLOW``, in the right
    sense, and the distance from the middle is the orbit's within 8 pixels.
    Swinging: x changes by at least 2 pixels, y by at most half as much, and x stays within the swing and 4 pixels.
    Bouncing: the root mean square speed of all is at least ``SLOW`` (objects hand on their speed), and no centre
    comes nearer than 4 pixels to the wall.
    """
    verb, _, rest = scene.motion.partition(" ")
    good: list[bool] = []
    pooled: dict[int, list[tuple[float, bool]]] = {}
    for part in seen.tracks:
        centre = np.median(part.positions, axis=0)
        for first in range(0, len(part.positions) - WINDOW + 1, WINDOW):
            window = part.positions[first : first + WINDOW]
            speed = np.diff(window, axis=0)
            if verb == "drifting":
                axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[rest]
                mean = speed.mean(0)
                along = sign * mean[:, axis]
                good += list((along >= SLOW) & (abs(mean[:, 1 - axis]) <= along / 2))
            elif verb == "circling":
                arm = window % SIZE - SIZE / 2
                radius = np.linalg.norm(arm, axis=-1)
                mid = (arm[1:] + arm[:-1]) / 2
                turning = (mid[..., 0] * speed[..., 1] - mid[..., 1] * speed[..., 0]) / np.maximum(radius[1:], 1)
                sign = 1 if rest == "clockwise" else -1
                good += list((sign * turning.mean(0) >= SLOW) & (abs(radius - ORBIT).max(0) <= 8))
            elif verb == "swinging":
                reach = np.ptp(window, axis=0)
                near = abs(window - centre)[..., 0].max(0) <= 2 * SWING + 4
                good += list((reach[:, 0] >= 2) & (reach[:, 1] <= reach[:, 0] / 2) & near)
            else:
                wall = SIZE / 2 - abs(window % SIZE - SIZE / 2)
                for thing in range(window.shape[1]):
                    entry = float((speed[:, thing] ** 2).sum(-1).mean()), bool(wall[:, thing].min() >= 4)
                    pooled.setdefault((part.start + first) // WINDOW, []).append(entry)
    for entries in pooled.values():
        fast = np.mean([square for square, _ in entries]) >= SLOW**2
        good += [bool(fast and inside) for _, inside in entries]
    return float(np.mean(good)) if good else float("nan")


def background_drift(seen: Seen) -> np.ndarray:
    """[frames] distance of the background's colour (RGB) from its mean over the first ``ENDS`` frames."""
    return np.linalg.norm(seen.background - seen.background[:ENDS].mean(0), axis=-1)


def background_right(seen: Seen, scene: Scene) -> np.ndarray:
    """[frames] bool: of the four backgrounds, the caption's is the nearest."""
    nearest = np.linalg.norm(seen.background[:, None] - GROUND_VALUES, axis=-1).argmin(1)
    return nearest == list(BACKGROUNDS).index(scene.background)


def contrast_kept(seen: Seen) -> float:
    """Contrast of the last ``ENDS`` frames over that of the first.

    The contrast of an object is the distance of its inner colour from the background's, over the same of the palette.
    """
    blobs = seen.blobs
    start, end = blobs.frame < ENDS, blobs.frame >= seen.frames - ENDS
    if not start.any() or not end.any():
        return float("nan")
    return float(blobs.contrast[end].mean() / blobs.contrast[start].mean())


def measure(frames: np.ndarray, scene: Scene, starts: list[int]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """All figures of one video, and its curves over frames. ``starts``: see ``seam_energy``."""
    seen = track(frames)
    right, drift = counts_right(seen, scene), background_drift(seen)
    kept = persistence.held(seen)
    figures = {
        "seam": seam_energy(frames, starts),
        "right": float(right.mean()),
        **counts_wrong(seen, scene),
        "held": kept,
        "kept": float(kept == 1),
        **persistence.rates(seen, starts),
        "motion": motion_right(seen, scene),
        "ground": float(drift[-ENDS:].mean()),
        "contrast": contrast_kept(seen),
        "ground_right": float(background_right(seen, scene).mean()),
    }
    return figures, {"right": right.astype(np.float32), "ground": drift.astype(np.float32)}
