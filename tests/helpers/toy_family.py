"""A second family of models, as small as can be and unlike Wan in every number: for tests of what lies between.

A transformer layer is one linear layer, attention of one head over [own | neighbours], and the mean of the text. A
latent pixel is one token and two by two pixels; every latent frame but the first is two frames. ``write`` makes a
directory in diffusers format, and ``FAMILY`` is the row of the registry that reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from dualparal.config.decoding import row_ranges
from dualparal.device import to_device
from dualparal.kernels.qk_norm_rope import Lend
from dualparal.kernels.qk_norm_rope.reference import rotate
from dualparal.models.base import AttentionStrategy, Grid, Pending, Rotary, RowExchange, TimeCondition, attend_here
from dualparal.models.json_files import read_config
from dualparal.models.keys_values import Context8, KeysValues
from dualparal.models.registry import Component, Family
from dualparal.models.sizes import Borders, LinearSizes
from dualparal.models.wan.tiny import make_tokenizer

CHANNELS, TEXT_DIM, TOKENS = 3, 6, 512
SPATIAL, TEMPORAL = 2, 2


@dataclass(frozen=True)
class ToySpec:
    layers: int
    inner_dim: int
    in_channels: int
    text_dim: int

    num_experts = 1
    condition_channels = image_tokens = 0
    image_counts = (0,)
    heads = 1
    patch_size = (1, 1, 1)
    spatial_factor = SPATIAL
    temporal_factor = TEMPORAL
    unequal_times = keeps_first_frame = False

    text_tokens = None

    @classmethod
    def from_configs(
        cls,
        transformers: Sequence[Mapping[str, Any]],
        vae: Mapping[str, Any],
        pipeline: Mapping[str, Any],
        image_encoder: Mapping[str, Any] | None = None,
    ) -> ToySpec:
        (config,) = transformers
        if pipeline.get("colours", "rgb") != "rgb":
            raise ValueError(f"colours={pipeline['colours']!r}: only rgb is supported")
        return cls(*(int(config[key]) for key in ("num_layers", "inner_dim", "in_channels", "text_dim")))

    @property
    def num_layers(self) -> int:
        return self.layers

    def expert(self, timestep: float, num_train_timesteps: int) -> int:
        return 0

    def grid(self, height: int, width: int) -> Grid:
        return Grid(height // SPATIAL, width // SPATIAL, height // SPATIAL, width // SPATIAL)

    def shapes(self, expert: int) -> dict[str, tuple[int, ...]]:
        inner = self.inner_dim
        ends = {"embed": (inner, self.in_channels), "head": (self.in_channels, inner)}
        conditions = {"time": (inner,), "text": (inner, self.text_dim)}
        return {**ends, **conditions, **{f"layers.{k}": (inner, inner) for k in range(self.layers)}}

    def is_unused(self, name: str) -> bool:
        return False

    def names(self, expert: int, layers: range) -> list[str]:
        ends = ["embed"] * (layers.start == 0) + ["head"] * (layers.stop == self.layers)
        return [*ends, "time", "text", *(f"layers.{k}" for k in layers)]

    def tensor_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def linear_layer(self, name: str) -> int | None:
        return None

    def build(self, tensors: Mapping[str, torch.Tensor], layers: range) -> ToySlice:
        return ToySlice(self, tensors, layers)


class ToySlice:
    def __init__(self, spec: ToySpec, tensors: Mapping[str, torch.Tensor], layers: range) -> None:
        self.num_layers, self.inner_dim, self.heads = len(layers), spec.inner_dim, spec.heads
        self.dtype, self.device = tensors["time"].dtype, tensors["time"].device
        self._tensors = tensors
        self._layers = [tensors[f"layers.{k}"] for k in layers]

    def patches(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[0].flatten(1).T.to(self.dtype)

    def embed(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches, self._tensors["embed"])

    def time(self, timestep: torch.Tensor) -> TimeCondition:
        row = self._tensors["time"].float() * timestep.float() / 1000
        return TimeCondition(row.expand(self.num_layers, 1, -1).clone(), row.expand(2, -1).clone())

    def text(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        row = F.linear(to_device(prompt_embeds.to(self.dtype), self.device), self._tensors["text"])
        return row.expand(self.num_layers, 2, -1, -1).clone()

    def rotary(self, start: int, frames: int, grid: Grid) -> Rotary:
        angles = torch.outer(torch.arange(start, start + frames), 1.0 / (1 + torch.arange(self.inner_dim // 2)))
        angles = to_device(angles.repeat_interleave(grid.tokens, 0), self.device)
        return Rotary(angles.cos(), angles.sin())

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
        assert isinstance(context, KeysValues), "a toy has no 8-bit attention"
        hidden = self.finish(hidden, pending)
        made = F.linear(hidden + time.layers[index].to(self.dtype) + text.values.mean(0), self._layers[index])
        own = context.rows(0, len(made))
        turned = rotate(made.float(), *rotary, self.heads).to(self.dtype)
        own.keys.copy_(turned)
        own.values.copy_(made)
        for lend in lends:
            for store, rows in ((lend.keys, own.keys), (lend.values, own.values)):
                store.index_copy_(0, lend.slot, rows[None, lend.first : lend.first + lend.tokens])
        return hidden, (made + attend(_attention, turned, context, self.heads), None)

    def finish(self, hidden: torch.Tensor, pending: Pending | None) -> torch.Tensor:
        return hidden if pending is None else torch.tanh(hidden + pending[0])

    def head(self, hidden: torch.Tensor, pending: Pending | None, time: TimeCondition) -> torch.Tensor:
        return F.linear(self.finish(hidden, pending), self._tensors["head"])

    def picture(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor:
        return patches.T.unflatten(1, (-1, grid.height, grid.width)).unsqueeze(0).contiguous()


def _attention(queries: torch.Tensor, context: KeysValues | Context8, heads: int) -> torch.Tensor:
    assert isinstance(context, KeysValues)
    return (queries @ context.keys.T).softmax(1) @ context.values


class ToyVae(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = {"channels": channels}
        self.colours = nn.Parameter(torch.empty(3, channels))


class ToyDecoder:
    """Every latent frame is shown after the mean of it and of the one before."""

    history = 1

    def __init__(self, vae: ToyVae, rows: RowExchange | None = None) -> None:
        self._vae, self._rows = vae, rows
        self._last: torch.Tensor | None = None

    @property
    def state_bytes(self) -> int:
        return 0 if self._last is None else self._last.nbytes

    @torch.no_grad()
    def push(self, latents: torch.Tensor) -> torch.Tensor:
        frames = []
        if self._rows is not None:
            rows = row_ranges(latents.shape[3], self._rows.count)[self._rows.index]
            latents = latents[:, :, :, rows.start : rows.stop]
        for latent in latents[0].to(self._vae.colours).unbind(1):
            picture = torch.einsum("rc,chw->rhw", self._vae.colours, latent).tanh()
            picture = picture.repeat_interleave(SPATIAL, 1).repeat_interleave(SPATIAL, 2)
            frames += [picture] if self._last is None else [(self._last + picture) / 2, picture]
            self._last = picture
        return torch.stack(frames)

    def reset(self) -> None:
        self._last = None


class ToyText(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(words, width))


class ToyPromptEncoder:
    def __init__(self, load: Callable[[], tuple[Any, Any]], device: torch.device) -> None:
        self._load = load
        self._loaded: tuple[Any, Any] | None = None

    @torch.inference_mode()
    def encode(
        self, prompt: str, negative_prompt: str | None, guidance: bool, max_sequence_length: int
    ) -> torch.Tensor:
        if self._loaded is None:
            self._loaded = self._load()
        tokenizer, encoder = self._loaded
        texts = [prompt, negative_prompt or ""] if guidance else [prompt]
        ids = tokenizer(texts, padding="max_length", max_length=max_sequence_length, return_tensors="pt").input_ids
        return encoder.table[ids]

    def free(self) -> None:
        self._loaded = None


@dataclass(frozen=True)
class ToyVaeSizes:
    spatial_factor: int = SPATIAL
    temporal_factor: int = TEMPORAL
    parameters: int = 3 * CHANNELS

    def flops(self, pixels: int) -> int:
        return 2 * self.parameters * pixels

    def cache_bytes(self, pixels: int, itemsize: int) -> int:
        return itemsize * 3 * SPATIAL**2 * pixels

    def working_bytes(self, pixels: int, itemsize: int) -> int:
        return 3 * self.cache_bytes(pixels, itemsize)

    def borders(self, width: int) -> Borders:
        return Borders(0, 0, 0)


@dataclass(frozen=True)
class ToySizes:
    name: str
    num_layers: int
    inner: int
    in_channels: int = CHANNELS
    out_channels: int = CHANNELS
    text_dim: int = TEXT_DIM
    text_encoder: int = 200 * TEXT_DIM
    vae: ToyVaeSizes = ToyVaeSizes()
    experts: int = 1
    patch: int = 1
    embed_parameters: int = 0
    joined_parameters: int = 0
    trained_latents: int | None = None

    @property
    def head_dim(self) -> int:
        return self.inner

    @property
    def layer_parameters(self) -> tuple[int, int]:
        return self.inner**2, 0

    @property
    def condition_parameters(self) -> tuple[int, int]:
        return self.inner * (1 + self.text_dim), 0

    @property
    def head_parameters(self) -> tuple[int, int]:
        return self.inner * self.out_channels, 0

    @property
    def linear_flops(self) -> int:
        return 2 * self.inner**2

    linears = LinearSizes(0, 0, 0, 0)
    image_counts = (0,)
    condition_channels = image_tokens = image_encoder = 0

    @property
    def layer_activations(self) -> int:
        return 4 * self.inner


KNOWN_SIZES = {"toy-large": ToySizes("toy-large", 24, 512)}


def read_sizes(directory: Path) -> ToySizes:
    config = read_config(directory / "transformer" / "config.json")
    inner = config["inner_dim"]
    return ToySizes(directory.name, config["num_layers"], inner, embed_parameters=inner * CHANNELS)


def empty_vae(config: Mapping[str, Any]) -> ToyVae:
    return ToyVae(config["channels"])


def empty_text_encoder(config: Mapping[str, Any]) -> ToyText:
    return ToyText(config["words"], config["width"])


def load_vae(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    return _load(folder, empty_vae, dtype)


def load_text_encoder(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    return _load(folder, empty_text_encoder, dtype)


def _load(
    folder: Path, build: Callable[[Mapping[str, Any]], nn.Module], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    module = build(read_config(folder / "config.json"))
    missing = module.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys
    return module.to(dtype), {"missing_keys": missing}


FAMILY = Family(
    name="toy",
    pipelines=("ToyPipeline",),
    components={
        "transformer": Component("toys", ("ToyTransformer",)),
        "vae": Component(
            "toys",
            ("ToyVae",),
            empty=f"{__name__}:empty_vae",
            load=f"{__name__}:load_vae",
            fits=("channels", "in_channels"),
        ),
        "text_encoder": Component(
            "toys",
            ("ToyText",),
            empty=f"{__name__}:empty_text_encoder",
            load=f"{__name__}:load_text_encoder",
            fits=("width", "text_dim"),
        ),
        "tokenizer": Component("transformers", ("T5Tokenizer", "T5TokenizerFast")),
    },
    spec_class=f"{__name__}:ToySpec",
    decoder_class=f"{__name__}:ToyDecoder",
    prompt_encoder_class=f"{__name__}:ToyPromptEncoder",
    known_sizes=f"{__name__}:KNOWN_SIZES",
    read_sizes=f"{__name__}:read_sizes",
    hub_owner="toys",
)


class ToyTransformer(nn.Module):
    """As a library would hold the tensors of a checkpoint."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.config = config
        for name in ("embed", "head", "time", "text"):
            self.register_parameter(name, nn.Parameter(tensors[name]))
        self.layers = nn.ParameterList([tensors[f"layers.{k}"] for k in range(config["num_layers"])])


