"""Few combinations of many choices, for tests whose choices meet two at a time."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows with one value of every axis, in which every two values of different axes meet at least once.

    Greedy, and the same for the same axes in every process. Of three axes there are about as many rows as the two
    longest have pairs; of two axes it is the full product.
    """
    values = [list(axis) for axis in axes]
    places = [[(axis, index) for index in range(len(listed))] for axis, listed in enumerate(values)]
    missing = dict.fromkeys((a, b) for first, second in combinations(places, 2) for a in first for b in second)

    def gain(place: tuple[int, int], row: list[tuple[int, int]]) -> int:
        return sum((min(place, other), max(place, other)) in missing for other in row)

    def complete(pair: tuple[tuple[int, int], tuple[int, int]]) -> list[tuple[int, int]]:
        row = list(pair)
        for axis in range(len(values)):
            if axis not in (pair[0][0], pair[1][0]):
                row.append(max(places[axis], key=lambda place: gain(place, row)))
        return sorted(row)

    rows = []
    while missing:
        row = max(map(complete, missing), key=lambda row: sum(gain(place, row) for place in row))
        for pair in combinations(row, 2):
            missing.pop(pair, None)
        rows.append(tuple(values[axis][index] for axis, index in row))
    return rows
