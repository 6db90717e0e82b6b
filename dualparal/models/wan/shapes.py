"""Names and shapes of a Wan transformer's tensors, from its config alone.

They are those of diffusers' WanTransformer3DModel, in its order; tests compare them. Building that class costs every
process of a run the import of all of diffusers' models, and of transformers with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Tensors of the first slice, and of the last
EMBED = ("patch_embedding.weight", "patch_embedding.bias")
HEAD = ("proj_out.weight", "proj_out.bias", "scale_shift_table")
TEXT_TOKENS = 512  # of a text in front of which tokens of images lie (diffusers: WanAttnProcessor)
# The linears that see every token of a unit. Time, text, patches and the head are small, or all depends on them.
LINEARS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0",
           "ffn.net.0.proj", "ffn.net.2")  # fmt: skip
# diffusers: the arguments of WanTransformer3DModel
KEYS = {
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "cross_attn_norm",
    "qk_norm",
    "eps",
    "image_dim",
    "added_kv_proj_dim",
    "rope_max_seq_len",
    "pos_embed_seq_len",
}
Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """The shape of each tensor by name.

    Args:
        config: of the transformer, with all of its keys.
    """
    inner = config["num_attention_heads"] * config["attention_head_dim"]
    inputs, patch = config["in_channels"], tuple(config["patch_size"])
    found: Shapes = {
        "scale_shift_table": (1, 2, inner),
        "patch_embedding.weight": (inner, inputs, *patch),
        "patch_embedding.bias": (inner,),
        **_linear("condition_embedder.time_embedder.linear_1", config["freq_dim"], inner),
        **_linear("condition_embedder.time_embedder.linear_2", inner, inner),
        **_linear("condition_embedder.time_proj", inner, 6 * inner),
        **_linear("condition_embedder.text_embedder.linear_1", config["text_dim"], inner),
        **_linear("condition_embedder.text_embedder.linear_2", inner, inner),
        **_image_embedder(config, inner),
    }
    layer = _layer(inner, config["ffn_dim"], config["cross_attn_norm"], config.get("added_kv_proj_dim"))
    for index in range(config["num_layers"]):
        found.update({f"blocks.{index}.{name}": shape for name, shape in layer.items()})
    outputs = (config["out_channels"] or inputs) * math.prod(patch)
    return {**found, **_linear("proj_out", inner, outputs)}


def _image_embedder(config: Mapping[str, Any], inner: int) -> Shapes:
    """The tensors that embed tokens of images; none in a model without them."""
    width, tokens, name = config.get("image_dim"), config.get("pos_embed_seq_len"), "condition_embedder.image_embedder"
    if width is None:
        return {}
    return {
        **({f"{name}.pos_embed": (1, tokens, width)} if tokens else {}),
        **{f"{name}.norm1.{kind}": (width,) for kind in ("weight", "bias")},
        **_linear(f"{name}.ff.net.0.proj", width, width),
        **_linear(f"{name}.ff.net.2", width, inner),
        **{f"{name}.norm2.{kind}": (inner,) for kind in ("weight", "bias")},
    }


def _layer(inner: int, ffn: int, cross_norm: bool, images: int | None) -> Shapes:
    """The tensors of one layer, of width ``inner``; ``images``: width of the embedded tokens of images, if any."""
    found: Shapes = {"scale_shift_table": (1, 6, inner)}
    for attention in ("attn1", "attn2"):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            found.update(_linear(f"{attention}.{name}", inner, inner))
        found.update({f"{attention}.norm_q.weight": (inner,), f"{attention}.norm_k.weight": (inner,)})
    if images is not None:
        for name in ("add_k_proj", "add_v_proj"):
            found.update(_linear(f"attn2.{name}", images, inner))
        found["attn2.norm_added_k.weight"] = (inner,)
    if cross_norm:
        found.update({"norm2.weight": (inner,), "norm2.bias": (inner,)})
    return {**found, **_linear("ffn.net.0.proj", inner, ffn), **_linear("ffn.net.2", ffn, inner)}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def image_counts(config: Mapping[str, Any], keeps_first_frame: bool = False) -> tuple[int, ...]:
    """Numbers of images that a video takes: none, the first, or the first and the last.

    A model that reads tokens of images takes as many as it was made for: with positions, two. One that keeps the first
    frame's latents can do without.
    """
    if keeps_first_frame:
        return (0, 1)
    if config["in_channels"] == (config["out_channels"] or config["in_channels"]):
        return (0,)
    if config.get("image_dim") is None:
        return (1, 2)
    return (1,) if config.get("pos_embed_seq_len") is None else (2,)
