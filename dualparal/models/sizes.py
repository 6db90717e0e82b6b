"""Sizes of a model for a plan: parameters, arithmetic and bytes, from its configs alone. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol


class Borders(NamedTuple):
    """Needs of parts of the picture's rows to decode one latent frame, each of its neighbours.

    Attributes:
        numbers: of the rows that a part sends to one neighbour, at all convolutions together.
        messages: to that neighbour.
        gathered: numbers per latent pixel that every part needs of all: keys and values of attention.
    """

    numbers: int
    messages: int
    gathered: int


class VaeSizes(Protocol):
    """Sizes of the decoder. The argument ``pixels`` is the number of latent pixels of a latent frame."""

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
        """Parameters of all that the engine loads, the encoder too."""
        ...

    def flops(self, pixels: int) -> int:
        """FLOPs of decoding one latent frame: multiply-adds times two."""
        ...

    def cache_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes held from one latent frame to the next, for one video, in numbers of ``itemsize`` bytes."""
        ...

    def working_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes of the largest set of tensors that live at once while a latent frame is decoded."""
        ...

    @property
    def encoder_history(self) -> int:
        """Latent frames back that an encoded one can see. This and what follows: of the VAE of a model with images."""
        ...

    def encode_flops(self, pixels: int) -> int:
        """FLOPs of encoding one latent frame."""
        ...

    def encode_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes that the encoder holds while it encodes, besides parameters, in numbers of ``itemsize`` bytes."""
        ...

    def borders(self, width: int) -> Borders:
        """The needs of parts of the rows, of ``width`` latent pixels, while a latent frame is decoded."""
        ...


class LinearSizes(NamedTuple):
    """Sizes of the linears of one layer that may have 8 bits.

    Attributes:
        parameters: of their matrices.
        channels: numbers per token that come out of all of them; each has a scale.
        inputs: numbers per token that go into all of them, and are quantised.
        widest: numbers per token of the largest input.
    """

    parameters: int
    channels: int
    inputs: int
    widest: int


class ModelSizes(Protocol):
    """Sizes of a pipeline: transformers of one shape, VAE decoder, text encoder.

    Pairs of parameters are (those kept in the model's dtype, those kept in float32). Parameters are numbers, not bytes.
    """

    @property
    def name(self) -> str:
        """The model's name, for people."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers of one transformer."""
        ...

    @property
    def experts(self) -> int:
        """Number of transformers."""
        ...

    @property
    def inner(self) -> int:
        """Width of hidden states, keys and values."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of one head of attention."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of latents."""
        ...

    @property
    def out_channels(self) -> int:
        """Channels of velocities."""
        ...

    @property
    def text_dim(self) -> int:
        """Width of prompt embeddings."""
        ...

    @property
    def patch(self) -> int:
        """Side of a token in latent pixels."""
        ...

    @property
    def trained_latents(self) -> int | None:
        """Latent frames of the videos that it was trained with; None: not known."""
        ...

    @property
    def vae(self) -> VaeSizes:
        """Sizes of the VAE."""
        ...

    def light(self, path: Path) -> VaeSizes:
        """Sizes of the light decoder in a file, by its header. Raises ModelError."""
        ...

    @property
    def image_counts(self) -> tuple[int, ...]:
        """Numbers of images that a video takes, see ``config.images.check_images``."""
        ...

    @property
    def condition_channels(self) -> int:
        """Channels that the transformer is told of images beside latents."""
        ...

    @property
    def image_tokens(self) -> int:
        """Tokens of images that attention reads before the text's."""
        ...

    @property
    def image_encoder(self) -> int:
        """Parameters of what makes these tokens, in float32."""
        ...

    @property
    def text_encoder(self) -> int:
        """Parameters of the text encoder."""
        ...

    @property
    def layer_parameters(self) -> tuple[int, int]:
        """Parameters of one layer."""
        ...

    @property
    def condition_parameters(self) -> tuple[int, int]:
        """Parameters that every stage owns besides its layers: embeddings of time and text."""
        ...

    @property
    def embed_parameters(self) -> int:
        """Parameters of the patch embedding, which the first stage owns."""
        ...

    @property
    def head_parameters(self) -> tuple[int, int]:
        """Parameters of the head, which the last stage owns."""
        ...

    @property
    def joined_parameters(self) -> int:
        """Parameters of one layer that are there twice while a slice is built from its tensors."""
        ...

    @property
    def linear_flops(self) -> int:
        """FLOPs of one layer per token, without attention to tokens and text: multiply-adds times two."""
        ...

    @property
    def linears(self) -> LinearSizes:
        """Sizes of the linears of one layer that may have 8 bits; they are among ``layer_parameters``."""
        ...

    @property
    def layer_activations(self) -> int:
        """Numbers per token that a layer holds at its largest."""
        ...
