"""Shapes of qk_norm_rope for tests and benchmarks."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    rows: int
    heads: int
    head_dim: int
    padding: int = 0  # elements between the rows of k_out and v_out

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
]
