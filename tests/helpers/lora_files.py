"""Files of LoRAs with random matrices in every layout, and the textbook's merge of the same changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

RANK = 3
# diffusers' name, the original one. Every kind of linear is in some layer.
MODULES = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.1.attn1.to_k": "blocks.1.self_attn.k",
    "blocks.1.ffn.net.0.proj": "blocks.1.ffn.0",
    "blocks.2.attn1.to_v": "blocks.2.self_attn.v",
    "blocks.2.attn2.to_out.0": "blocks.2.cross_attn.o",
    "blocks.3.attn1.to_out.0": "blocks.3.self_attn.o",
    "blocks.3.ffn.net.2": "blocks.3.ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
# Those of image to video
IMAGE_MODULES = {
    "blocks.0.attn2.add_k_proj": "blocks.0.cross_attn.k_img",
    "blocks.1.attn2.add_v_proj": "blocks.1.cross_attn.v_img",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
}
# Whole differences, which the original layout has: the tensor in diffusers' names, the key of the file
WHOLE = {
    "blocks.0.attn1.to_q.bias": "blocks.0.self_attn.q.diff_b",
    "blocks.1.norm2.weight": "blocks.1.norm3.diff",
    "blocks.1.norm2.bias": "blocks.1.norm3.diff_b",
    "blocks.2.attn1.norm_k.weight": "blocks.2.self_attn.norm_k.diff",
    "blocks.3.scale_shift_table": "blocks.3.diff_m",
    "scale_shift_table": "head.diff_m",
    "patch_embedding.weight": "patch_embedding.diff",
    "patch_embedding.bias": "patch_embedding.diff_b",
}
LAYOUTS = ("diffusers", "diffusers with alpha", "peft", "original", "kohya")


class Written(NamedTuple):
    """A file, and what it adds to each tensor of the transformer at weight 1."""

    path: Path
    added: dict[str, torch.Tensor]


def write_lora(
    path: Path, layout: str, state: Mapping[str, torch.Tensor], seed: int = 0, modules: Mapping[str, str] = MODULES
) -> Written:
    """Writes a LoRA for the transformer of ``state``; a PEFT one has its config beside it."""
    generator = torch.Generator().manual_seed(seed)
    alpha = 2.0 * RANK if layout != "diffusers" else float(RANK)
    tensors: dict[str, torch.Tensor] = {}
    added: dict[str, torch.Tensor] = {}
    for ours, theirs in modules.items():
        out, inputs = state[f"{ours}.weight"].shape
        down = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
        up = torch.randn(out, RANK, generator=generator) * 0.2
        added[f"{ours}.weight"] = alpha / RANK * (up.double() @ down.double())
        name, ends = {
            "peft": (f"base_model.model.{ours}", ("lora_A", "lora_B")),
            "original": (f"diffusion_model.{theirs}", ("lora_down", "lora_up")),
            "kohya": ("lora_unet_" + theirs.replace(".", "_"), ("lora_down", "lora_up")),
        }.get(layout, (f"transformer.{ours}", ("lora_A", "lora_B")))
        tensors |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
        if layout in ("original", "kohya"):
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    if layout == "original":
        for ours, key in WHOLE.items():
            change = 0.1 * torch.randn(state[ours].shape, generator=generator)
            tensors[f"diffusion_model.{key}"], added[ours] = change, change.double()
    metadata = {"format": "pt"}
    if layout == "diffusers with alpha":
        config = {"r": RANK, "lora_alpha": alpha, "target_modules": list(modules)}
        kept = {f"transformer.{key}": value for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(kept)
    if layout == "peft":
        beside = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "alpha_pattern": {}}
        path.with_name("adapter_config.json").write_text(json.dumps(beside))
    save_file(tensors, path, metadata)
    return Written(path, added)


def merge(transformer: torch.nn.Module, added: Mapping[str, torch.Tensor], weight: float) -> None:
    """Adds weight * alpha / rank * B A to the transformer's weights, in float64."""
    state = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    for name, change in added.items():
        state[name] = (state[name].double() + weight * change).float()
    transformer.load_state_dict(state)
