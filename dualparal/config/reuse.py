"""Steps that the model does not run, by a fixed pattern: velocities are extrapolated from those before. No torch.

The pattern is a function of the number of steps (and, where guidance is confined to some noise levels, of these): the
same for every block, whatever the video and the number of stages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from dualparal.config.blocks import MAX_STEPS, check_int

MAX_ORDER = 2


@dataclass(frozen=True)
class StepPlan:
    """The steps of a sampler at which the model runs.

    Attributes:
        num_steps: of the sampler, T.
        runs: the steps at which the conditional branch is run, increasing; step 0 is one of them. Between two of them
            velocities are extrapolated.
        conditional_only: indices into ``runs``: the unconditional branch is not run besides.
        guided: for each of ``runs``: guidance is combined at it and at the steps up to the next one.
        order: of extrapolation.
        levels: noise levels of all T steps, decreasing from 1 at most.
    """

    num_steps: int
    runs: tuple[int, ...]
    conditional_only: tuple[int, ...]
    guided: tuple[bool, ...]
    order: int
    levels: tuple[float, ...]

    def span(self, run: int) -> range:
        """The sampler's steps that follow from a run: its own, and those that are extrapolated behind it."""
        return range(self.runs[run], self.first_step(run + 1))

    def first_step(self, run: int) -> int:
        """The sampler's step at which a run begins, which is the number of steps before it; T after the last."""
        return self.runs[run] if run < len(self.runs) else self.num_steps

    def known(self, run: int, branch: int) -> tuple[int, ...]:
        """The sampler's steps whose velocities of ``branch`` are kept once ``run`` is done, newest last."""
        if not self._is_extrapolated(branch):
            return ()
        done = [n for n in range(run + 1) if not branch or (self.guided[n] and n not in self.conditional_only)]
        return tuple(self.runs[n] for n in done[-1 - self.order :])

    def _is_extrapolated(self, branch: int) -> bool:
        """True when a branch is wanted somewhere where it is not run."""
        return len(self.runs) < self.num_steps or (branch == 1 and any(self.guided[n] for n in self.conditional_only))

    @property
    def kept(self) -> int:
        """Velocities that are kept of a block at most, of both branches together."""
        return sum(len(self.known(len(self.runs) - 1, branch)) for branch in (0, 1))


@dataclass(frozen=True)
class Reuse:
    """Steps at which the model does not run. Everything is run unless asked for.

    Attributes:
        steps: after the first steps the model runs at every so manieth; 1: at all of them.
        uncond: of the steps at which it runs, those with guidance, every so manieth has the unconditional branch.
        order: of the extrapolation in the noise level, by divided differences: 0 holds the last velocity, 1 is
            linear, 2 quadratic (with fewer velocities than that: as many as there are allow).
        first, last: numbers of steps at both ends that are always run, with both branches; ``first`` below 1: a share
            of all steps, rounded, but at least one.
        low, high: noise levels, 0 to 1, between which there is guidance; elsewhere the conditional branch is alone.

    Raises:
        ValueError: a value is out of range; the message names the value, the rule and the way out.
    """

    steps: int = 1
    uncond: int = 1
    order: int = 1
    first: int | float = 1
    last: int = 1
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1, MAX_STEPS, "of reuse: the model runs at every so manieth step")
        check_int("uncond", self.uncond, 1, MAX_STEPS, "of reuse: the unconditional branch runs at every so manieth")
        check_int("order", self.order, 0, MAX_ORDER, "of reuse: 0 holds, 1 is linear, 2 quadratic")
        if not (isinstance(self.first, float) and 0 < self.first < 1):
            check_int("first", self.first, 1, MAX_STEPS, "of reuse: steps run at the start, or a share of them below 1")
        check_int("last", self.last, 1, MAX_STEPS, "of reuse: steps that are run at the end")
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(
                    f"{name}={value!r} of reuse: a noise level; use a number from 0 (a video) to 1 (noise)"
                )
        if self.low >= self.high:
            raise ValueError(f"low={self.low} and high={self.high} of reuse: no noise level is between; use low < high")

    @classmethod
    def of(cls, text: str | Reuse) -> Reuse:
        """The value of a text: the name of a preset, or fields such as "steps=2,uncond=2,order=1,from=0.2,to=0.9".

        "from" and "to" stand for ``low`` and ``high``. Raises ValueError.
        """
        if isinstance(text, Reuse):
            return text
        if text in PRESETS:
            return PRESETS[text]
        kinds: dict[str, Callable[[str], int | float]] = {"from": float, "to": float, "first": _count_or_share}
        names = {{"low": "from", "high": "to"}.get(item.name, item.name): item.name for item in fields(cls)}
        found: dict[str, int | float] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in names or names[name] in found:
                raise ValueError(
                    f"reuse={text!r}: {part!r} is not understood; use one of {', '.join(PRESETS)}, or a number for any "
                    f"of {', '.join(names)}, once each, such as steps=2,uncond=2"
                )
            try:
                found[names[name]] = kinds.get(name, int)(value)
            except ValueError:
                raise ValueError(f"reuse={text!r}: {name}={value} is not a number of its kind") from None
        return cls(**found)  # type: ignore[arg-type]

    @property
    def on(self) -> bool:
        """True unless everything is run."""
        return self.steps > 1 or self.uncond > 1 or self.low > 0 or self.high < 1

    def runs(self, num_steps: int) -> tuple[int, ...]:
        """The steps of ``num_steps`` at which the model runs."""
        first, last = self._start(num_steps), num_steps - self.last
        return tuple(t for t in range(num_steps) if t < first or t >= last or (t - first + 1) % self.steps == 0)

    def _start(self, num_steps: int) -> int:
        """Steps at the start that are always run."""
        return self.first if isinstance(self.first, int) else max(1, round(self.first * num_steps))

    def plan(self, levels: Sequence[float], guidance: bool) -> StepPlan:
        """The steps that are run, of a sampler with these noise levels.

        Args:
            levels: of every step, T of them.
            guidance: there is an unconditional branch.

        Raises:
            ValueError: levels that do not decrease, between which nothing can be extrapolated.
        """
        total = len(levels)
        if self.on and any(not after < before for before, after in itertools.pairwise(levels)):
            raise ValueError(
                f"reuse with {total} steps: some have the same noise level; use fewer steps, or leave reuse out"
            )
        first, last, runs = self._start(total), total - self.last, self.runs(total)
        guided, only, since = [], [], math.inf
        for number, step in enumerate(runs):
            guided.append(guidance and (not self.on or self.low <= levels[step] <= self.high))
            since += 1
            if guided[-1] and (step < first or step >= last or since >= self.uncond):
                since = 0
            elif guidance:
                only.append(number)
        return StepPlan(total, runs, tuple(only), tuple(guided), self.order, tuple(map(float, levels)))


def _count_or_share(text: str) -> int | float:
    return float(text) if "." in text else int(text)


REUSE_OFF = Reuse()
# Chosen with the quality meter (docs/quality.md): to hold what is there did better than to extrapolate it, and to leave
# out whole steps better than the unconditional branch of more of them. Some 0.6 and 0.4 of all forwards.
PRESETS = {
    "off": REUSE_OFF,
    "mild": Reuse(steps=2, order=0, first=0.2),
    "strong": Reuse(steps=5, order=0, first=0.2),
}
