"""What a layer and a block-step are measured against, on the same random weights.

``diffusers``: its own WanTransformerBlock. ``authors``: a block-step as the DualParal code does it, written from its
description: guidance as a batch of two, the previous block's C frames fed through every layer in front of the own B
and thrown away, the next block's keys and values cached raw, concatenated, normalised and rotated again in every
layer at every step.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from dualparal.config.eight_bit import LinearPolicy
from dualparal.kernels.attention_8bit import FP8, key_mean
from dualparal.models.base import Pending, Rotary, TimeCondition
from dualparal.models.keys_values import Context8, Features8, KeysValues, to_8bit
from dualparal.models.linear import placed
from dualparal.models.wan.transformer import WanSlice
from dualparal.runtime.workspace import Workspace8
from harness.shapes import Shape

Pair = tuple[torch.Tensor, torch.Tensor]


def seeded(device: torch.device, seed: int) -> torch.Generator | None:
    """A generator; None on "meta", whose tensors have no values."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


class Weights:
    """Random weights of a few layers, for ours and for diffusers' modules alike."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.spec = shape.spec
        generator = seeded(device, 0)
        self.tensors: dict[str, torch.Tensor] = {}
        for name, size in self.spec.shapes(0).items():
            scale = 1.0 if "norm" in name and name.endswith("weight") else (size[-1] if len(size) > 1 else 100) ** -0.5
            drawn = torch.randn(size, generator=generator, device=device) * scale
            if "norm" in name and name.endswith("weight"):
                drawn = 1 + 0.1 * drawn
            self.tensors[name] = drawn.to(self.spec.tensor_dtype(name, dtype))
        self.ours = WanSlice(self.spec.config, dict(self.tensors), range(shape.layers))
        self.blocks = torch.nn.ModuleList([self._block(index) for index in range(shape.layers)])

    def _block(self, index: int) -> WanTransformerBlock:
        config = self.spec.config
        with torch.device("meta"):
            block = WanTransformerBlock(
                self.spec.inner_dim, config["ffn_dim"], self.spec.heads, config["qk_norm"], config["cross_attn_norm"],
                config["eps"],
            )  # fmt: skip
        prefix = f"blocks.{index}."
        state = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        block.load_state_dict(state, assign=True)
        return block.eval().requires_grad_(False)


class Inputs:
    """Random activations and conditions of one unit with ``frames`` frames."""

    def __init__(self, weights: Weights, frames: int, start: int = 0) -> None:
        shape, device, dtype = weights.shape, weights.device, weights.dtype
        generator = seeded(device, frames)
        tokens = frames * shape.grid.tokens
        self.hidden = torch.randn(tokens, shape.inner, generator=generator, device=device).to(dtype)
        self.text_states = torch.randn(shape.text_tokens, shape.inner, generator=generator, device=device).to(dtype)
        modulation = 0.2 * torch.randn(6, shape.inner, generator=generator, device=device)
        self.temb = modulation
        tables = torch.cat([weights.tensors[f"blocks.{i}.scale_shift_table"] for i in range(shape.layers)]).float()
        layers = tables + modulation
        layers[:, [1, 4]] += 1
        self.time = TimeCondition(layers, None)
        self.rotary: Rotary = weights.ours.rotary(start, frames, shape.grid)
        self.text = self._text(weights)

    def _text(self, weights: Weights) -> torch.Tensor:
        rows = []
        for block in weights.blocks:
            cross = block.attn2
            rows.append(torch.stack([cross.norm_k(cross.to_k(self.text_states)), cross.to_v(self.text_states)]))
        return torch.stack(rows)

    @property
    def diffusers_rotary(self) -> Pair:
        """Angles as diffusers wants them: [1, tokens, 1, head_dim], every value twice."""
        cos, sin = (t.repeat_interleave(2, dim=1)[None, :, None] for t in self.rotary)
        return cos, sin


def fp8_linears(weights: Weights) -> Weights:
    """The same weights, the linears of ours in fp8; the rivals' stay as they are."""
    made, spec, tensors = copy.copy(weights), weights.spec, dict[str, torch.Tensor]()
    for name, tensor in weights.tensors.items():
        tensors |= placed(spec, name, tensor, weights.dtype, weights.device, LinearPolicy("fp8"))
    made.ours = WanSlice(spec.config, tensors, range(weights.shape.layers))
    return made


def ours_step(weights: Weights, inputs: Inputs, neighbours: list[list[KeysValues]]) -> torch.Tensor:
    """One unit through our layers; neighbours[layer]: features to read."""
    hidden, pending = inputs.hidden, None
    own = len(hidden)
    total = own + sum(len(n.keys) for n in neighbours[0])
    workspace = KeysValues(*(hidden.new_empty(total, weights.shape.inner) for _ in range(2)))
    pending_: Pending | None = pending
    for index in range(weights.shape.layers):
        at = own
        for neighbour in neighbours[index]:
            rows = workspace.rows(at, len(neighbour.keys))
            rows.keys.copy_(neighbour.keys)
            rows.values.copy_(neighbour.values)
            at += len(neighbour.keys)
        text = KeysValues(inputs.text[index, 0], inputs.text[index, 1])
        hidden, pending_ = weights.ours.layer(index, hidden, pending_, inputs.time, text, inputs.rotary, workspace)
    return weights.ours.finish(hidden, pending_)


