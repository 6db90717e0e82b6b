"""Wan2.1 and Wan2.2 transformers, a slice of layers at a time.

The arithmetic is that of diffusers' WanTransformer3DModel (transformer_wan.py), with one QKV projection, keys and
values of the text made once per prompt, modulations once per timestep, and every residual fused with the norm that
follows it (``dualparal.kernels``).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dualparal.device import to_device
from dualparal.kernels.attention import attention
from dualparal.kernels.attention_8bit import attention_8bit, key_mean, qk_norm_rope_8bit
from dualparal.kernels.qk_norm_rope import Lend, qk_norm_rope
from dualparal.models.base import AttentionStrategy, Grid, Pending, Rotary, TimeCondition, attend_here
from dualparal.models.heap import give_back
from dualparal.models.keys_values import Context8, KeysValues
from dualparal.models.linear import Linear
from dualparal.models.wan.feed_forward import linear_gelu
from dualparal.models.wan.modulated import residual, residual_norm
from dualparal.models.wan.shapes import EMBED, HEAD, TEXT_TOKENS
from dualparal.models.wan.timesteps import timestep_frequencies

ROPE_THETA = 10000.0


class _Layer:
    """The tensors of one transformer layer, Q, K and V of self-attention in one matrix."""

    def __init__(self, tensors: MutableMapping[str, torch.Tensor], index: int, cross_norm: bool) -> None:
        def get(name: str) -> torch.Tensor:
            return tensors[f"blocks.{index}.{name}"]

        def linear(*names: str) -> Linear:
            return Linear.of(tensors, *(f"blocks.{index}.{name}" for name in names))

        self.qkv = linear("attn1.to_q", "attn1.to_k", "attn1.to_v")
        self.norm_q, self.norm_k = get("attn1.norm_q.weight"), get("attn1.norm_k.weight")
        self.out = linear("attn1.to_out.0")
        self.cross_norm = (get("norm2.weight"), get("norm2.bias")) if cross_norm else None
        self.cross_q, self.cross_k, self.cross_v = (linear(f"attn2.to_{p}") for p in "qkv")
        self.cross_norm_q, self.cross_norm_k = get("attn2.norm_q.weight"), get("attn2.norm_k.weight")
        self.image_k: Linear | None = None
        if f"blocks.{index}.attn2.add_k_proj.weight" in tensors:
            self.image_k, self.image_v = linear("attn2.add_k_proj"), linear("attn2.add_v_proj")
            self.image_norm_k = get("attn2.norm_added_k.weight")
        self.cross_out = linear("attn2.to_out.0")
        self.ffn_in, self.ffn_out = linear("ffn.net.0.proj"), linear("ffn.net.2")
        give_back()  # what was joined


class WanSlice:
    """Consecutive layers of one Wan transformer (``models.base.Slice``).

    Args:
        config: of diffusers' class.
        tensors: at least those of ``WanSpec.names(expert, layers)``, on one device; weights of layers are taken out.
        layers: indices of its layers in the model.
    """

    def __init__(self, config: Mapping[str, Any], tensors: MutableMapping[str, torch.Tensor], layers: range) -> None:
        self.config = config
        self.eps = float(config["eps"])
        self.num_layers = len(layers)
        self.heads, self.head_dim = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        self.inner_dim = self.heads * self.head_dim
        cross_norm = bool(config["cross_attn_norm"])
        self._layers = [_Layer(tensors, index, cross_norm) for index in layers]
        self._tables = torch.cat([tensors[f"blocks.{i}.scale_shift_table"] for i in layers]).float()
        self._condition = {
            name.removeprefix("condition_embedder."): tensor
            for name, tensor in tensors.items()
            if not name.startswith("blocks.") and name not in (*EMBED, *HEAD)
        }
        self._patch = tuple(tensors[name] for name in EMBED) if layers.start == 0 else None
        self._head = tuple(tensors[name] for name in HEAD) if layers.stop == config["num_layers"] else None
        self.dtype = self._layers[0].qkv.bias.dtype
        self.device = self._tables.device
        self._spatial: dict[Grid, Rotary] = {}

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._condition[f"{name}.weight"], self._condition[f"{name}.bias"])

    def patches(self, latents: torch.Tensor) -> torch.Tensor:
        """The patches of WanTransformer3DModel's ``patch_embedding``, which are disjoint: [tokens, C * p_h * p_w]."""
        _, p_h, p_w = self.config["patch_size"]
        patches = latents.to(self.dtype)[0].unflatten(3, (-1, p_w)).unflatten(2, (-1, p_h))  # [C, F, h, p_h, w, p_w]
        return patches.permute(1, 2, 4, 0, 3, 5).flatten(3).flatten(0, 2)

    def embed(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch embedding of WanTransformer3DModel.forward, its convolution as a product: patches are disjoint."""
        assert self._patch is not None, "only the first slice embeds"
        # Not as a convolution: in 16 bits cuDNN's is 10 to 20 times slower in some versions, and wrong in others.
        weight, bias = self._patch  # [inner, C, 1, p_h, p_w]
        return F.linear(patches, weight.flatten(1), bias)

    def time(self, timestep: torch.Tensor) -> TimeCondition:
        """The ``scale_shift_table`` of each layer and of the head plus the embedded timestep, 1 added to the scales."""
        frequencies = self._frequencies(timestep).to(self._condition["time_embedder.linear_1.weight"].dtype)
        embedded = self._linear("time_embedder.linear_1", frequencies)
        embedded = self._linear("time_embedder.linear_2", F.silu(embedded)).to(self.dtype)
        layers = self._tables + self._projected(F.silu(embedded)).float().unflatten(1, (6, -1))
        for scale in (1, 4):  # one by one: a list of indices would be copied to the device, and waited for
            layers[:, scale] += 1  # the norms multiply by 1 + scale
        head = None
        if self._head is not None:
            head = (self._head[2].float() + embedded.unsqueeze(1)).squeeze(0).float()  # shift, scale
            head[1] += 1
        return TimeCondition(layers, head)

    def _frequencies(self, timestep: torch.Tensor) -> torch.Tensor:
        """Sinusoids [1, freq_dim] of a timestep."""
        moment = torch.full((1,), timestep.item(), dtype=timestep.dtype, device=self.device)
        return timestep_frequencies(moment, self.config["freq_dim"])

    def _projected(self, embedded: torch.Tensor) -> torch.Tensor:
        """The part of modulations that layers share, [1, 6 * inner], from the activated embedding of a timestep."""
        return self._linear("time_proj", embedded)

    def text(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Text embedder, then K (normed) and V of each layer's ``attn2``; those of images' tokens before the text's."""
        embeds = to_device(prompt_embeds.to(self.dtype), self.device)
        image, embeds = embeds[: self._image_tokens(len(embeds))], embeds[self._image_tokens(len(embeds)) :]
        text = self._linear("text_embedder.linear_1", embeds)
        text = self._linear("text_embedder.linear_2", F.gelu(text, approximate="tanh"))
        if len(image):
            image = self._image(image[:, : self.config["image_dim"]])
        return torch.stack([self._cross(layer, image, text) for layer in self._layers])

    def _image_tokens(self, sequence: int) -> int:
        """Tokens of images in a sequence of theirs and the text's, which diffusers splits at a fixed length."""
        return sequence - TEXT_TOKENS if self.config.get("image_dim") is not None else 0

    def _image(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embedded tokens of images [tokens, inner], as WanImageEmbedding.forward has them."""
        given = {name.removeprefix("image_embedder."): t for name, t in self._condition.items()}

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            weight, bias = given[f"{name}.weight"].float(), given[f"{name}.bias"].float()
            return F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-5).to(x.dtype)

        if "pos_embed" in given:
            tokens = tokens + given["pos_embed"][0]
        hidden = F.gelu(self._linear("image_embedder.ff.net.0.proj", norm(tokens, "norm1")))
        return norm(self._linear("image_embedder.ff.net.2", hidden), "norm2")

    def _cross(self, layer: _Layer, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Keys and values of a layer's attention to images and text, [2, sequence, inner]."""
        inner = (self.inner_dim,)
        keys, values = [F.rms_norm(layer.cross_k(text), inner, layer.cross_norm_k, self.eps)], [layer.cross_v(text)]
        if layer.image_k is not None:
            keys.insert(0, F.rms_norm(layer.image_k(image), inner, layer.image_norm_k, self.eps))
            values.insert(0, layer.image_v(image))
        return torch.stack([torch.cat(keys), torch.cat(values)])

    def rotary(self, start: int, frames: int, grid: Grid) -> Rotary:
        """Angles in float64 from absolute indices: no table, no largest index (diffusers' ends at 1,024)."""
        if grid not in self._spatial:
            rows, cols = grid.tokens_height, grid.tokens_width
            size = 2 * (self.head_dim // 6)
            angles = torch.cat(
                [
                    _angles(torch.arange(rows), size).repeat_interleave(cols, 0),
                    _angles(torch.arange(cols), size).repeat(rows, 1),
                ],
                dim=1,
            )
            self._spatial[grid] = Rotary(*(to_device(f.float(), self.device) for f in (angles.cos(), angles.sin())))
        angles = _angles(torch.arange(start, start + frames), self.head_dim - 4 * (self.head_dim // 6))
        return Rotary(
            *(
                torch.cat(
                    [
                        to_device(temporal.float(), self.device).repeat_interleave(grid.tokens, 0),
                        spatial.repeat(frames, 1),
                    ],
                    dim=1,
                )
                for temporal, spatial in zip((angles.cos(), angles.sin()), self._spatial[grid], strict=True)
            )
        )

    def shift(self, frames: int) -> Rotary:
        """Those of time come first; rows and columns stay."""
        temporal = _angles(torch.tensor([frames]), self.head_dim - 4 * (self.head_dim // 6))
        angles = F.pad(temporal, (0, self.head_dim // 2 - temporal.shape[1]))
        return Rotary(*(to_device(f.float(), self.device) for f in (angles.cos(), angles.sin())))

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
    ) -> tuple[torch.Tensor, Pending | None]:
        """Self-attention, attention to the text and feed-forward, as in WanTransformerBlock.forward."""
        layer, eps, runs = self._layers[index], self.eps, time.rows
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = time.layers[index].unbind(-2)
        y, y_gate = pending or (None, None)

        # Self-attention over [own | neighbours]. Non-causal, so the order of keys only has to be fixed.
        hidden, normed = residual_norm(hidden, y, y_gate, scale, shift, eps=eps, runs=runs)
        qkv = layer.qkv(normed)
        if isinstance(context, Context8):
            attended = self._attend_8bit(layer, qkv, rotary, context, attend)
        else:
            attended = self._attend(layer, qkv, rotary, context, lends, attend)
        attended = layer.out(attended)

        # Cross-attention to the text
        if layer.cross_norm is None:
            hidden = normed = residual(hidden, attended, gate, runs)
        else:
            hidden, normed = residual_norm(hidden, attended, gate, *layer.cross_norm, eps=eps, runs=runs)
        query = F.rms_norm(layer.cross_q(normed), (self.inner_dim,), layer.cross_norm_q, eps)
        attended = layer.cross_out(self._attend_text(query, text))

        # Feed-forward; its residual is left to the norm of the next layer
        hidden, normed = residual_norm(hidden, attended, None, ffn_scale, ffn_shift, eps=eps, runs=runs)
        y = layer.ffn_out(linear_gelu(normed, layer.ffn_in))
        return (residual(hidden, y, ffn_gate, runs), None) if runs else (hidden, (y, ffn_gate))

    def _attend_text(self, query: torch.Tensor, text: KeysValues) -> torch.Tensor:
        """Attention to the text and, beside it, to tokens of images, whose results are added."""
        images = self._image_tokens(len(text.keys))
        words = text.rows(images, len(text.keys) - images)
        attended = attention(query, words.keys, words.values, heads=self.heads)
        if not images:
            return attended
        image = text.rows(0, images)
        return attended + attention(query, image.keys, image.values, heads=self.heads)

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

    def head(self, hidden: torch.Tensor, pending: Pending | None, time: TimeCondition) -> torch.Tensor:
        """Last norm and ``proj_out``, as in WanTransformer3DModel.forward."""
        assert self._head is not None and time.head is not None, "only the last slice has the head"
        weight, bias, _ = self._head
        y, gate = pending or (None, None)
        shift, scale = time.head.unbind(-2)
        _, normed = residual_norm(hidden, y, gate, scale, shift, eps=self.eps, runs=time.rows)
        return F.linear(normed, weight, bias)

    def picture(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Unpatching, as in WanTransformer3DModel.forward."""
        _, p_h, p_w = self.config["patch_size"]
        frames = len(patches) // grid.tokens
        pixels = patches.reshape(frames, grid.tokens_height, grid.tokens_width, p_h, p_w, -1)
        return pixels.permute(5, 0, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).unsqueeze(0).contiguous()


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
