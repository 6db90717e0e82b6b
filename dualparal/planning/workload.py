"""A workload: a video, the model that makes it, and the choices on which all counts depend."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dualparal.config.blocks import BlockConfig
from dualparal.config.decoding import choose_vae_dtype
from dualparal.config.engine import DTYPE_BYTES, EngineConfig
from dualparal.config.reuse import StepPlan
from dualparal.config.video import VideoConfig
from dualparal.models.sizes import ModelSizes, VaeSizes
from dualparal.schedule.layout import Layout, token_ranges
from dualparal.schedule.schedule import Schedule

FLOW_SHIFT = 5.0  # of Wan's samplers at 720p, and the default of ``dualparal/moving_shapes``


@dataclass(frozen=True)
class Workload:
    """One or several videos, the model that makes them, and how it is run.

    Attributes:
        model: its sizes.
        video: size, length, steps and guidance.
        engine: its dtypes decide bytes (default bfloat16, and for the VAE what "auto" is on a card with units for
            that); its stages and device are not asked.
        num_videos: independent videos of this kind, made in turns.

    Raises:
        ValueError: a size or a length that the model cannot make.
    """

    model: ModelSizes
    video: VideoConfig = field(default_factory=VideoConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    num_videos: int = 1

    def __post_init__(self) -> None:
        self.video.check_size(self._side, self._side)
        self.video.num_latents(self.model.vae.temporal_factor)

    @property
    def blocks(self) -> BlockConfig:
        """The cut of the video into blocks."""
        return self.engine.blocks

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the transformer's dtype."""
        return DTYPE_BYTES[self.engine.dtype or "bfloat16"]

    @property
    def decode_itemsize(self) -> int:
        """Bytes of a number of the VAE's dtype."""
        return DTYPE_BYTES[choose_vae_dtype(self.engine.vae_dtype, on_card=True)]

    @cached_property
    def decoder(self) -> VaeSizes:
        """Sizes of what decodes: the VAE, or the light decoder in its place."""
        path = self.engine.decoder
        return self.model.vae if path is None else self.model.light(Path(path))

    @property
    def decode(self) -> bool:
        """True when frames are made, and not latents only."""
        return self.video.output_type != "latent"

    @cached_property
    def layout(self) -> Layout:
        """The places of the blocks in the video."""
        return Layout(self.blocks, self.video.num_latents(self.model.vae.temporal_factor))

    @cached_property
    def tokens(self) -> int:
        """Tokens per latent frame."""
        return (self.video.height // self._side) * (self.video.width // self._side)

    @property
    def _side(self) -> int:
        """Side of a token, in pixels of a frame."""
        return self.model.vae.spatial_factor * self.model.patch

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt; padded to this length."""
        return self.video.max_sequence_length

    @property
    def condition_tokens(self) -> int:
        """Tokens beside the video's that attention reads: of images, and of a prompt."""
        return self.model.image_tokens + self.text_tokens

    @property
    def encoded_latents(self) -> int:
        """Latent frames that are encoded of a video with images; 0 where the model takes none."""
        if not self.model.condition_channels:
            return 0
        most = self.model.vae.encoder_history + 2 + (max(self.model.image_counts) == 2)
        return min(most, self.layout.padded_latents or most)

    @property
    def pixels(self) -> int:
        """Latent pixels of a latent frame."""
        return self.tokens * self.model.patch**2

    @property
    def rows(self) -> int:
        """Rows of a latent frame, which may be decoded in parts."""
        return self.video.height // self.model.vae.spatial_factor

    @property
    def heads(self) -> int:
        """Heads of self-attention."""
        return self.model.inner // self.model.head_dim

    @property
    def places(self) -> int:
        """Cards of each stage, P."""
        return self.engine.sequence_parallel

    @property
    def head_share(self) -> float:
        """The largest share of the heads that a place of a stage has."""
        return -(-self.heads // self.places) / self.heads

    def place_tokens(self, tokens: int) -> int:
        """The most tokens that a place of a stage has of so many, those of whole frames."""
        if self.places == 1:
            return tokens
        return max(map(len, token_ranges(tokens // self.tokens, self.tokens, self.places)))

    def part_rows(self, parts: int) -> int:
        """Rows of the largest of so many parts, at most ``rows``."""
        return -(-self.rows // parts)

    @cached_property
    def steps(self) -> StepPlan:
        """The steps at which the model runs. Noise levels, which matter where guidance is confined to some, are those
        of ``FLOW_SHIFT``: config files of weights alone do not tell the sampler's."""
        count = self.video.num_inference_steps
        noise = [1 - step / count for step in range(count)]
        levels = [FLOW_SHIFT * level / (1 + (FLOW_SHIFT - 1) * level) for level in noise]
        return self.engine.reuse.plan(levels, self.video.guidance)

    def schedule(self, num_stages: int) -> Schedule:
        """The very schedule that the engine walks."""
        return Schedule.of(
            self.engine,
            self.video,
            num_stages=num_stages,
            steps=self.steps,
            num_blocks=self.layout.num_blocks,
            num_videos=self.num_videos,
        )
