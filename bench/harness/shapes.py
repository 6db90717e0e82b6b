"""The real shapes, named once for every bench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dualparal.models.base import Grid
from dualparal.models.wan.spec import WanSpec


def wan_config(heads: int, head_dim: int, ffn_dim: int, layers: int, text_dim: int = 4096) -> dict[str, Any]:
    return {
        "patch_size": [1, 2, 2], "num_attention_heads": heads, "attention_head_dim": head_dim, "in_channels": 16,
        "out_channels": 16, "text_dim": text_dim, "freq_dim": 256, "ffn_dim": ffn_dim, "num_layers": layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None,
        "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
    }  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A model at a resolution, cut into blocks. ``layers`` is how many of its layers a bench builds."""

    name: str
    heads: int
    head_dim: int
    ffn_dim: int
    height: int  # pixels
    width: int
    frames: int = 8  # B
    context: int = 4  # C
    layers: int = 2
    text_tokens: int = 512

    @property
    def spec(self) -> WanSpec:
        return WanSpec((wan_config(self.heads, self.head_dim, self.ffn_dim, self.layers),))

    @property
    def grid(self) -> Grid:
        return self.spec.grid(self.height, self.width)

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    def layer_flops(self, queries: int, keys: int) -> float:
        """Multiply-adds times two of one layer for so many query and key tokens, text included."""
        linears = 2 * queries * self.inner * (6 * self.inner + 2 * self.ffn_dim)
        return linears + 4 * queries * (keys + self.text_tokens) * self.inner


def _family(context: int) -> list[Shape]:
    return [
        Shape(f"wan1.3b-480p-c{context}", 12, 128, 8960, 480, 832, context=context),
        Shape(f"wan14b-480p-c{context}", 40, 128, 13824, 480, 832, context=context),
        Shape(f"wan14b-720p-c{context}", 40, 128, 13824, 720, 1280, context=context),
    ]


GPU_SHAPES = _family(8) + _family(4)  # the predicted ones first
CPU_SHAPES = [
    Shape("cpu-small-c4", 4, 64, 1024, 128, 128, context=4, text_tokens=64),
    Shape("cpu-small-c8", 4, 64, 1024, 128, 128, context=8, text_tokens=64),
]
