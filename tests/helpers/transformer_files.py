"""A tiny transformer's weights in the files that people have: original names, prefixes, shards, and fp8 with scales."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from dualparal.models.wan.names import original_name

LAYOUTS = ("original", "comfy", "diffusers", "shards")
FP8_KINDS = ("comfy", "rows", "cast")
State = Mapping[str, torch.Tensor]


def write_transformer(path: Path, layout: str, state: State) -> Path:
    """Writes the weights of ``state``, which has diffusers' names; returns the file, or the folder of two shards."""
    prefix = "model.diffusion_model." if layout == "comfy" else ""
    made = {prefix + (name if layout == "diffusers" else original_name(name)): state[name] for name in state}
    if layout != "shards":
        save_file(made, path)
        return path
    folder, names = path.with_suffix(""), sorted(made)
    folder.mkdir()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: made[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_fp8(path: Path, kind: str, state: State) -> dict[str, torch.Tensor]:
    """Writes the weights with every matrix in fp8, and returns the numbers that these are, in float32.

    Args:
        path: of the file.
        kind: "comfy": a scale per matrix, a scale of inputs and a marker; "rows": a scale per row, as lightx2v has it;
            "cast": none, and biases in fp8 as well.
        state: in diffusers' names.
    """
    prefix = "model.diffusion_model." if kind == "comfy" else ""
    made, numbers = {}, {}
    if kind == "comfy":
        made[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    for name, tensor in state.items():
        key, module = prefix + original_name(name), prefix + original_name(name.removesuffix(".weight"))
        matrix = tensor.ndim == 2 and name.endswith(".weight")
        made[key] = numbers[name] = tensor
        if not matrix and not (kind == "cast" and tensor.ndim == 1):
            continue
        scale = torch.ones(1)
        if kind == "comfy":
            scale = tensor.abs().amax()[None] / 448
            made |= {f"{module}.scale_weight": scale, f"{module}.scale_input": torch.ones(1)}
        elif kind == "rows":
            scale = tensor.abs().amax(1, keepdim=True) / 448
            made[f"{module}.weight_scale"] = scale
        made[key] = (tensor / scale).to(torch.float8_e4m3fn)
        numbers[name] = made[key].float() * scale
    save_file(made, path)
    return numbers
