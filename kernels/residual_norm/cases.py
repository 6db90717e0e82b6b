"""Shapes of residual_norm for tests and benchmarks."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    rows: int
    dim: int
    update: bool = True  # is there a y
    gate: bool = True
    weight: bool = True
    bias: bool = True

    @property
    def elements(self) -> int:
        return self.rows * self.dim


CASES = [
    Case("wan1.3b-480p", rows=8 * 1560, dim=1536),
    Case("wan14b-480p", rows=8 * 1560, dim=5120),
    Case("norm1-of-the-first-layer", rows=64, dim=1536, update=False, gate=False),
    Case("norm2-affine", rows=64, dim=1536, gate=False),
    Case("norm-alone", rows=65, dim=96, update=False, gate=False, weight=False, bias=False),
    Case("weight-alone", rows=33, dim=130, gate=False, bias=False),
    Case("ragged", rows=77, dim=515),
    Case("narrow", rows=7, dim=3),
    Case("one-element-rows", rows=5, dim=1),
    Case("one-row", rows=1, dim=5120),
    Case("empty", rows=0, dim=1536),
]
