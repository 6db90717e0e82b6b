"""Muon whose Newton-Schulz iteration computes in float32, for processors that have no bfloat16.

``torch.optim.Muon`` rounds to bfloat16 for it. Without instructions for that a processor emulates them, and a step of
the optimizer takes longer than the step of the model: tools/README.md has figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

QUINTIC = 3.4445, -4.7750, 2.0315  # coefficients of Keller Jordan, as torch's
ITERATIONS = 5


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Returns ``matrix`` [rows, columns] with singular values near 1: between 0.68 and 1.14, unless they are tiny."""
    a, b, c = QUINTIC
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Float32Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` with Nesterov's momentum; its state has the same name, so that either goes on with it.

    Args:
        params: matrices.
        lr: learning rate; of tall matrices it is sqrt(rows / columns) times as large.
        weight_decay: of a step, times ``lr``.
        momentum: share of the average of gradients that a step keeps.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Changes every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                average = state.setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(average, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                rows, columns = matrix.shape
                matrix.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))
