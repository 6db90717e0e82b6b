"""Moves of tensors to a device that the host does not wait for."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; on its way to a GPU it goes through pinned memory, so that the host need not wait.

    A copy out of pageable memory waits for all that the stream still has to do. Pinned memory is torch's to keep until
    the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
