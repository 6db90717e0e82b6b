"""The helper that thins out tests of many choices: no pair may get lost."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from pairwise import pairwise


@pytest.mark.parametrize(
    "lengths, most",
    [
        ((2, 3), 6),
        ((3, 7, 2), 21),
        ((2, 7, 4), 28),
        ((3, 3, 4), 12),
        ((2, 2, 2), 4),
        ((5, 3, 2, 2), 15),
        ((1, 1, 1), 1),
    ],
    ids=str,
)
def test_every_pair_occurs_in_few_rows(lengths: tuple[int, ...], most: int) -> None:
    axes = [[f"{axis}{index}" for index in range(length)] for axis, length in zip("abcd", lengths, strict=False)]
    rows = pairwise(*axes)
    for one, two in combinations(range(len(axes)), 2):
        assert {(row[one], row[two]) for row in rows} == set(product(axes[one], axes[two]))
    assert len(set(rows)) == len(rows) <= most
