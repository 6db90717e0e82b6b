"""Shapes of fp8 linears for tests and benchmarks."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    rows: int
    width: int  # of the input
    out: int


CASES = [
    Case("demo-qkv", 60, 192, 576),
    Case("demo-ffn-out", 37, 640, 192),
    Case("ragged-rows", 77, 48, 96),
    Case("one-row", 1, 16, 16),
    Case("no-rows", 0, 32, 16),
]
