"""The optimizer of tools/train_transformer.py against torch's, which rounds to bfloat16."""

from __future__ import annotations

import torch
from muon import Float32Muon, orthogonal

SHAPES = ((48, 48), (96, 32), (32, 96))  # square, tall, wide
OPTIONS = {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.9}


def test_steps_are_those_of_torch_up_to_its_rounding() -> None:
    generator = torch.Generator().manual_seed(3)
    first = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in first] for _ in range(2))
    optimizers = Float32Muon(ours, **OPTIONS), torch.optim.Muon(theirs, **OPTIONS)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, begin in zip(ours, theirs, first, strict=True):
        assert (mine - other).norm() < 0.03 * (other - begin).norm()
    averages = [[state["momentum_buffer"] for state in optimizer.state.values()] for optimizer in optimizers]
    for mine, other in zip(*averages, strict=True):  # a run of one goes on with the other
        torch.testing.assert_close(mine, other)


def test_matrices_are_made_orthogonal() -> None:
    for shape in SHAPES[1:]:
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
        assert values.min() > 0.6 and values.max() < 1.3, (shape, values)