class OursStep8:
    """The same with self-attention in 8 bits, as the engine does it at a block's second step and later.

    neighbours[layer]: features in 16 bits, of the next and the previous block, or none. They are kept in 8 bits.
    """

    def __init__(self, weights: Weights, inputs: Inputs, neighbours: list[list[KeysValues]], fp8: bool) -> None:
        shape = weights.shape
        self.weights, self.inputs = weights, inputs
        own, lent, heads = len(inputs.hidden), shape.context * shape.grid.tokens, shape.heads
        self.neighbours: list[list[Features8]] = [[to_8bit(n, heads, fp8) for n in layer] for layer in neighbours]
        starts = dict.fromkeys(("head", "tail")[: len(neighbours[0])], 0)
        values = FP8 if fp8 else weights.dtype
        workspace = Workspace8(own, starts, lent, shape.inner, heads, values, weights.device)
        self.view = workspace.view(own, [(side, True) for side in starts], (), first=False)
        self.means = [torch.zeros(shape.inner, device=weights.device) for _ in neighbours]

    def __call__(self) -> torch.Tensor:
        inputs, ours, context = self.inputs, self.weights.ours, self.view.context
        assert isinstance(context, Context8)
        hidden = inputs.hidden
        pending: Pending | None = None
        for index, mean in enumerate(self.means):
            context.means[0].copy_(mean)
            for place, features in zip(self.view.places, self.neighbours[index], strict=True):
                for target, source in zip(place, features.tensors, strict=True):
                    target.copy_(source)
            text = KeysValues(inputs.text[index, 0], inputs.text[index, 1])
            hidden, pending = ours.layer(index, hidden, pending, inputs.time, text, inputs.rotary, context)
            mean.copy_(key_mean(context.k_sums, len(hidden)))
        return ours.finish(hidden, pending)


def diffusers_step(weights: Weights, inputs: Inputs) -> torch.Tensor:
    """One unit without neighbours through diffusers' own blocks."""
    hidden, rotary = inputs.hidden[None], inputs.diffusers_rotary
    for block in weights.blocks:
        hidden = block(hidden, inputs.text_states[None], inputs.temb[None], rotary)
    return hidden[0]


class AuthorsStep:
    """A block-step of the authors' code: both branches at once over [C previous | B own | C cached] frames.

    cache: per layer, raw keys and values [2, C tokens, inner] of the block processed before; None for the newest.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        shape = weights.shape
        self.lent = shape.context * shape.grid.tokens
        self.cache: list[Pair | None] = [None] * shape.layers

    def __call__(self, inputs: Inputs, use_cache: bool) -> torch.Tensor:
        """inputs: of B + C frames. Returns hidden states [2, (B + C) tokens, inner]."""
        shape = self.weights.shape
        hidden = inputs.hidden.expand(2, -1, -1)
        text, temb = inputs.text_states.expand(2, -1, -1), inputs.temb.expand(2, -1, -1)
        frames = len(inputs.hidden) // shape.grid.tokens
        query_rotary = inputs.diffusers_rotary
        long = self.weights.ours.rotary(0, frames + (shape.context if use_cache else 0), shape.grid)
        key_rotary = tuple(t.repeat_interleave(2, dim=1)[None, :, None] for t in long)
        for index, block in enumerate(self.weights.blocks):
            cached = self.cache[index] if use_cache else None
            hidden = self._layer(index, block, hidden, text, temb, query_rotary, key_rotary, cached)
        return hidden

    def _layer(
        self, index: int, block: WanTransformerBlock, hidden: torch.Tensor, text: torch.Tensor, temb: torch.Tensor,
        query_rotary: Pair, key_rotary: tuple[torch.Tensor, ...], cached: Pair | None,
    ) -> torch.Tensor:  # fmt: skip
        shift, scale, gate, c_shift, c_scale, c_gate = (block.scale_shift_table + temb.float()).chunk(6, dim=1)
        normed = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        attn = block.attn1
        query, key, value = attn.to_q(normed), attn.to_k(normed), attn.to_v(normed)
        first = self.lent  # the first own frame; in front of it lie the previous block's
        kept = key[:, first : first + self.lent].clone(), value[:, first : first + self.lent].clone()
        if cached is not None:
            key, value = torch.cat([key, cached[0]], dim=1), torch.cat([value, cached[1]], dim=1)
        self.cache[index] = kept
        query, key = attn.norm_q(query), attn.norm_k(key)
        heads = attn.heads
        query, key, value = (t.unflatten(2, (heads, -1)) for t in (query, key, value))
        query, key = _rotate(query, *query_rotary), _rotate(key, key_rotary[0], key_rotary[1])
        made = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        attended = attn.to_out[0](made.transpose(1, 2).flatten(2))
        hidden = (hidden.float() + attended * gate).type_as(hidden)
        normed = block.norm2(hidden.float()).type_as(hidden)
        hidden = hidden + block.attn2(normed, text, None, None)
        normed = (block.norm3(hidden.float()) * (1 + c_scale) + c_shift).type_as(hidden)
        return (hidden.float() + block.ffn(normed).float() * c_gate).type_as(hidden)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos[..., 0::2] - x2 * sin[..., 1::2]
    out[..., 1::2] = x1 * sin[..., 1::2] + x2 * cos[..., 0::2]
    return out.type_as(x)
