"""Shapes of qk_norm_rope for tests and benchmarks."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    rows: int
    heads: int
    head_dim: int
    padding: int = 0  # elements between the rows of k_out and v_out
    lends: tuple[tuple[int, int], ...] = ()  # first row and number of rows

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def elements(self) -> int:
        return 3 * self.rows * self.inner


CASES = [
    Case("wan1.3b-480p", rows=8 * 1560, heads=12, head_dim=128),
    Case("wan14b-480p", rows=8 * 1560, heads=40, head_dim=128),
    Case("wan1.3b-few-rows", rows=67, heads=12, head_dim=128),
    Case("small-heads", rows=77, heads=2, head_dim=24),
    Case("strided", rows=65, heads=3, head_dim=64, padding=128),
    Case("odd-stride", rows=65, heads=3, head_dim=64, padding=7),
    Case("head-of-six", rows=19, heads=5, head_dim=6, padding=1),
    Case("one-pair", rows=3, heads=1, head_dim=2),
    Case("one-row", rows=1, heads=12, head_dim=128, padding=64),
    Case("empty", rows=0, heads=12, head_dim=128),
    Case("wan1.3b-480p-lends", rows=8 * 1560, heads=12, head_dim=128, lends=((0, 4 * 1560), (4 * 1560, 4 * 1560))),
    Case("wan1.3b-few-rows-lends", rows=67, heads=12, head_dim=128, lends=((0, 33), (34, 33))),
    Case("lends-overlap", rows=7, heads=3, head_dim=64, padding=7, lends=((0, 5), (2, 5))),
    Case("lends-everything-twice", rows=5, heads=2, head_dim=24, lends=((0, 5), (0, 5))),
    Case("lends-the-middle", rows=9, heads=5, head_dim=6, lends=((3, 4),)),
    Case("lends-two-sizes", rows=3, heads=1, head_dim=2, lends=((2, 1), (0, 2))),
]
