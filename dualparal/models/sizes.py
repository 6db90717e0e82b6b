"""What a plan needs to know of a model: parameters, arithmetic and bytes, from its configs alone. No torch."""

from __future__ import annotations

from typing import Protocol


class VaeSizes(Protocol):
    """The decoder. ``pixels``: latent pixels of a latent frame."""

    @property
    def spatial_factor(self) -> int:
        """Pixels of a frame per latent pixel, on each side."""
        ...

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame but the first."""
        ...

    @property
    def parameters(self) -> int:
        """Of all that the engine loads."""
        ...

    def flops(self, pixels: int) -> int:
        """Multiply-adds times two of decoding one latent frame."""
        ...

    def cache_bytes(self, pixels: int) -> int:
        """Bytes held from one latent frame to the next, of one video."""
        ...

    def working_bytes(self, pixels: int) -> int:
        """Bytes of the largest set of tensors that live at once while a latent frame is decoded."""
        ...


class ModelSizes(Protocol):
    """A pipeline: transformers of one shape, VAE decoder, text encoder.

    Pairs of parameters are those kept in the model's dtype, and those kept in float32.
    """

    @property
    def name(self) -> str: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def experts(self) -> int:
        """Number of transformers."""
        ...

    @property
    def inner(self) -> int:
        """Width of hidden states, keys and values."""
        ...

    @property
    def head_dim(self) -> int: ...

    @property
    def in_channels(self) -> int: ...

    @property
    def out_channels(self) -> int: ...

    @property
    def text_dim(self) -> int: ...

    @property
    def patch(self) -> int:
        """Side of a token in latent pixels."""
        ...

    @property
    def trained_latents(self) -> int | None:
        """Latent frames of the videos that it was trained with, if that is known."""
        ...

    @property
    def vae(self) -> VaeSizes: ...

    @property
    def text_encoder(self) -> int:
        """Number of its parameters."""
        ...

    @property
    def layer_parameters(self) -> tuple[int, int]: ...

    @property
    def condition_parameters(self) -> tuple[int, int]:
        """What every stage owns: embeddings of time and text."""
        ...

    @property
    def embed_parameters(self) -> int:
        """Of the first stage."""
        ...

    @property
    def head_parameters(self) -> tuple[int, int]:
        """Of the last stage."""
        ...

    @property
    def joined_parameters(self) -> int:
        """Of one layer: those that are there twice while a slice is built from its tensors."""
        ...

    @property
    def linear_flops(self) -> int:
        """Multiply-adds times two of one layer per token, without attention to tokens and text."""
        ...

    @property
    def layer_activations(self) -> int:
        """Numbers per token that a layer holds at its largest."""
        ...
