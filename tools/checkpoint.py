"""Training state in one safetensors file, so that a stopped run goes on where it was. No pickle."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def save(path: Path, step: int, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
    """Writes aside, then renames: the file is whole at any time."""
    tensors = {f"{name}/{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer{number}/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors["step"] = torch.tensor(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def load(path: Path, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]) -> int:
    """Puts a saved state back; returns the number of steps done, 0 where there is no file."""
    if not path.exists():
        return 0
    tensors = load_file(path)

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{prefix}/"): t for key, t in tensors.items() if key.startswith(f"{prefix}/")}

    for name, module in modules.items():
        module.load_state_dict(under(name))
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in under(f"optimizer{number}").items():
            index, _, entry = key.partition("/")
            state.setdefault(int(index), {})[entry] = tensor
        # A file of weights alone is a start, too, and so is one of a run in which other weights learnt.
        if len(state) == sum(len(group["params"]) for group in optimizer.param_groups):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(tensors["step"])
