"""Error metrics for tests, benchmarks and ``dualparal calibrate``. Nothing here is used when a video is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def assert_no_worse(ours: torch.Tensor, than: torch.Tensor, truth: torch.Tensor, factor: float, case: str) -> None:
    """Raises AssertionError with the text of ``excess``, if there is one, and the name of the case."""
    if problem := excess(ours, than, truth, factor):
        raise AssertionError(f"{case}: {problem}")  # also under -O


def excess(ours: torch.Tensor, than: torch.Tensor, truth: torch.Tensor, factor: float) -> str:
    """The error of ``ours`` beyond that of plain PyTorch in the same dtype, in words; empty when there is none.

    Two errors are compared, the largest and the root mean square; each may be ``factor`` times that of
    ``than``. What one rounding of the output costs is always allowed: no method can do without it.

    Args:
        ours, than: one shape, one dtype.
        truth: the same shape, float64.
    """
    if not ours.shape == than.shape == truth.shape:
        return f"{ours.shape}, {than.shape}, {truth.shape}"
    if ours.dtype != than.dtype:
        return f"dtype {ours.dtype}, expected {than.dtype}"
    if truth.dtype != torch.float64:
        return f"the truth is {truth.dtype}, expected float64"
    if ours.numel() == 0:
        return ""
    error = (ours.double() - truth).abs()
    baseline = (than.double() - truth).abs()
    worst = torch.unravel_index(error.nan_to_num(nan=torch.inf).argmax(), error.shape)
    place = f"largest at {[int(i) for i in worst]}: {ours[worst].item():g}, truth {truth[worst].item():g}"
    wrong = int((~error.isfinite()).sum())
    if wrong:
        return f"{wrong} of {ours.numel()} elements are not finite; {place}"

    rounding = torch.finfo(ours.dtype).eps / 2
    for name, ours_is, baseline_is, floor in (
        ("largest", error.max(), baseline.max(), rounding * truth.abs().max()),
        ("rms", rms(error), rms(baseline), rounding / 2 * rms(truth)),
    ):
        limit = max(factor * baseline_is.item(), floor.item())
        if not ours_is <= limit:  # a limit that is NaN is exceeded
            return (
                f"{name} error {ours_is:.3e} exceeds {limit:.3e} "
                f"({factor:g} x {baseline_is:.3e} of plain PyTorch, one rounding {floor:.3e}); {place}"
            )
    return ""


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().mean().sqrt()


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Makes torch.empty and torch.empty_like give NaN, so that an element nobody wrote shows."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan)
    torch.empty_like = lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
