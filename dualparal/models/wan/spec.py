"""Facts of Wan2.1 and Wan2.2 text-to-video and image-to-video models, from their config files alone."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dualparal.models.base import Grid, component_config
from dualparal.models.wan.shapes import EMBED, HEAD, KEYS, LINEARS, TEXT_TOKENS, image_counts, tensor_shapes
from dualparal.models.wan.transformer import WanSlice

# diffusers: WanTransformer3DModel._keep_in_fp32_modules
_KEEP_FP32 = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}


@dataclass(frozen=True)
class WanSpec:
    """Facts of a Wan text-to-video or image-to-video model from its config files.

    Attributes:
        configs: the config of ``transformer``, and of ``transformer_2`` where there is one (Wan2.2).
        boundary_ratio: Wan2.2: timesteps at or above boundary_ratio * num_train_timesteps go to ``transformer``.
        vae: its config; without one, that of Wan2.1.
        image_tokens: tokens of all images of a video that are read by attention (Wan2.1's image-to-video models).
        keeps_first_frame: Wan2.2 TI2V (``expand_timesteps``): every token has a timestep, 0 where the picture is given.
    """

    configs: tuple[dict[str, Any], ...]
    boundary_ratio: float | None = None
    vae: Mapping[str, Any] = field(default_factory=dict)
    image_tokens: int = 0
    keeps_first_frame: bool = False

    keys: ClassVar[Set[str]] = KEYS
    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    unequal_times: ClassVar[bool] = False

    @classmethod
    def from_configs(
        cls,
        transformers: Sequence[Mapping[str, Any]],
        vae: Mapping[str, Any],
        pipeline: Mapping[str, Any],
        image_encoder: Mapping[str, Any] | None = None,
    ) -> WanSpec:
        """Makes a spec; raises ValueError for Wan variants that this adapter does not run, naming the difference."""
        configs = tuple(component_config(config) for config in transformers)
        boundary_ratio = pipeline.get("boundary_ratio")
        for config in configs:
            unknown = sorted(set(config) - cls.keys)
            if unknown:
                raise ValueError(
                    f"this Wan transformer has {unknown[0]}={config[unknown[0]]!r}, which is no option of diffusers' "
                    f"{cls.transformer_class}"
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
        boundary_ratio = boundary_ratio if len(configs) == 2 else None
        images, expands = _image_tokens(configs[0], image_encoder), bool(pipeline.get("expand_timesteps"))
        found = cls(configs, boundary_ratio, component_config(vae), images, expands)
        wanted = (0, found.temporal_factor + found.in_channels)
        if found.condition_channels not in wanted:
            raise ValueError(
                f"this Wan transformer takes {found.config['in_channels']} channels and makes {found.in_channels}: "
                f"the others must be none, or {wanted[1]} of mask and image"
            )
        return found

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
        return int(self.config["out_channels"] or self.config["in_channels"])

    @property
    def condition_channels(self) -> int:
        return int(self.config["in_channels"]) - self.in_channels

    @property
    def image_counts(self) -> tuple[int, ...]:
        return image_counts(self.config, self.keeps_first_frame)

    @property
    def image_dim(self) -> int | None:
        """Width of tokens of images, as the image encoder makes them; None: the model has none."""
        width = self.config.get("image_dim")
        return None if width is None else int(width)

    @property
    def text_tokens(self) -> int | None:
        return None if self.image_dim is None else TEXT_TOKENS

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
                wanted = True
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


def _image_tokens(config: Mapping[str, Any], image_encoder: Mapping[str, Any] | None) -> int:
    """Tokens of all images of a video, of which each has a patch's and one of its own. Raises ValueError."""
    width, added, positions = (config.get(key) for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"))
    inner = config["num_attention_heads"] * config["attention_head_dim"]
    if (width is None) != (image_encoder is None):
        raise ValueError(
            f"this Wan transformer has image_dim={width} and the pipeline {'no' if image_encoder is None else 'an'} "
            "image encoder: tokens of images need both"
        )
    if added != (None if width is None else inner):
        raise ValueError(f"this Wan transformer has image_dim={width} and added_kv_proj_dim={added}: use {inner}")
    if image_encoder is None:
        return 0
    if width > config["text_dim"]:
        raise ValueError(
            f"this Wan transformer has image_dim={width}: tokens of images wider than the text's "
            f"{config['text_dim']} are not supported"
        )
    tokens = 1 + (int(image_encoder["image_size"]) // int(image_encoder["patch_size"])) ** 2
    tokens *= image_counts(config)[0]
    if positions not in (None, tokens):
        raise ValueError(
            f"this Wan transformer has pos_embed_seq_len={positions}, and its image encoder makes {tokens} tokens of "
            "two images"
        )
    return tokens
