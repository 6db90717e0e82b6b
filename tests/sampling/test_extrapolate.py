"""Extrapolated velocities: polynomials of their order exactly."""

from __future__ import annotations

import pytest
import torch

from dualparal.sampling.extrapolate import extrapolate


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_of_the_order_is_met(order: int) -> None:
    levels = [0.97, 0.9, 0.71][-1 - order :]
    coefficients = torch.randn(order + 1, 2, 3, generator=torch.Generator().manual_seed(0))

    def at(level: float) -> torch.Tensor:
        return sum(c * level**power for power, c in enumerate(coefficients))  # type: ignore[return-value]

    found = extrapolate([at(level) for level in levels], levels, 0.5)
    torch.testing.assert_close(found, at(0.5), atol=1e-5, rtol=0)
    assert order == 0 or not torch.allclose(extrapolate([at(levels[-1])], levels[-1:], 0.5), at(0.5), atol=1e-3)
