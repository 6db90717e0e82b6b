"""Wan2.1 and Wan2.2 text-to-video transformers, a slice of layers at a time.

The arithmetic is that of diffusers' WanTransformer3DModel (transformer_wan.py), with one QKV projection, keys and
values of the text made once per prompt, modulations once per timestep, and every residual fused with the norm that
follows it (``dualparal.kernels``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dualparal.kernels.attention import attention
from dualparal.kernels.attention_8bit import attention_8bit, key_mean, qk_norm_rope_8bit
from dualparal.kernels.qk_norm_rope import Lend, qk_norm_rope
from dualparal.kernels.residual_norm import residual, residual_norm
from dualparal.models.base import AttentionStrategy, Grid, Pending, Rotary, TimeCondition, attend_here, component_config
from dualparal.models.keys_values import Context8, KeysValues
from dualparal.models.wan.shapes import KEYS, tensor_shapes
from dualparal.models.wan.timesteps import timestep_frequencies

ROPE_THETA = 10000.0
# diffusers: WanTransformer3DModel._keep_in_fp32_modules
_KEEP_FP32 = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}
_EMBED = ("patch_embedding.weight", "patch_embedding.bias")
_HEAD = ("proj_out.weight", "proj_out.bias", "scale_shift_table")


@dataclass(frozen=True)
class WanSpec:
    """Facts of a Wan text-to-video model from its config files.

    Attributes:
        configs: the config of ``transformer``, and of ``transformer_2`` where there is one (Wan2.2).
        boundary_ratio: Wan2.2: timesteps at or above boundary_ratio * num_train_timesteps go to ``transformer``.
        vae: its config; without one, that of Wan2.1.
    """

    configs: tuple[dict[str, Any], ...]
    boundary_ratio: float | None = None
    vae: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_configs(
        cls, transformers: Sequence[Mapping[str, Any]], vae: Mapping[str, Any], pipeline: Mapping[str, Any]
    ) -> WanSpec:
        """Makes a spec; raises ValueError for Wan variants that this adapter does not run, naming the difference."""
        configs = tuple(component_config(config) for config in transformers)
        boundary_ratio = pipeline.get("boundary_ratio")
        if pipeline.get("expand_timesteps"):
            raise ValueError(
                "this Wan pipeline has expand_timesteps=True (Wan2.2 TI2V): only text-to-video Wan2.1 "
                "and Wan2.2-A14B type models are supported"
            )
        for config in configs:
            unknown = sorted(set(config) - KEYS)
            if unknown:
                raise ValueError(
                    f"this Wan transformer has {unknown[0]}={config[unknown[0]]!r}, which is no option of diffusers' "
                    "WanTransformer3DModel"
                )
            for key, plain in (("image_dim", None), ("added_kv_proj_dim", None), ("pos_embed_seq_len", None)):
                if config.get(key) is not plain:
                    raise ValueError(
                        f"this Wan transformer has {key}={config[key]} (image-to-video): only "
                        "text-to-video models are supported"
                    )
            if config.get("qk_norm") != "rms_norm_across_heads":
                raise ValueError(
                    f"this Wan transformer has qk_norm={config.get('qk_norm')!r}: only "
                    "'rms_norm_across_heads' is supported"
                )
            if config["patch_size"][0] != 1:
                raise ValueError(
                    f"this Wan transformer has patch_size={config['patch_size']}: a temporal patch "
                    "of 1 is needed to cut a video into blocks of latent frames"
                )
            tensor_shapes(config)  # a key that is missing or malformed shows here
        if len(configs) == 2:
            if boundary_ratio is None:
                raise ValueError("the pipeline has transformer_2 but no boundary_ratio in model_index.json")
            differing = sorted(k for k in configs[0] if configs[0][k] != configs[1].get(k))
            if differing:
                raise ValueError(
                    f"transformer and transformer_2 differ in {', '.join(differing)}: experts of one shape are needed"
                )
        return cls(configs, boundary_ratio if len(configs) == 2 else None, component_config(vae))

    @property
    def config(self) -> dict[str, Any]:
        return self.configs[0]

    @property
    def num_experts(self) -> int:
        return len(self.configs)

    @property
    def num_layers(self) -> int:
        return int(self.config["num_layers"])

    @property
    def in_channels(self) -> int:
        return int(self.config["in_channels"])

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def head_dim(self) -> int:
        return int(self.config["attention_head_dim"])

    @property
    def inner_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def text_dim(self) -> int:
        return int(self.config["text_dim"])

    @property
    def patch_size(self) -> tuple[int, int, int]:
        t, h, w = self.config["patch_size"]
        return t, h, w

    @property
    def spatial_factor(self) -> int:
        return int(self.vae.get("scale_factor_spatial", 8))

    @property
    def temporal_factor(self) -> int:
        return int(self.vae.get("scale_factor_temporal", 4))

    def expert(self, timestep: float, num_train_timesteps: int) -> int:
        """Index of the transformer that handles a timestep: 0: ``transformer``, 1: ``transformer_2``."""
        if self.boundary_ratio is None:
            return 0
        return int(timestep < self.boundary_ratio * num_train_timesteps)

    def grid(self, height: int, width: int) -> Grid:
        h, w = height // self.spatial_factor, width // self.spatial_factor
        return Grid(h, w, h // self.patch_size[1], w // self.patch_size[2])

    def shapes(self, expert: int) -> dict[str, tuple[int, ...]]:
        return tensor_shapes(self.configs[expert])

    def is_unused(self, name: str) -> bool:
        return "norm_added_q" in name  # diffusers: WanTransformer3DModel._keys_to_ignore_on_load_unexpected

    def names(self, expert: int, layers: range) -> list[str]:
        """Names of a slice's tensors. First and last layer bring embedding and head; all slices embed time and text."""
        found = []
        for name in self.shapes(expert):
            if name.startswith("blocks."):
                wanted = int(name.split(".")[1]) in layers
            elif name in _EMBED:
                wanted = layers.start == 0
            elif name in _HEAD:
                wanted = layers.stop == self.num_layers
            else:
                wanted = name.startswith("condition_embedder.")
            if wanted:
                found.append(name)
        return found

    def tensor_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if _KEEP_FP32 & set(name.split(".")) else dtype

    def build(self, tensors: Mapping[str, torch.Tensor], layers: range) -> WanSlice:
        return WanSlice(self, tensors, layers)


