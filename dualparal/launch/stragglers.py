"""Finds the stage that is slower than its share of the work explains, from what ranks say of themselves."""

from __future__ import annotations

import logging
from statistics import median_low

logger = logging.getLogger("dualparal")

FACTOR = 1.5
ITERATIONS = 3
# Below that the difference is the noise of a busy host, and costs nobody anything.
_LEAST_SECONDS = 0.1  # per layer


class SlowStages:
    """Hears the busy time of stages, iteration by iteration, and warns once of the first that falls behind.

    A stage is slow when its busy time per layer is more than `FACTOR` times the median of all stages in `ITERATIONS`
    iterations in a row. Of an even number of stages the lower middle is the median: of two, the quicker. The time in
    which a decoder works beside a stage is not held against it.

    Attributes:
        warned: the rank that was warned of; None: none so far.
    """

    def __init__(self, num_stages: int, places: int = 1) -> None:
        """Makes one for a run.

        Args:
            num_stages: stages of the run.
            places: ranks of each; every one counts like a stage.
        """
        # By iteration, not yet compared.
        ranks, self._places = num_stages * places, places
        self._totals: list[dict[int, tuple[float, float]]] = [{} for _ in range(ranks)]
        self._last = [(0.0, 0.0)] * ranks
        self._streak = [0] * ranks
        self.warned: int | None = None

    def note(self, rank: int, iteration: int, busy: float, decoding: float = 0.0) -> None:
        """Notes ``busy``, the seconds per layer that a stage's rank had spent in units when the iteration began.

        Args:
            rank: of a stage.
            iteration: its number.
            busy: seconds per layer.
            decoding: the same of the decoder beside it, which slows units by as much at the worst.
        """
        if self.warned is not None:
            return
        self._totals[rank][iteration] = busy, decoding
        if all(iteration in totals for totals in self._totals):
            self._compare([totals[iteration] for totals in self._totals])
            # A message may be lost: what is older will not be completed any more.
            self._totals = [{i: b for i, b in totals.items() if i > iteration} for totals in self._totals]

    def _compare(self, totals: list[tuple[float, float]]) -> None:
        pairs = list(zip(totals, self._last, strict=True))
        usual = median_low([now[0] - before[0] for now, before in pairs])
        spent = [now[0] - before[0] - (now[1] - before[1]) for now, before in pairs]
        self._last = totals
        for stage, seconds in enumerate(spent):
            slow = seconds > FACTOR * usual and seconds - usual > _LEAST_SECONDS
            self._streak[stage] = self._streak[stage] + 1 if slow else 0
        worst = max(range(len(spent)), key=lambda stage: spent[stage])
        if self._streak[worst] >= ITERATIONS:
            self.warned = worst
            logger.warning(
                "stage %d (rank %d) takes %.1f times as long per layer as the others: everybody waits for it; "
                "is its card shared, hot, or another model?",
                worst // self._places, worst, spent[worst] / usual if usual else float("inf"),
            )  # fmt: skip