class ToyPipeline:
    """What a user has loaded from a directory; without a prompt encoder."""

    def __init__(self, directory: Path) -> None:
        folder = directory / "transformer"
        self.config = read_config(directory / "model_index.json")
        self.transformer = ToyTransformer(read_config(folder / "config.json"), load_file(folder / "model.safetensors"))
        self.vae, _ = load_vae(directory / "vae", torch.float32)
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler")


def write(directory: Path, layers: int = 5, inner: int = 8, **pipeline: Any) -> Path:
    """A pipeline of random weights, with every part; ``pipeline`` goes into its model_index.json."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = make_tokenizer(directory / "tokenizer")
    tokenizer.save_pretrained(directory / "tokenizer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(directory / "scheduler")
    config = {"num_layers": layers, "inner_dim": inner, "in_channels": CHANNELS, "text_dim": TEXT_DIM}
    parts: dict[str, tuple[dict[str, int], Mapping[str, tuple[int, ...]]]] = {
        "transformer": (config, ToySpec(layers, inner, CHANNELS, TEXT_DIM).shapes(0)),
        "vae": ({"channels": CHANNELS}, {"colours": (3, CHANNELS)}),
        "text_encoder": ({"words": len(tokenizer), "width": TEXT_DIM}, {"table": (len(tokenizer), TEXT_DIM)}),
    }
    classes = {"transformer": "ToyTransformer", "vae": "ToyVae", "text_encoder": "ToyText"}
    for name, (settings, shapes) in parts.items():
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(settings))
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_file(tensors, directory / name / "model.safetensors")
    index = {
        "_class_name": "ToyPipeline",
        **{name: ["toys", kind] for name, kind in classes.items()},
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **pipeline,
    }
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory
