"""Shapes of 8-bit attention for tests and benchmarks."""

from typing import NamedTuple

from . import place


class Case(NamedTuple):
    name: str
    q_rows: int
    segments: tuple[tuple[int, int], ...]  # (rows, skip) of each
    heads: int
    head_dim: int
    padding: int = 0  # elements between the rows of k and v

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def spans(self) -> list[int]:
        return place(self.segments)

    @property
    def elements(self) -> int:  # of the scores
        return self.q_rows * self.spans[-1] * self.heads


# The next block lends its first frames, the previous one its last, which start in the middle of a tile.
CASES = [
    Case("wan1.3b-480p", 8 * 1560, ((8 * 1560, 0), (4 * 1560, 0), (4 * 1560 + 96, 96)), heads=12, head_dim=128),
    Case("wan14b-480p", 8 * 1560, ((8 * 1560, 0), (4 * 1560, 0), (4 * 1560 + 96, 96)), heads=40, head_dim=128),
    Case("one-segment", 70, ((200, 0),), heads=2, head_dim=64),
    Case("whole-tiles", 64, ((128, 0), (128, 0)), heads=1, head_dim=128),
    Case("three-ragged", 33, ((130, 0), (77, 20), (70, 69)), heads=2, head_dim=64),
    Case("empty-own", 17, ((0, 0), (90, 3)), heads=1, head_dim=64),
    Case("empty-neighbours", 17, ((65, 0), (0, 0), (0, 0)), heads=1, head_dim=64),
    Case("empty-between", 20, ((65, 0), (0, 0), (129, 65)), heads=1, head_dim=128),
    Case("ends-in-one-block", 9, ((40, 30), (20, 10), (128, 64)), heads=2, head_dim=64),
    Case("one-key", 5, ((1, 0),), heads=2, head_dim=64),
    Case("strided", 40, ((96, 0), (96, 32)), heads=2, head_dim=64, padding=64),
    Case("no-queries", 0, ((96, 0),), heads=2, head_dim=64),
]
