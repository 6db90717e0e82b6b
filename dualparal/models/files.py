"""A pipeline in diffusers format on disk, read safely: its structure checked, its parts loaded one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dualparal.config.eight_bit import LINEAR_OFF, LinearPolicy
from dualparal.config.lora import Lora
from dualparal.config.transformer_file import TransformerFile
from dualparal.config.video import VideoConfig
from dualparal.models.base import ModelSpec, Slice
from dualparal.models.defaults import model_defaults
from dualparal.models.family import Component, Family, resolve
from dualparal.models.headers import elements
from dualparal.models.heap import give_back
from dualparal.models.json_files import ModelError, read_config, read_json
from dualparal.models.linear import placed
from dualparal.models.loading import one_at_a_time
from dualparal.models.lora import LoraFile
from dualparal.models.registry import family_in
from dualparal.models.sizes import ModelSizes
from dualparal.models.transformer_header import TransformerHeader, by_expert, expert_of
from dualparal.models.weights import WeightFiles, channels_last, check_part, check_tensors
from dualparal.sampling.sampler import SUPPORTED as SAMPLERS
from dualparal.sampling.sampler import check_config

EXPERTS = ("transformer", "transformer_2")  # folders, and attributes of a pipeline
_SCHEDULER = Component("diffusers", SAMPLERS)


@dataclass(frozen=True)
class ModelFiles:
    """A pipeline directory whose structure has been checked. No weights are read to make one.

    Attributes:
        path: the directory.
        loras: are merged into the transformers' weights, in this order, while these are read.
        transformers: files in place of the folder's transformers.

    Raises:
        ModelError: not a supported pipeline, an unsupported class, or missing, corrupt or foreign weight files.
    """

    path: Path
    loras: tuple[Lora, ...] = ()
    transformers: tuple[TransformerFile, ...] = ()

    def __post_init__(self) -> None:
        index, components = self.index, {**self.family.components, "scheduler": _SCHEDULER}
        for name, component in components.items():
            if not self.has(name) and not component.required:
                continue
            if not self.has(name) or index[name][0] != component.library or index[name][1] not in component.classes:
                raise ModelError(
                    f"{self.path / 'model_index.json'}: {name} is {index.get(name)}; supported: "
                    f"{', '.join(component.classes)} of {component.library}"
                )
        foreign = sorted(name for name in index if name not in components and self.has(name))
        if foreign:
            raise ModelError(
                f"{self.path / 'model_index.json'}: component {foreign[0]!r} is none of a {index['_class_name']}, "
                f"which has {', '.join(components)}"
            )

    @cached_property
    def family(self) -> Family:
        """The family of the directory's pipeline class."""
        return family_in(self.path)

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json."""
        return read_json(self.path / "model_index.json")

    def config(self, component: str) -> dict[str, Any]:
        """The content of a component's config.json; raises ModelError as ``read_config`` does."""
        return read_config(self.path / component / "config.json")

    def has(self, component: str) -> bool:
        """True when model_index.json names a class for a component (an optional one may be null)."""
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    @cached_property
    def spec(self) -> ModelSpec:
        """Facts of the model; raises ModelError for a variant of its family that is not supported."""
        try:
            return self.family.spec(
                [
                    self._replaced[index].config if index in self._replaced else self.config(name)
                    for index, name in enumerate(self._folders)
                ],
                self.config("vae"),
                self.index,
                self.config("image_encoder") if self.has("image_encoder") else None,
            )
        except ModelError:
            raise
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{self.path / 'transformer' / 'config.json'}: not a config of a {self.family.name} transformer "
                f"({error!r} is missing or malformed)"
            ) from None
        except ValueError as error:
            raise ModelError(f"{self.path}: {error}") from None

    @property
    def sizes(self) -> ModelSizes:
        """Parameters, arithmetic and bytes of the model, from its configs alone.

        Raises:
            ModelError: there is no cost model for it.
        """
        return self.family.sizes_with(self.family.sizes(self.path), self.headers)

    @property
    def _folders(self) -> list[str]:
        """Folders of the transformers, by expert."""
        return [name for name in EXPERTS if self.has(name)]

    @cached_property
    def _replaced(self) -> dict[int, TransformerHeader]:
        """Headers of the files in place of the folder's transformers, by expert. Raises ModelError."""
        files = by_expert(self.transformers, len(self._folders))
        return {index: self.family.transformer(file, self.config(EXPERTS[index])) for index, file in files.items()}

    @cached_property
    def headers(self) -> list[TransformerHeader]:
        """The headers of the transformers' weights, by expert. Raises ModelError."""
        return [
            self._replaced.get(index) or TransformerHeader.of_folder(self.path / name, self.config(name))
            for index, name in enumerate(self._folders)
        ]

    @property
    def defaults(self) -> VideoConfig:
        """A request as the model has it where nothing was asked for. Raises ModelError."""
        return model_defaults(self.path).video

    @cached_property
    def fingerprint(self) -> str:
        """Names, shapes and sizes of the transformer files, for ranks to compare (no checksum of the data); LoRAs.

        Of files in place of the folder's, and of LoRAs, samples of the data besides.
        """
        parts = []
        for index, header in enumerate(self.headers):
            found = list(header.entries.values())
            size = sum(path.stat().st_size for path in {entry.path for entry in found})
            parts.append(f"{len(found)} tensors, {elements(found)} elements, {size} bytes")
            if index in self._replaced:
                parts.append(f"file {header.fingerprint}")
        for folder, files in zip(EXPERTS, self.lora_files):
            parts += [f"LoRA {file.fingerprint} x {file.lora.weight:g} in {folder}" for file in files]
        return "; ".join(parts)

    @cached_property
    def lora_files(self) -> list[list[LoraFile]]:
        """By expert, the LoRAs that change it. Raises ModelError for one that is not understood or does not fit."""
        found: list[list[LoraFile]] = [[] for _ in range(self.spec.num_experts)]
        for lora in self.loras:
            expert = expert_of("LoRA", lora.file, lora.expert, self.spec.num_experts)
            shapes = self.spec.shapes(expert)
            found[expert].append(LoraFile(lora, shapes, self.family.lora_names(shapes)))
        return found

    @one_at_a_time
    def check_weights(self, parts: bool = True) -> None:
        """Compares names and shapes of all weight files with the configs, from the headers alone, and the sampler's.

        Args:
            parts: VAE, text encoder and tokenizer too, for which their libraries are imported; False: whoever loads
                them, the leading rank, checks them.

        Raises:
            ModelError: tensors are missing, too many, or of another shape; lists them.
        """
        _ = self.lora_files
        for expert, header in enumerate(self.headers):
            files = WeightFiles(header.place, header.entries)
            check_tensors(files, self.spec.shapes(expert), self.spec.is_unused)
        self._check_sampler()
        if not parts:
            return
        for name, component in self.family.components.items():
            if not component.empty or not self.has(name):
                continue
            config, (key, fact) = self.config(name), component.fits
            if config.get(key) != getattr(self.spec, fact):
                raise ModelError(
                    f"{self.path / name}: {key}={config.get(key)} does not fit the transformer's "
                    f"{fact}={getattr(self.spec, fact)}; are these parts of one model?"
                )
            check_part(self.path / name, config, resolve(component.empty))
        self._check_tokenizer()

    def _check_sampler(self) -> None:
        path = self.path / "scheduler" / "scheduler_config.json"
        try:
            check_config(read_json(path))
        except ModelError:
            raise
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from None

    def _check_tokenizer(self) -> None:
        folder, classes = self.path / "tokenizer", self.family.components["tokenizer"].classes
        for path in (folder / "config.json", folder / "tokenizer_config.json"):
            kind = read_json(path).get("tokenizer_class") if path.exists() else None
            if kind is not None and kind not in classes:
                raise ModelError(f"{path}: tokenizer_class={kind!r}; supported: {', '.join(classes)}")

    @one_at_a_time
    def load_slices(
        self, layers: range, dtype: torch.dtype, device: torch.device, linear_8bit: LinearPolicy = LINEAR_OFF
    ) -> list[Slice]:
        """One slice per expert, on ``device``. Only the tensors of these layers are read, of LoRAs too.

        A LoRA is added in float32 on the device, before the dtype or 8 bits round what comes of it. Linears that the
        files have in 8 bits stay so.
        """
        slices: list[Slice] = []
        for expert, header in enumerate(self.headers):
            names = self.spec.names(expert, layers)
            scaled = WeightFiles(header.place, header.scales)
            scales = dict(scaled.read(name for name in names if name in header.scales))
            tensors: dict[str, torch.Tensor] = {}
            for name, tensor in WeightFiles(header.place, header.entries).read(names):
                loras = [lora for lora in self.lora_files[expert] if lora.changes(name)]
                change = partial(_merged, name, loras) if loras else None
                tensors |= placed(self.spec, name, tensor, dtype, device, linear_8bit, scales.get(name), change)
                del tensor
                give_back()
            slices.append(self.spec.build(tensors, layers))
        return slices

    @one_at_a_time
    def load_scheduler(self) -> Any:
        """The diffusers scheduler that model_index.json names.

        Raises:
            ModelError: its config cannot be loaded.
        """
        import diffusers

        with _named(self.path / "scheduler"):
            return getattr(diffusers, self.index["scheduler"][1]).from_pretrained(self.path / "scheduler")

    @one_at_a_time
    def load_vae(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        """The VAE on ``device``, in float32 unless asked otherwise; raises ModelError for files that do not fit.

        In 16 bits on a card its weights lie channels last, as cuDNN's kernels for tensor cores take them: others are
        transposed before and after every convolution. Elsewhere they stay: the CPU's bits depend on it.
        """
        vae = self._load("vae", dtype).to(device).eval()
        return channels_last(vae) if device.type == "cuda" and dtype.itemsize == 2 else vae

    @one_at_a_time
    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """Returns (tokenizer, text encoder on ``device``). Only one rank calls this.

        Raises:
            ModelError: files that cannot be loaded, or do not fit the config.
        """
        import transformers

        with _named(self.path / "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path / "tokenizer", trust_remote_code=False)
        return tokenizer, self._load("text_encoder", dtype).to(device).eval()

    @one_at_a_time
    def load_image_encoder(self, device: torch.device) -> tuple[Any, Any]:
        """Returns (image processor, image encoder on ``device``, in float32). Only one rank calls this.

        Raises:
            ModelError: files that cannot be loaded, or do not fit the config.
        """
        folder = self.path / "image_processor"
        with _named(folder):
            processor = resolve(self.family.components["image_processor"].load)(folder)
        return processor, self._load("image_encoder", torch.float32).to(device).eval()

    def _load(self, name: str, dtype: torch.dtype) -> Any:
        """Loads a part as its family does; raises ModelError for missing or misshapen tensors."""
        folder = self.path / name
        with _named(folder):
            part, info = resolve(self.family.components[name].load)(folder, dtype)
        missing = sorted(info.get("missing_keys") or ())
        mismatched = sorted(str(key) for key in info.get("mismatched_keys") or ())
        if missing or mismatched:
            raise ModelError(f"{folder}: tensors missing {missing[:3]} or of another shape {mismatched[:3]}")
        return part


def _merged(name: str, loras: Sequence[LoraFile], tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows of a tensor of the model with LoRAs, in float32."""
    for lora in loras:
        tensor = lora.merge(name, tensor, rows)
    return tensor


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turns errors of a library that reads this folder into a ``ModelError`` that names it."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{folder} cannot be loaded ({text}); download the model again") from error
