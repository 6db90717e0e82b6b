"""Shapes of attention for tests and benchmarks."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    q_rows: int
    k_rows: int
    heads: int
    head_dim: int
    padding: int = 0  # elements between the rows of k and v

    @property
    def elements(self) -> int:  # of the scores
        return self.q_rows * self.k_rows * self.heads


CASES = [
    Case("wan1.3b-480p", q_rows=8 * 1560, k_rows=16 * 1560, heads=12, head_dim=128),
    Case("wan14b-480p", q_rows=8 * 1560, k_rows=16 * 1560, heads=40, head_dim=128),
    Case("text", q_rows=1560, k_rows=512, heads=12, head_dim=128),
    Case("small-heads", q_rows=77, k_rows=130, heads=2, head_dim=24),
    Case("strided", q_rows=64, k_rows=96, heads=3, head_dim=64, padding=64),
    Case("one-key", q_rows=5, k_rows=1, heads=2, head_dim=64),
    Case("empty", q_rows=0, k_rows=96, heads=2, head_dim=64),
]
