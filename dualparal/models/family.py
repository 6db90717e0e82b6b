"""A family of models: what one is read from, and import strings of its code. No torch, no diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.config.transformer_file import TransformerFile
from dualparal.models.json_files import ModelError
from dualparal.models.transformer_header import TransformerHeader

if TYPE_CHECKING:
    from dualparal.models.base import Decoder, LightFile, ModelSpec, PromptEncoder, RowExchange
    from dualparal.models.images import Encoder, ImageEncoder
    from dualparal.models.sizes import ModelSizes
    from dualparal.sampling.images import ImageCondition


@dataclass(frozen=True)
class Component:
    """A folder of a pipeline.

    Attributes:
        library, classes: the entries of model_index.json that are supported.
        required: every pipeline of the family has it.
        empty: import string of (config) -> torch module; built on the meta device, it tells the shapes that the weight
            files must have.
        load: import string of (folder, dtype) -> (torch module, its library's report of missing_keys and
            mismatched_keys).
        fits: a key of its config, and the attribute of the spec which that must equal.
    """

    library: str
    classes: tuple[str, ...]
    required: bool = True
    empty: str = ""
    load: str = ""
    fits: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Family:
    """Models that share an architecture. Classes, mappings and functions are import strings, "module:name".

    Attributes:
        name: for people.
        pipelines: diffusers classes that are read.
        components: by folder, without the scheduler, which is the engine's. One with files of its own to check besides
            the transformers ("transformer", "transformer_2") has ``empty``, ``load`` and ``fits``; the engine asks for
            "vae", "text_encoder" and "tokenizer".
        spec_class, decoder_class, prompt_encoder_class: they implement the protocols of ``models.base``.
        known_sizes: a mapping from lower-case names to ``models.sizes.ModelSizes``.
        read_sizes: (directory) -> ``ModelSizes``, from config files alone. Neither of the two imports torch.
        transformer_reader: a ``transformer_header.Reader`` for files in place of a folder's; empty: none.
        resized: (sizes, headers of the transformers in their place) -> sizes. Neither of the two imports torch.
        lora_modules: (names of a transformer's tensors) -> the name of the module, without ".weight" and ".bias", by
            every name that LoRA files have for it; empty: they have the same names, with dots.
        encoder_class: implements ``models.images.Encoder``; empty: no model of the family takes images.
        image_encoder_class: implements ``models.images.ImageEncoder``; empty: none of them has tokens of images.
        image_condition: (spec, Encoder, images [3, H, W] in [-1, 1], latent frames of the video or None, latent frames
            that are computed or None) -> ``sampling.images.ImageCondition``.
        light_file_class: implements ``models.base.LightFile``; empty: the family has no light decoder.
        hub_owner: lower-case; hub ids "OWNER/NAME-Diffusers" mean ``known_sizes``, too.
        hub_ids: by names of ``known_sizes``, where their weights are, in diffusers format.
        others: models of the same makers that are not supported, by lower-case names, with what they are.
        other_pipelines: the same by diffusers class.
    """

    name: str
    pipelines: tuple[str, ...]
    components: Mapping[str, Component]
    spec_class: str
    decoder_class: str
    prompt_encoder_class: str
    known_sizes: str
    read_sizes: str
    hub_owner: str
    encoder_class: str = ""
    image_encoder_class: str = ""
    image_condition: str = ""
    light_file_class: str = ""
    transformer_reader: str = ""
    resized: str = ""
    lora_modules: str = ""
    hub_ids: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    other_pipelines: Mapping[str, str] = field(default_factory=dict)

    def spec(
        self,
        transformers: Sequence[Mapping[str, Any]],
        vae: Mapping[str, Any],
        pipeline: Mapping[str, Any],
        image_encoder: Mapping[str, Any] | None = None,
    ) -> ModelSpec:
        """Makes the family's spec; arguments and errors are those of ``ModelSpec.from_configs``."""
        found: ModelSpec = resolve(self.spec_class).from_configs(transformers, vae, pipeline, image_encoder)
        return found

    def decoder(self, vae: Any, rows: RowExchange | None = None) -> Decoder:
        """Makes the decoder of one video; several may share a VAE.

        Args:
            vae: the module.
            rows: the way to the decoders of the picture's other rows; None: it decodes all of them.
        """
        found: Decoder = resolve(self.decoder_class)(vae, rows)
        return found

    def encoder(self, vae: Any) -> Encoder:
        """Makes the encoder of one video; several may share a VAE."""
        found: Encoder = resolve(self.encoder_class)(vae)
        return found

    def image_encoder(self, load: Callable[[], tuple[Any, Any]], device: Any) -> ImageEncoder:
        """Makes what encodes images to tokens; arguments as ``prompt_encoder``'s, of (image processor, model)."""
        found: ImageEncoder = resolve(self.image_encoder_class)(load, device)
        return found

    def condition(
        self, spec: ModelSpec, encoder: Encoder, images: Sequence[Any], length: int | None, computed: int | None
    ) -> ImageCondition:
        """Makes what a model is told of images, frame by frame; see ``image_condition``."""
        found: ImageCondition = resolve(self.image_condition)(spec, encoder, images, length, computed)
        return found

    def light_file(self, path: Path, spec: ModelSpec) -> LightFile:
        """Checks a file with a light decoder for the model of ``spec``. Raises ModelError, OSError."""
        if not self.light_file_class:
            raise ModelError(f"decoder {path}: {self.name} models have no light decoder; leave it out")
        found: LightFile = resolve(self.light_file_class)(path, spec.in_channels, spec.spatial_factor)
        return found

    def prompt_encoder(self, load: Callable[[], tuple[Any, Any]], device: Any) -> PromptEncoder:
        """Makes a prompt encoder.

        Args:
            load: () -> (tokenizer, text encoder), called when they are first needed.
            device: the torch.device on which the encoder runs.
        """
        found: PromptEncoder = resolve(self.prompt_encoder_class)(load, device)
        return found

    def lora_names(self, tensors: Iterable[str]) -> Mapping[str, str]:
        """The module that each name in a LoRA file means.

        Args:
            tensors: names of a transformer's tensors.
        """
        if not self.lora_modules:
            return {name: name for name in (tensor.rpartition(".")[0] for tensor in tensors)}
        found: Mapping[str, str] = resolve(self.lora_modules)(tensors)
        return found

    def plain_name(self, model: str) -> str:
        """A name or a hub id of the family's owner as ``known_sizes`` would have it."""
        name = model.lower().rstrip("/").removeprefix(f"{self.hub_owner}/")
        return name.removesuffix("-diffusers").replace("_", "-")

    def named_sizes(self) -> Mapping[str, ModelSizes]:
        """Sizes of the models that are known by name, by lower-case name."""
        found: Mapping[str, ModelSizes] = resolve(self.known_sizes)
        return found

    def sizes(self, directory: Path) -> ModelSizes:
        """Sizes of the model in a directory.

        Raises:
            ModelError: configs that cannot be read or have no cost model.
        """
        found: ModelSizes = resolve(self.read_sizes)(directory)
        return found

    def transformer(self, file: TransformerFile, folder: Mapping[str, Any]) -> TransformerHeader:
        """The header of a transformer in files of its own.

        Args:
            file: the files.
            folder: config of the transformer whose place it takes.

        Raises:
            ModelError: it is none of this family, or the family reads no such files.
        """
        if not self.transformer_reader:
            raise ModelError(f"transformer {file.file}: {self.name} models are read from their folder alone")
        return TransformerHeader.of_file(file, resolve(self.transformer_reader), folder)

    def sizes_with(self, sizes: ModelSizes, headers: Sequence[TransformerHeader]) -> ModelSizes:
        """Sizes of a model with the transformers of these headers."""
        if not self.resized or not headers:
            return sizes
        found: ModelSizes = resolve(self.resized)(sizes, headers)
        return found


def resolve(name: str) -> Any:
    """Imports the object that an import string, "module:name", names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
