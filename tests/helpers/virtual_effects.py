"""Faults as they came true, and the limits of the supervisor in the simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dualparal.launch.blame import Limits

LIMITS = Limits(heartbeat=2.5, progress=6.0, startup=8.0, grace=3.0)
FOREVER = float("inf")
START = 1000.0  # the monotonic clock is not at 0


class Broken(Exception):
    """A promise that a run did not keep."""


@dataclass(frozen=True)
class Effect:
    """A fault as it came true.

    Attributes:
        kind: of the fault. at: the time. value: seconds, exit code or text of it.
        active: the rank was at work, and had not complained.
        starting, waiting: by its own account.
    """

    kind: str
    rank: int
    at: float
    value: Any
    active: bool
    starting: bool
    waiting: bool
    exit_code: int | None = None
