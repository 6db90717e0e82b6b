"""Protocols between the engine and a model: facts from its configs, slices of its layers, a decoder, a prompt encoder.

A family implements these protocols (``registry`` finds it). It knows nothing of ranks, schedules or blocks; positions
are absolute latent-frame indices of the video, so features made for one block are right for its neighbour as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from dualparal.kernels.qk_norm_rope import Lend
from dualparal.models.keys_values import Context8, KeysValues

Pending = tuple[torch.Tensor, torch.Tensor | None]  # (y, gate): x + y * gate is still to be done, by the next norm


class Grid(NamedTuple):
    """The size of a latent frame in latent pixels (height, width), and in tokens after patching."""

    height: int
    width: int
    tokens_height: int
    tokens_width: int

    @property
    def tokens(self) -> int:
        """Tokens per frame."""
        return self.tokens_height * self.tokens_width


class Rotary(NamedTuple):
    """Rotary angles of a window of tokens: cosines and sines, float32 [tokens, head_dim // 2] each."""

    cos: torch.Tensor
    sin: torch.Tensor


class TimeCondition(NamedTuple):
    """The modulations of a timestep for a slice's layers, made once per step; or those of several, joined for a unit.

    Attributes:
        layers: float32 [layers of the slice, 6 (or as the family has it), inner]; joined [layers, runs, 6, inner].
        head: float32 [2, inner] for the slice that has the head, otherwise None; joined [runs, 2, inner].
        rows: tokens of each run, in the order of the unit's; empty: all of them are at one timestep.
    """

    layers: torch.Tensor
    head: torch.Tensor | None
    rows: tuple[int, ...] = ()


class AttentionKernel(Protocol):
    """Self-attention on this device.

    Args:
        queries: [tokens, inner]; for ``Context8`` the result of the 8-bit norm-and-rotate pass.
        context: the keys and values that they attend to.
        heads: number of heads in ``inner``.

    Returns:
        [tokens, inner] in the model's dtype.
    """

    def __call__(self, queries: Any, context: KeysValues | Context8, heads: int) -> torch.Tensor: ...


class AttentionStrategy(Protocol):
    """A function around the kernel of self-attention, called in every layer.

    It gets queries, keys and values normed and rotated. It may send them elsewhere or split them by heads before it
    calls ``kernel`` once or several times. It returns the result of one call on all of them: [tokens, inner].
    """

    def __call__(
        self, kernel: AttentionKernel, queries: Any, context: KeysValues | Context8, heads: int
    ) -> torch.Tensor: ...


def attend_here(kernel: AttentionKernel, queries: Any, context: KeysValues | Context8, heads: int) -> torch.Tensor:
    """Calls the kernel once: the strategy of a stage on one device."""
    return kernel(queries, context, heads)


class Slice(Protocol):
    """A run of layers of one transformer, with the embedding or the head where it owns them. No batch dimension.

    Attributes:
        num_layers: layers of the slice.
        inner_dim: width of hidden states, keys and values.
        heads: heads of self-attention.
        dtype: the dtype of hidden states.
        device: the device of its tensors.
    """

    num_layers: int
    inner_dim: int
    heads: int
    dtype: torch.dtype
    device: torch.device

    def patches(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [1, C, F, H, W] as the numbers of each token, [tokens, patch], in the slice's dtype. Any slice."""
        ...

    def embed(self, patches: torch.Tensor) -> torch.Tensor:
        """Tokens of latents [tokens, patch] to hidden states [tokens, inner]. First slice only."""
        ...

    def time(self, timestep: torch.Tensor) -> TimeCondition:
        """The modulations of ``timestep``, a scalar tensor of the sampler's."""
        ...

    def text(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Prompt embeddings [sequence, text_dim] to cross-attention keys and values [layers, 2, sequence, inner]."""
        ...

    def rotary(self, start: int, frames: int, grid: Grid) -> Rotary:
        """Angles of ``frames`` latent frames from absolute index ``start`` on."""
        ...

    def shift(self, frames: int) -> Rotary:
        """Angles [1, head_dim // 2] that move rotated keys by so many latent frames in time, and nowhere else."""
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
    ) -> tuple[torch.Tensor, Pending | None]:
        """Runs one layer.

        Args:
            index: of the layer, counted from 0 in this slice.
            hidden: [tokens, inner].
            pending: the part of the residual that the layer before has left to this one.
            time: modulations of the slice's layers at this step; of several runs for a family whose spec says that it
                takes them (``unequal_times``, ``keeps_first_frame``).
            text: keys and values of the text for this layer, [sequence, inner] each.
            rotary: angles of the tokens.
            context: rows [own | neighbours]; the neighbours' keys and values are there, the own ones are written.
                ``Context8``: self-attention in 8 bits; attention to the text stays as it is.
            lends: places that get own keys and values besides, for neighbours to read; in 16 bits only.
            attend: the strategy around the kernel of self-attention.

        Returns:
            Hidden states [tokens, inner], and the part of the residual that is still to be added to them, if any.
        """
        ...

    def finish(self, hidden: torch.Tensor, pending: Pending | None) -> torch.Tensor:
        """Hidden states [tokens, inner] with nothing pending, to hand to the next slice."""
        ...

    def head(self, hidden: torch.Tensor, pending: Pending | None, time: TimeCondition) -> torch.Tensor:
        """The velocity of tokens [tokens, patch], the unit's last ones. Last slice only."""
        ...

    def picture(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The velocity [1, C, F, H, W] of whole frames of tokens [tokens, patch]. Any slice."""
        ...


class ModelSpec(Protocol):
    """Facts of a model, known from its config files alone."""

    @classmethod
    def from_configs(
        cls,
        transformers: Sequence[Mapping[str, Any]],
        vae: Mapping[str, Any],
        pipeline: Mapping[str, Any],
        image_encoder: Mapping[str, Any] | None = None,
    ) -> ModelSpec:
        """Makes a spec from the configs of the transformers, of the VAE, of the pipeline itself (model_index.json), and
        of its image encoder where it has one.

        Raises:
            ValueError: a variant that the adapter does not run; names the difference.
            KeyError, TypeError: not such configs at all.
        """
        ...

    @property
    def num_layers(self) -> int:
        """Layers of one transformer."""
        ...

    @property
    def num_experts(self) -> int:
        """Number of transformers."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of latents."""
        ...

    @property
    def inner_dim(self) -> int:
        """Width of hidden states, keys and values."""
        ...

    @property
    def heads(self) -> int:
        """Heads of self-attention."""
        ...

    @property
    def text_dim(self) -> int:
        """Width of prompt embeddings."""
        ...

    @property
    def condition_channels(self) -> int:
        """Channels that the model is told of images, behind those of latents; 0: none."""
        ...

    @property
    def image_counts(self) -> Sequence[int]:
        """Numbers of images that a video takes, see ``config.images.check_images``."""
        ...

    @property
    def image_tokens(self) -> int:
        """Tokens of all images that are read by attention, before the text's; 0: none."""
        ...

    @property
    def text_tokens(self) -> int | None:
        """Tokens that every text has to have; None: any number."""
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

    @property
    def unequal_times(self) -> bool:
        """True for a model that was trained for frames of unequal noise, and is told the timestep of each."""
        ...

    @property
    def keeps_first_frame(self) -> bool:
        """True for a model that goes on from a first frame whose latents are given, and is told timestep 0 for it."""
        ...

    def expert(self, timestep: float, num_train_timesteps: int) -> int:
        """Index of the transformer that handles a timestep (0 to ``num_train_timesteps``)."""
        ...

    def grid(self, height: int, width: int) -> Grid:
        """Latent grid of a frame of ``height`` x ``width`` pixels.

        Both divide by factor * patch (``VideoConfig.check_size``).
        """
        ...

    def shapes(self, expert: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a transformer's checkpoint."""
        ...

    def is_unused(self, name: str) -> bool:
        """True for a tensor that checkpoints may hold besides, and that nothing reads."""
        ...

    def names(self, expert: int, layers: range) -> list[str]:
        """Names of the tensors that a slice of these layers needs."""
        ...

    def tensor_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype a tensor is kept in when the model runs in ``dtype``."""
        ...

    def linear_layer(self, name: str) -> int | None:
        """The layer of a weight that may have 8 bits; None for all other tensors. The slice has a ``Linear`` of it."""
        ...

    def build(self, tensors: MutableMapping[str, torch.Tensor], layers: range) -> Slice:
        """A slice from the tensors of ``names`` as ``models.linear.placed`` makes them; some are taken out."""
        ...


class RowExchange(Protocol):
    """The way from one part of the picture's rows to the others: each is decoded by a decoder of its own, in lockstep.

    Attributes:
        index: of this part, 0 at the top.
        count: number of parts.
    """

    index: int
    count: int

    def swap(self, sends: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]) -> None:
        """Sends tensors to other parts and takes those that they send here; all parts call it for the same step.

        Args:
            sends: by part, contiguous.
            wanted: by part, contiguous tensors that are filled, of shape and dtype of what that part sends.

        Raises:
            PeerLost: another part is gone.
        """
        ...


class Decoder(Protocol):
    """Latents to frames, a video at a time, never the whole of it. The VAE is only read: decoders may share one."""

    @property
    def history(self) -> int:
        """Number of latent frames back that a frame can see. A fresh decoder fed so many goes on with the same bits."""
        ...

    @property
    def state_bytes(self) -> int:
        """Bytes held between two pushes."""
        ...

    def push(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes the next latent frames of the video. However the latents are cut, the frames are the same.

        Args:
            latents: [1, C, f, h, w], as the transformer makes them.

        Returns:
            Frames [F, 3, h * spatial_factor, w * spatial_factor] in [-1, 1]. A decoder made with ``RowExchange`` takes
            whole latents too, and returns the frames' rows that belong to its part (``config.decoding.row_ranges``).
        """
        ...

    def reset(self) -> None:
        """Forgets the video: the next latent is the first one of another."""
        ...


class LightFile(Protocol):
    """A file with a light decoder, checked by its header.

    Attributes:
        fingerprint: of its bytes, for ranks and snapshots to compare.
    """

    @property
    def fingerprint(self) -> str: ...

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Reads what decoders share."""
        ...

    def decoder(self, shared: Any, rows: RowExchange | None = None) -> Decoder:
        """Makes the decoder of one video; ``rows``: of the rows of one part."""
        ...


class PromptEncoder(Protocol):
    """Prompts to embeddings. The encoder behind it is loaded at the first prompt."""

    def encode(
        self, prompt: str, negative_prompt: str | None, guidance: bool, max_sequence_length: int
    ) -> torch.Tensor:
        """Embeddings [1 or 2, max_sequence_length, text_dim].

        Args:
            prompt: the text of the conditional row.
            negative_prompt: the text of the unconditional row; None: empty.
            guidance: two rows, the conditional one first; otherwise one.
            max_sequence_length: tokens; longer prompts are cut, shorter ones padded.
        """
        ...

    def free(self) -> None:
        """Gives the encoder's memory back."""
        ...


def component_config(config: Any) -> dict[str, Any]:
    """A plain dict of a diffusers config, without private keys."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}
