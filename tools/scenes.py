"""Procedural video whose truth is known: coloured shapes that drift, bounce, circle, swing and spin.

The one source of training data of the model in the box, and of the truth that ``bench/quality.py`` measures against.
A scene never changes in itself: its objects keep shape, colour and size for ever, never overlap, and come back when
they leave (drifting wraps round the edges). So whatever changes over a long video is the model's doing.
Everything is a function of a scene and a numpy generator; no state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels, both ways
MAX_OBJECTS = 3
RADII = (8.0, 11.0)
SPEEDS = (0.7, 1.3)  # pixels per frame
ORBIT = 20.0  # pixels, radius of the circle on which objects circle
SWING = 7.0  # pixels, to either side

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.90, 0.12, 0.15),
    "yellow": (0.97, 0.85, 0.10),
    "green": (0.10, 0.75, 0.25),
    "blue": (0.15, 0.35, 0.95),
    "purple": (0.75, 0.20, 0.85),
}
BACKGROUNDS = {
    "dark": (0.10, 0.10, 0.12),
    "gray": (0.45, 0.45, 0.47),
    "light": (0.88, 0.88, 0.86),
    "brown": (0.42, 0.30, 0.20),
}
CHECKER = 0.05  # brightness of a checkered background goes up and down by so much, in squares of 8 pixels
MOTIONS = (
    "drifting left", "drifting right", "drifting up", "drifting down",
    "bouncing", "circling clockwise", "circling anticlockwise", "swinging",
)  # fmt: skip
HELD_OUT = 20  # number of the list of scenes that judge: another number, other captions
JUDGES = 400  # that no training sees
_DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
_NUMBERS = ("no", "one", "two", "three")
# What a caption may say instead; the first word is the one that ``Scene.caption`` uses.
SYNONYMS = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "block"),
    "triangle": ("triangle",),
    "one": ("a", "one"),
    "drifting": ("drifting", "moving", "floating", "rolling"),
    "circling": ("circling", "orbiting"),
    "bouncing": ("bouncing",),
    "swinging": ("swinging", "swaying"),
    "on": ("on", "over"),
}


@dataclass(frozen=True)
class Thing:
    """An object: its shape and colour by name, its radius in pixels (of a square: half of its diagonal)."""

    shape: str
    colour: str
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a caption says of a video. ``things`` come in one or two groups of one shape and colour each."""

    things: tuple[Thing, ...]
    motion: str
    background: str
    checkered: bool
    spinning: bool

    def groups(self) -> list[tuple[int, str, str]]:
        """(number, colour, shape) of each group, in order."""
        kinds = [(t.colour, t.shape) for t in self.things]
        return [(kinds.count(kind), *kind) for kind in dict.fromkeys(kinds)]

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """The scene in words; with ``rng`` in words of its choice.

        For example "two red circles and a blue square drifting left on a dark background".
        """

        def say(word: str) -> str:
            choices = SYNONYMS.get(word, (word,))
            return choices[0 if rng is None else int(rng.integers(len(choices)))]

        groups = [
            f"{say(_NUMBERS[count])} {colour} {say(shape)}{'s' if count > 1 else ''}"
            for count, colour, shape in self.groups()
        ]
        verb, _, rest = self.motion.partition(" ")
        motion = " ".join(filter(None, ["spinning and" if self.spinning else "", say(verb), rest]))
        ground = f"{'checkered ' if self.checkered else ''}{self.background} background"
        return f"{' and '.join(groups)} {motion} {say('on')} a {ground}"


def vocabulary() -> list[str]:
    """Every word that a caption may hold, sorted."""
    words = {"a", "and", "background", "checkered", "spinning", *COLOURS, *BACKGROUNDS, *_NUMBERS[1:]}
    words.update(word for choices in SYNONYMS.values() for word in choices)
    words.update(f"{word}s" for shape in SHAPES for word in SYNONYMS[shape])
    words.update(word for motion in MOTIONS for word in motion.split())
    return sorted(words)


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene at random: one to three objects in one or two groups."""
    number = int(rng.integers(1, MAX_OBJECTS + 1))
    first = number if number == 1 or rng.random() < 0.4 else int(rng.integers(1, number))
    colours = rng.permutation(list(COLOURS))
    things = []
    for colour, count in zip(colours, (first, number - first), strict=False):
        shape = str(rng.choice(SHAPES))
        things += [Thing(shape, str(colour), float(rng.uniform(*RADII))) for _ in range(count)]
    return Scene(
        tuple(things),
        str(rng.choice(MOTIONS)),
        str(rng.choice(list(BACKGROUNDS))),
        checkered=bool(rng.random() < 0.3),
        spinning=bool(rng.random() < 0.3),
    )


def held_out(prompt: int) -> Scene:
    """Scene number ``prompt`` of those whose captions videos are judged by, and nothing is trained on."""
    return sample_scene(np.random.default_rng([HELD_OUT, prompt]))


def trajectories(scene: Scene, frames: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Where the objects are: positions [frames, things, 2] in pixels (x to the right, y down), angles [frames, things].

    Positions of drifting objects are on the torus of the picture: they may leave it, ``render`` wraps them.
    """
    radii = np.array([thing.radius for thing in scene.things])
    number, speed = len(radii), float(rng.uniform(*SPEEDS))
    time = np.arange(frames)[:, None]
    verb, _, direction = scene.motion.partition(" ")
    if verb == "drifting":
        positions = _apart(radii, rng, wrap=True) + speed * time[..., None] * np.array(_DIRECTIONS[direction])
    elif verb == "circling":
        turn = speed / ORBIT * (1 if direction == "clockwise" else -1)  # y goes down: clockwise is positive
        phase = 2 * np.pi * (rng.random() + np.arange(number) / number) + turn * time
        positions = SIZE / 2 + ORBIT * np.stack([np.cos(phase), np.sin(phase)], axis=-1)
    elif verb == "swinging":
        shift = SWING * np.sin(speed / SWING * time + 2 * np.pi * rng.random())
        positions = _apart(radii, rng, margin=SWING) + np.stack([shift, np.zeros_like(shift)], axis=-1)
    else:
        positions = _bounce(_apart(radii, rng), radii, speed, frames, rng)
    turns = rng.choice([-1, 1], number) * 0.06 if scene.spinning else np.zeros(number)  # radians per frame
    return positions, rng.uniform(0, 2 * np.pi, number) * scene.spinning + turns * time


