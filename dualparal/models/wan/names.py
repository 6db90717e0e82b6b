"""Names that the original code has for the parts of a Wan transformer."""

from __future__ import annotations

# diffusers' names, and those of the original code (diffusers: convert_wan_transformer_to_diffusers)
_ORIGINAL = (
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_out.0", ".o"),
    (".to_", "."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2", ".norm3"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("attn.add_k_proj", "attn.k_img"),  # attn2 has its original name by then
    ("attn.add_v_proj", "attn.v_img"),
    ("attn.norm_added_k", "attn.norm_k_img"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("proj_out", "head.head"),
    (".scale_shift_table", ".modulation"),
)


def original_name(name: str) -> str:
    """The original name of a tensor or of a module that diffusers calls ``name``."""
    if name == "scale_shift_table":  # of the head: no dot before it
        return "head.modulation"
    for ours, theirs in _ORIGINAL:
        name = name.replace(ours, theirs)
    return name
