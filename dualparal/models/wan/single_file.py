"""A Wan transformer in files of its own: its config and its names, original or diffusers', by header. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dualparal.models.wan.names import original_name
from dualparal.models.wan.shapes import Shapes, tensor_shapes

_IMAGES = ("img_emb.", "condition_embedder.image_embedder.")
# Tensors that other models have besides, by the beginnings of their names, and what these are.
_OTHERS = {
    "vace_": "video from control signals (VACE)",
    "motion_encoder.": "a character in another's motion (Animate)",
    "face_adapter.": "a character in another's motion (Animate)",
    "casual_audio_encoder.": "speech to video (S2V)",
    "fps_embedding.": "SkyReels-V2, with a noise level per frame",
    "control_adapter.": "video from camera moves (Fun-Control)",
    "ref_conv.": "video from control signals (Fun-Control)",
}


def read_transformer(
    shapes: Mapping[str, tuple[int, ...]], folder: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config of the transformer that these tensors are, and the key of each of its tensors.

    Args:
        shapes: by key, prefixes taken off.
        folder: config of a Wan transformer of the same kind, for what shapes do not tell: the width of a head, norms.

    Returns:
        (config as diffusers has it, keys by diffusers' names).

    Raises:
        ValueError: no Wan transformer, or of another kind than the folder's; says what it is instead.
    """
    for start, what in _OTHERS.items():
        if any(key.startswith(start) for key in shapes):
            raise ValueError(f"it is {what}, which is not supported; use the weights of another model")
    original = "head.head.weight" in shapes

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        key = original_name(name) if original else name
        found = shapes.get(key)
        if found is None or len(found) != dimensions or 0 in found:
            have = "missing" if found is None else list(found)
            raise ValueError(f"{key} is {have}: no Wan transformer in the original or in diffusers' names")
        return found

    inner, inputs, *patch = shape("patch_embedding.weight", 5)
    head_dim = int(folder["attention_head_dim"])
    if inner % head_dim:
        raise ValueError(f"its width of {inner} does not divide into heads of {head_dim}, as the model's folder has it")
    outputs = shape("proj_out.weight")[0] // math.prod(patch)
    reads_images = any(key.startswith(_IMAGES) for key in shapes), inputs - outputs
    wanted = folder.get("image_dim") is not None, int(folder["in_channels"]) - int(folder["out_channels"])
    if reads_images != wanted:
        kinds = ["image to video" if any(kind) else "text to video" for kind in (reads_images, wanted)]
        raise ValueError(
            f"it takes {inputs} channels and makes {outputs} ({kinds[0]}), where the model's folder is of another kind "
            f"({kinds[1]}); use weights and a folder of the same kind"
        )
    config = {
        **folder,
        "num_layers": len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}),
        "num_attention_heads": inner // head_dim,
        "attention_head_dim": head_dim,
        "patch_size": patch,
        "in_channels": inputs,
        "out_channels": outputs,
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "cross_attn_norm": ("blocks.0.norm3.weight" if original else "blocks.0.norm2.weight") in shapes,
    }
    expected: Shapes = tensor_shapes(config)
    return config, {name: original_name(name) if original else name for name in expected}
