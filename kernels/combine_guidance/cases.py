"""Shapes of combine_guidance for tests and benchmarks."""

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]


CASES = [
    Case("wan-480p-8-frames", (16, 8, 60, 104)),
    Case("ragged", (3, 5, 7, 11)),
    Case("one-past-a-chunk", (2049,)),
    Case("one", (1,)),
    Case("empty", (16, 0, 60, 104)),
]
