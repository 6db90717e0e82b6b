"""SkyReels-V2 with diffusion forcing: Wan2.1's layers, trained for frames of unequal noise, whose timesteps it is told.

The arithmetic is that of diffusers' SkyReelsV2Transformer3DModel (transformer_skyreels_v2.py) in its synchronous form:
sinusoids in float64 of whole timesteps, and an embedding of the frame rate beside that of time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dualparal.models.wan.shapes import KEYS
from dualparal.models.wan.spec import WanSpec
from dualparal.models.wan.transformer import WanSlice

FPS_24 = 1  # row of the table of frame rates; 0 is 16 frames a second


@dataclass(frozen=True)
class SkyReelsSpec(WanSpec):
    """Facts of a SkyReels-V2-DF model from its config files."""

    keys = KEYS | {"inject_sample_info", "num_frame_per_block"}
    transformer_class = "SkyReelsV2Transformer3DModel"
    unequal_times = True

    @classmethod
    def from_configs(
        cls,
        transformers: Sequence[Mapping[str, Any]],
        vae: Mapping[str, Any],
        pipeline: Mapping[str, Any],
        image_encoder: Mapping[str, Any] | None = None,
    ) -> SkyReelsSpec:
        """Makes a spec; raises ValueError for variants that this adapter does not run, naming the difference."""
        found = super().from_configs(transformers, vae, pipeline, image_encoder)
        if (causal := found.config.get("num_frame_per_block", 1)) != 1:
            raise ValueError(
                f"this SkyReels-V2 transformer has num_frame_per_block={causal} (a causal mask): only 1 is supported"
            )
        assert isinstance(found, cls)
        return found

    def shapes(self, expert: int) -> dict[str, tuple[int, ...]]:
        found, inner = super().shapes(expert), self.inner_dim
        if self.config.get("inject_sample_info"):
            found |= {
                "fps_embedding.weight": (2, inner),
                "fps_projection.net.0.proj.weight": (inner, inner),
                "fps_projection.net.0.proj.bias": (inner,),
                "fps_projection.net.2.weight": (6 * inner, inner),
                "fps_projection.net.2.bias": (6 * inner,),
            }
        return found

    def build(self, tensors: MutableMapping[str, torch.Tensor], layers: range) -> SkyReelsSlice:
        return SkyReelsSlice(self.config, tensors, layers)


class SkyReelsSlice(WanSlice):
    """Consecutive layers of a SkyReels-V2 transformer (``models.base.Slice``), at 24 frames a second."""

    def _frequencies(self, timestep: torch.Tensor) -> torch.Tensor:
        """Sinusoids as of ``get_1d_sincos_pos_embed_from_grid`` of diffusers: float64, cosines first."""
        half = int(self.config["freq_dim"]) // 2
        steps = torch.arange(half, device=self.device, dtype=torch.float64) / half
        angles = math.trunc(timestep.item()) * (1.0 / 10000**steps)
        return torch.cat([angles.cos(), angles.sin()])[None]

    def _projected(self, embedded: torch.Tensor) -> torch.Tensor:
        projected = super()._projected(embedded)
        if not self.config.get("inject_sample_info"):
            return projected
        rate = self._condition["fps_embedding.weight"][FPS_24 : FPS_24 + 1]
        inside = F.silu(self._linear("fps_projection.net.0.proj", rate))
        return projected + self._linear("fps_projection.net.2", inside)
