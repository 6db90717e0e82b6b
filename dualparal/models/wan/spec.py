"""Facts of Wan2.1 and Wan2.2 text-to-video models, from their config files alone."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dualparal.models.base import Grid, component_config
from dualparal.models.wan.shapes import EMBED, HEAD, KEYS, LINEARS, tensor_shapes
from dualparal.models.wan.transformer import WanSlice

# diffusers: WanTransformer3DModel._keep_in_fp32_modules
_KEEP_FP32 = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}


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
            elif name in EMBED:
                wanted = layers.start == 0
            elif name in HEAD:
                wanted = layers.stop == self.num_layers
            else:
                wanted = name.startswith("condition_embedder.")
            if wanted:
                found.append(name)
        return found

    def tensor_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if _KEEP_FP32 & set(name.split(".")) else dtype

    def linear_layer(self, name: str) -> int | None:
        blocks, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        return int(index) if blocks == "blocks" and part.removesuffix(".weight") in LINEARS else None

    def build(self, tensors: MutableMapping[str, torch.Tensor], layers: range) -> WanSlice:
        return WanSlice(self.config, tensors, layers)