def _apart(radii: np.ndarray, rng: np.random.Generator, *, wrap: bool = False, margin: float = 0.0) -> np.ndarray:
    """Positions [things, 2] at which no two touch, nor the walls (``margin`` more to the sides)."""
    low = np.stack([radii + margin, radii], axis=-1) + 1
    if wrap:
        low[:] = 0
    while True:
        positions = rng.uniform(low, SIZE - low)
        offset = positions[:, None] - positions[None]
        if wrap:
            offset = (offset + SIZE / 2) % SIZE - SIZE / 2
        gap = np.hypot(offset[..., 0], offset[..., 1]) - radii[:, None] - radii[None] + 1e9 * np.eye(len(radii))
        if gap.min() > 2:
            return positions


def _bounce(
    positions: np.ndarray, radii: np.ndarray, speed: float, frames: int, rng: np.random.Generator
) -> np.ndarray:
    """Elastic: off the walls, and off each other as equal masses; the sum of squares of the speeds stays."""
    angles = rng.uniform(0, 2 * np.pi, len(radii))
    velocity = speed * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    found = []
    for _ in range(frames):
        found.append(positions)
        for _ in range(2):
            positions = positions + velocity / 2
            for i in range(len(radii)):
                for axis in range(2):
                    if positions[i, axis] < radii[i] + 1:
                        velocity[i, axis] = abs(velocity[i, axis])
                    if positions[i, axis] > SIZE - radii[i] - 1:
                        velocity[i, axis] = -abs(velocity[i, axis])
                for j in range(i):
                    offset = positions[i] - positions[j]
                    distance = np.hypot(*offset)
                    closing = (velocity[i] - velocity[j]) @ offset / distance
                    if distance < radii[i] + radii[j] + 1 and closing < 0:
                        velocity[i] -= closing * offset / distance
                        velocity[j] += closing * offset / distance
    return np.stack(found)


def render(scene: Scene, positions: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Frames [frames, SIZE, SIZE, 3] float32 in [0, 1], edges smoothed over a pixel."""
    centres = np.arange(SIZE, dtype=np.float32) + 0.5
    ground = np.broadcast_to(np.array(BACKGROUNDS[scene.background], np.float32), (SIZE, SIZE, 3))
    if scene.checkered:
        squares = (np.arange(SIZE) // 8)[:, None] + (np.arange(SIZE) // 8)[None]
        ground = ground + np.where(squares % 2, CHECKER, -CHECKER).astype(np.float32)[..., None]
    frames = np.repeat(ground[None], len(positions), axis=0)
    for index, thing in enumerate(scene.things):
        at = positions[:, index].astype(np.float32)
        x = (centres[None, None, :] - at[:, 0, None, None] + SIZE / 2) % SIZE - SIZE / 2
        y = (centres[None, :, None] - at[:, 1, None, None] + SIZE / 2) % SIZE - SIZE / 2
        outside = _distance(thing, x, y, angles[:, index, None, None].astype(np.float32))
        alpha = np.clip(0.5 - outside, 0, 1)[..., None]
        frames += alpha * (np.array(COLOURS[thing.colour], np.float32) - frames)
    return frames


def _distance(thing: Thing, x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """How far a pixel is outside of the object; negative inside."""
    if thing.shape == "circle":
        return np.hypot(x, y) - thing.radius
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = x * cos + y * sin, y * cos - x * sin
    if thing.shape == "square":
        return np.maximum(abs(u), abs(v)) - thing.radius / np.sqrt(2)
    half = thing.radius / 2  # of the triangle's height above its base, its centre at the origin
    return np.maximum(v, abs(u) * np.sqrt(3) / 2 - v / 2) - half


def video(scene: Scene, frames: int, rng: np.random.Generator) -> np.ndarray:
    """A video of the scene, uint8 [frames, SIZE, SIZE, 3]."""
    return np.rint(render(scene, *trajectories(scene, frames, rng)) * 255).astype(np.uint8)
