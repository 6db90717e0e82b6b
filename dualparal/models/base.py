"""What the engine needs of a model: facts from its config, slices of its layers, a decoder, a prompt encoder.

A family implements these protocols (``registry`` says where). It knows nothing of ranks, schedules or blocks;
positions are absolute latent-frame indices of the video, so features made for one block are right for its neighbour
as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from dualparal.kernels.qk_norm_rope import Lend
from dualparal.models.keys_values import Context8, KeysValues

Pending = tuple[torch.Tensor, torch.Tensor | None]  # (y, gate): x + y * gate is still to be done, by the next norm


class Grid(NamedTuple):
    """Size of a latent frame in latent pixels, and in tokens (after patching)."""

    height: int
    width: int
    tokens_height: int
    tokens_width: int

    @property
    def tokens(self) -> int:
        """Tokens per frame."""
        return self.tokens_height * self.tokens_width


class Rotary(NamedTuple):
    """Rotary angles of a window of tokens: cosines and sines, float32 [tokens, head_dim // 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


class TimeCondition(NamedTuple):
    """What a timestep means to a slice. Made once per step and run, not per unit.

    layers: float32 [layers of the slice, 6, inner] (or another number of rows, as the family has it); head: float32
    [2, inner], for the slice that has the head.
    """

    layers: torch.Tensor
    head: torch.Tensor | None


class AttentionKernel(Protocol):
    """Self-attention on this device.

    ``queries`` [tokens, inner] (or what the 8-bit pass makes of them) attend to the rows of ``context``; returns
    [tokens, inner] in the model's dtype.
    """

    def __call__(self, queries: Any, context: KeysValues | Context8, heads: int) -> torch.Tensor: ...


class AttentionStrategy(Protocol):
    """Goes around the kernel of self-attention in every layer.

    It gets queries, keys and values normed and rotated, may send them elsewhere or split them by heads before it
    calls ``kernel`` once or several times, and returns what one call on all of them would: [tokens, inner].
    """

    def __call__(
        self, kernel: AttentionKernel, queries: Any, context: KeysValues | Context8, heads: int
    ) -> torch.Tensor: ...


def attend_here(kernel: AttentionKernel, queries: Any, context: KeysValues | Context8, heads: int) -> torch.Tensor:
    """The strategy of a stage on one device: one call."""
    return kernel(queries, context, heads)


class Slice(Protocol):
    """A run of layers of one transformer, with the embedding or the head where it owns them. No batch dimension."""

    num_layers: int
    inner_dim: int
    heads: int
    dtype: torch.dtype
    device: torch.device

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [1, C, F, H, W] to hidden states [tokens, inner]. First slice only."""
        ...

    def time(self, timestep: torch.Tensor) -> TimeCondition:
        """timestep: a scalar of the sampler's."""
        ...

    def text(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Prompt embeddings [sequence, text_dim] to cross-attention keys and values [layers, 2, sequence, inner]."""
        ...

    def rotary(self, start: int, frames: int, grid: Grid) -> Rotary:
        """Angles of ``frames`` latent frames from absolute index ``start`` on."""
        ...

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
        """One layer. Returns hidden states and what is still to be added to them.

        Args:
            context: rows [own | neighbours]; the neighbours' keys and values are there, the own ones are written.
                ``Context8``: self-attention in 8 bits; attention to the text stays as it is.
            lends: where own keys and values go besides, for neighbours to read; in 16 bits only.
            attend: goes around the kernel of self-attention.
        """
        ...

    def finish(self, hidden: torch.Tensor, pending: Pending | None) -> torch.Tensor:
        """Hidden states with nothing pending, to hand to the next slice."""
        ...

    def head(self, hidden: torch.Tensor, pending: Pending | None, time: TimeCondition, grid: Grid) -> torch.Tensor:
        """Velocity [1, C, F, H, W] of whole frames of tokens. Last slice only."""
        ...


class ModelSpec(Protocol):
    """Facts of a model, known from its config files alone."""

    @classmethod
    def from_configs(
        cls, transformers: Sequence[Mapping[str, Any]], vae: Mapping[str, Any], pipeline: Mapping[str, Any]
    ) -> ModelSpec:
        """Of the transformers' configs, the VAE's, and the pipeline's own (model_index.json).

        Raises:
            ValueError: a variant that the adapter does not run; names what is different.
            KeyError, TypeError: not such configs at all.
        """
        ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_experts(self) -> int:
        """Number of transformers."""
        ...

    @property
    def in_channels(self) -> int:
        """Of latents."""
        ...

    @property
    def inner_dim(self) -> int:
        """Width of hidden states, keys and values."""
        ...

    @property
    def heads(self) -> int: ...

    @property
    def text_dim(self) -> int:
        """Width of prompt embeddings."""
        ...

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Latent frames (1), rows and columns of a token."""
        ...

    @property
    def spatial_factor(self) -> int:
        """Pixels of a frame per latent pixel, on each side."""
        ...

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame; the first one of a video is a single frame."""
        ...

    def expert(self, timestep: float, num_train_timesteps: int) -> int:
        """Which of the model's transformers handles a timestep."""
        ...

    def grid(self, height: int, width: int) -> Grid:
        """Latent grid of a frame whose pixels divide by factor * patch (see VideoConfig.check_size)."""
        ...

    def shapes(self, expert: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a transformer's checkpoint."""
        ...

    def is_unused(self, name: str) -> bool:
        """Is this a tensor that checkpoints may hold besides, and nothing reads?"""
        ...

    def names(self, expert: int, layers: range) -> list[str]:
        """The tensors that a slice of these layers needs."""
        ...

    def tensor_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype a tensor is kept in when the model runs in ``dtype``."""
        ...

    def build(self, tensors: Mapping[str, torch.Tensor], layers: range) -> Slice:
        """A slice from its tensors."""
        ...


class Decoder(Protocol):
    """Latents to frames, a video at a time, never the whole of it. The VAE is only read: decoders may share one."""

    @property
    def history(self) -> int:
        """How many latent frames back a frame can see: a fresh decoder fed so many goes on with the same bits."""
        ...

    @property
    def state_bytes(self) -> int:
        """Bytes held between two pushes."""
        ...

    def push(self, latents: torch.Tensor) -> torch.Tensor:
        """The next latent frames [1, C, f, h, w] of the video, as the transformer makes them, to frames
        [F, 3, h * spatial_factor, w * spatial_factor] in [-1, 1]. However the latents are cut, the frames are the same.
        """
        ...

    def reset(self) -> None:
        """Forgets the video: the next latent is the first one of another."""
        ...


class PromptEncoder(Protocol):
    """Prompts to embeddings. What it needs for that is loaded at the first prompt."""

    def encode(
        self, prompt: str, negative_prompt: str | None, guidance: bool, max_sequence_length: int
    ) -> torch.Tensor:
        """Embeddings [1 or 2, max_sequence_length, text_dim]; guidance: two rows, the conditional one first."""
        ...

    def free(self) -> None:
        """Gives back the memory of what was loaded."""
        ...


def component_config(config: Any) -> dict[str, Any]:
    """A plain dict of a diffusers config, without private keys."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}
