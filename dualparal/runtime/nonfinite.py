"""The origin of NaN or infinity, found without waiting for the device.

Every stage marks the tensors that it gives on: the mark is one element behind the tensor of a message, 0 while all is
finite, else 1 + the first stage whose output was not. Stage 0 keeps the first one that comes back. Marks are read only
when a block is about to be given out, where the host waits for the device in any case.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dualparal.schedule.actions import Unit

_STAGES = 256  # integers up to here are exact in every dtype of ours
_UPDATE = _STAGES - 1  # in place of a stage: what stage 0 was to work on
_STEPS = 1 << 14


class Origin(NamedTuple):
    """The unit and the stage that first gave out NaN or infinity. Stage None: its latents had them before."""

    video: int
    block: int
    step: int
    stage: int | None

    def __str__(self) -> str:
        where = "the latents (noise, sampler or callback)" if self.stage is None else f"stage {self.stage}"
        return f"{where} at block {self.block}, step {self.step}"


def mark(tensor: torch.Tensor, before: torch.Tensor | None, stage: int | None) -> torch.Tensor:
    """The mark of a unit after a stage: [1] on the device, in the dtype of ``tensor``.

    Args:
        tensor: the output of the stage.
        before: the mark with which the unit came; None: it had none yet.
        stage: number of the stage; None: the latents before the first one.
    """
    own = _UPDATE if stage is None else min(stage, _UPDATE - 1)
    # One pass without a copy: a sum is finite where all elements are (and in float32 does not overflow).
    finite = torch.isfinite(tensor.sum(dtype=torch.float32))
    # Multiplied, not chosen by torch.where, which makes tensors of its numbers first.
    bad = (~finite).to(tensor.dtype) * (1 + own)
    return bad.view(1) if before is None else torch.where(before > 0, before, bad)


class FirstMark:
    """The first mark that came back to stage 0."""

    def __init__(self, device: torch.device) -> None:
        self._code = torch.zeros(1, dtype=torch.int64, device=device)  # 0: none

    def take(self, unit: Unit, found: torch.Tensor) -> None:
        """Notes the mark [1] of a unit that came back; only the first one above 0 is kept."""
        code = ((unit.video << 31 | unit.block) * _STEPS + unit.step) * (_STAGES + 1)
        self._code = torch.where((self._code == 0) & (found > 0), code + found.to(torch.int64), self._code)

    def origin(self) -> Origin | None:
        """The unit and stage of the first mark above 0, or None. Waits for the device."""
        code = int(self._code.item())
        if code == 0:
            return None
        place, found = divmod(code, _STAGES + 1)
        place, step = divmod(place, _STEPS)
        return Origin(place >> 31, place & (1 << 31) - 1, step, None if found - 1 == _UPDATE else found - 1)