class _Layer:
    """The tensors of one transformer layer, Q, K and V of self-attention in one matrix."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], index: int, cross_norm: bool) -> None:
        def get(name: str) -> torch.Tensor:
            return tensors[f"blocks.{index}.{name}"]

        def linear(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            return get(f"{name}.weight"), get(f"{name}.bias")

        self.qkv = (
            torch.cat([get(f"attn1.to_{p}.weight") for p in "qkv"]),
            torch.cat([get(f"attn1.to_{p}.bias") for p in "qkv"]),
        )
        self.norm_q, self.norm_k = get("attn1.norm_q.weight"), get("attn1.norm_k.weight")
        self.out = linear("attn1.to_out.0")
        self.cross_norm = (get("norm2.weight"), get("norm2.bias")) if cross_norm else None
        self.cross_q, self.cross_k, self.cross_v = (linear(f"attn2.to_{p}") for p in "qkv")
        self.cross_norm_q, self.cross_norm_k = get("attn2.norm_q.weight"), get("attn2.norm_k.weight")
        self.cross_out = linear("attn2.to_out.0")
        self.ffn_in, self.ffn_out = linear("ffn.net.0.proj"), linear("ffn.net.2")


class WanSlice:
    """Consecutive layers of one Wan transformer (``models.base.Slice``).

    Args:
        tensors: at least those of ``spec.names(expert, layers)``, on one device.
        layers: indices of its layers in the model.
    """

    def __init__(self, spec: WanSpec, tensors: Mapping[str, torch.Tensor], layers: range) -> None:
        config = spec.config
        self.spec = spec
        self.eps = float(config["eps"])
        self.num_layers = len(layers)
        self.inner_dim, self.heads = spec.inner_dim, spec.heads
        cross_norm = bool(config["cross_attn_norm"])
        self._layers = [_Layer(tensors, index, cross_norm) for index in layers]
        self._tables = torch.cat([tensors[f"blocks.{i}.scale_shift_table"] for i in layers]).float()
        self._condition = {
            name.removeprefix("condition_embedder."): tensor
            for name, tensor in tensors.items()
            if name.startswith("condition_embedder.")
        }
        self._patch = tuple(tensors[name] for name in _EMBED) if layers.start == 0 else None
        self._head = tuple(tensors[name] for name in _HEAD) if layers.stop == spec.num_layers else None
        self.dtype = self._layers[0].qkv[0].dtype
        self.device = self._tables.device
        self._spatial: dict[Grid, Rotary] = {}

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._condition[f"{name}.weight"], self._condition[f"{name}.bias"])

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Patch embedding, as in WanTransformer3DModel.forward."""
        assert self._patch is not None, "only the first slice embeds"
        weight, bias = self._patch
        hidden = F.conv3d(latents.to(self.dtype), weight, bias, stride=self.spec.patch_size)
        return hidden.flatten(2).squeeze(0).transpose(0, 1).contiguous()

    def time(self, timestep: torch.Tensor) -> TimeCondition:
        """The ``scale_shift_table`` of each layer and of the head plus the embedded timestep, 1 added to the scales."""
        frequencies = timestep_frequencies(timestep.reshape(1).to(self.device), self.spec.config["freq_dim"])
        frequencies = frequencies.to(self._condition["time_embedder.linear_1.weight"].dtype)
        embedded = self._linear("time_embedder.linear_1", frequencies)
        embedded = self._linear("time_embedder.linear_2", F.silu(embedded)).to(self.dtype)
        layers = self._tables + self._linear("time_proj", F.silu(embedded)).float().unflatten(1, (6, -1))
        layers[:, [1, 4]] += 1  # the norms multiply by 1 + scale
        head = None
        if self._head is not None:
            head = (self._head[2].float() + embedded.unsqueeze(1)).squeeze(0).float()  # shift, scale
            head[1] += 1
        return TimeCondition(layers, head)

    def text(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Text embedder, then K (normed) and V of each layer's ``attn2``."""
        text = self._linear("text_embedder.linear_1", prompt_embeds.to(self.device, self.dtype))
        text = self._linear("text_embedder.linear_2", F.gelu(text, approximate="tanh"))
        inner = (self.spec.inner_dim,)
        return torch.stack(
            [
                torch.stack(
                    [
                        F.rms_norm(F.linear(text, *layer.cross_k), inner, layer.cross_norm_k, self.eps),
                        F.linear(text, *layer.cross_v),
                    ]
                )
                for layer in self._layers
            ]
        )

    def rotary(self, start: int, frames: int, grid: Grid) -> Rotary:
        """Angles in float64 from absolute indices: no table, no largest index (diffusers' ends at 1,024)."""
        if grid not in self._spatial:
            rows, cols = grid.tokens_height, grid.tokens_width
            size = 2 * (self.spec.head_dim // 6)
            angles = torch.cat(
                [
                    _angles(torch.arange(rows), size).repeat_interleave(cols, 0),
                    _angles(torch.arange(cols), size).repeat(rows, 1),
                ],
                dim=1,
            )
            self._spatial[grid] = Rotary(*(f.float().to(self.device) for f in (angles.cos(), angles.sin())))
        angles = _angles(torch.arange(start, start + frames), self.spec.head_dim - 4 * (self.spec.head_dim // 6))
        return Rotary(
            *(
                torch.cat(
                    [
                        temporal.float().to(self.device).repeat_interleave(grid.tokens, 0),
                        spatial.repeat(frames, 1),
                    ],
                    dim=1,
                )
                for temporal, spatial in zip((angles.cos(), angles.sin()), self._spatial[grid], strict=True)
            )
        )

    def layer(
        self,
        index: int,
        hidden: torch.Tensor,
        pending: Pending | None,
        time: TimeCondition,
        text: KeysValues,
        rotary: Rotary,
        context: KeysValues | Context8,
        lends: Sequence[Lend] = (),
        attend: AttentionStrategy = attend_here,
    ) -> tuple[torch.Tensor, Pending]:
        """Self-attention, attention to the text and feed-forward, as in WanTransformerBlock.forward."""
        layer, heads, eps = self._layers[index], self.heads, self.eps
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = time.layers[index]
        y, y_gate = pending or (None, None)

        # Self-attention over [own | neighbours]. Non-causal, so the order of keys only has to be fixed.
        hidden, normed = residual_norm(hidden, y, y_gate, scale, shift, eps=eps)
        qkv = F.linear(normed, *layer.qkv)
        if isinstance(context, Context8):
            attended = self._attend_8bit(layer, qkv, rotary, context, attend)
        else:
            attended = self._attend(layer, qkv, rotary, context, lends, attend)
        attended = F.linear(attended, *layer.out)

        # Cross-attention to the text
        if layer.cross_norm is None:
            hidden = normed = residual(hidden, attended, gate)
        else:
            hidden, normed = residual_norm(hidden, attended, gate, *layer.cross_norm, eps=eps)
        query = F.rms_norm(F.linear(normed, *layer.cross_q), (self.spec.inner_dim,), layer.cross_norm_q, eps)
        attended = F.linear(attention(query, text.keys, text.values, heads=heads), *layer.cross_out)

        # Feed-forward; its residual is left to the norm of the next layer
        hidden, normed = residual_norm(hidden, attended, None, ffn_scale, ffn_shift, eps=eps)
        y = F.linear(F.gelu(F.linear(normed, *layer.ffn_in), approximate="tanh"), *layer.ffn_out)
        return hidden, (y, ffn_gate)

    def _attend(
        self,
        layer: _Layer,
        qkv: torch.Tensor,
        rotary: Rotary,
        context: KeysValues,
        lends: Sequence[Lend],
        attend: AttentionStrategy,
    ) -> torch.Tensor:
        own = context.rows(0, len(qkv))
        norms = layer.norm_q, layer.norm_k
        query = qk_norm_rope(qkv, *norms, *rotary, *own, heads=self.heads, eps=self.eps, lends=lends)
        return attend(_attention, query, context, self.heads)

    def _attend_8bit(
        self, layer: _Layer, qkv: torch.Tensor, rotary: Rotary, context: Context8, attend: AttentionStrategy
    ) -> torch.Tensor:
        given = qkv, layer.norm_q, layer.norm_k, *rotary, context.means, context.arena.rows(0, len(qkv))
        options: dict[str, Any] = {"k_sums": context.k_sums, "heads": self.heads, "eps": self.eps}
        if context.first:  # one look at the keys for their mean, and one to use it
            qk_norm_rope_8bit(*given, **options)  # the sums do not depend on what is taken away
            context.means[0].copy_(key_mean(context.k_sums, len(qkv)))
        queries = qk_norm_rope_8bit(*given, **options)
        return attend(partial(_attention_8bit, dtype=qkv.dtype), queries, context, self.heads)

    def finish(self, hidden: torch.Tensor, pending: Pending | None) -> torch.Tensor:
        return hidden if pending is None else residual(hidden, *pending)

    def head(self, hidden: torch.Tensor, pending: Pending | None, time: TimeCondition, grid: Grid) -> torch.Tensor:
        """Last norm, ``proj_out`` and unpatching, as in WanTransformer3DModel.forward."""
        assert self._head is not None and time.head is not None, "only the last slice has the head"
        weight, bias, _ = self._head
        y, gate = pending or (None, None)
        _, normed = residual_norm(hidden, y, gate, time.head[1], time.head[0], eps=self.eps)
        _, p_h, p_w = self.spec.patch_size
        frames = len(hidden) // grid.tokens
        patches = F.linear(normed, weight, bias).reshape(frames, grid.tokens_height, grid.tokens_width, p_h, p_w, -1)
        return patches.permute(5, 0, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).unsqueeze(0).contiguous()


def _attention(queries: Any, context: KeysValues | Context8, heads: int) -> torch.Tensor:
    assert isinstance(context, KeysValues)
    return attention(queries, context.keys, context.values, heads=heads)


def _attention_8bit(queries: Any, context: KeysValues | Context8, heads: int, dtype: torch.dtype) -> torch.Tensor:
    assert isinstance(context, Context8)
    return attention_8bit(queries, context.arena, context.spans, heads=heads, dtype=dtype)


def _angles(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Angles of positions [n] at the ``size // 2`` rotary frequencies, float64 [n, size // 2]."""
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.outer(positions.double(), frequencies)
