"""The families of models: the pipelines that each one reads, and import strings of its code. No torch, no diffusers.

A family is a folder beside this file and a row here. No other module names one: it asks for the family of a pipeline
class or of a directory, and the row finds the code by an import string, "module:name", when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.models.json_files import ModelError, read_json

if TYPE_CHECKING:
    from dualparal.models.base import Decoder, LightFile, ModelSpec, PromptEncoder, RowExchange
    from dualparal.models.sizes import ModelSizes

BUILT_IN = "moving-shapes"  # the trained model that ships with the package
BUILT_IN_FOLDER = Path(__file__).parents[1] / "moving_shapes"
BUILT_IN_SIZE = (64, 64)  # height and width of its videos, pixels


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
        light_file_class: implements ``models.base.LightFile``; empty: the family has no light decoder.
        hub_owner: lower-case; hub ids "OWNER/NAME-Diffusers" mean ``known_sizes``, too.
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
    light_file_class: str = ""

    def spec(
        self, transformers: Sequence[Mapping[str, Any]], vae: Mapping[str, Any], pipeline: Mapping[str, Any]
    ) -> ModelSpec:
        """Makes the family's spec; arguments and errors are those of ``ModelSpec.from_configs``."""
        found: ModelSpec = resolve(self.spec_class).from_configs(transformers, vae, pipeline)
        return found

    def decoder(self, vae: Any, rows: RowExchange | None = None) -> Decoder:
        """Makes the decoder of one video; several may share a VAE.

        Args:
            vae: the module.
            rows: the way to the decoders of the picture's other rows; None: it decodes all of them.
        """
        found: Decoder = resolve(self.decoder_class)(vae, rows)
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


FAMILIES: dict[str, Family] = {
    "wan": Family(
        name="Wan",
        pipelines=("WanPipeline",),
        components={
            "transformer": Component("diffusers", ("WanTransformer3DModel",)),
            "transformer_2": Component("diffusers", ("WanTransformer3DModel",), required=False),
            "vae": Component(
                "diffusers",
                ("AutoencoderKLWan",),
                empty="dualparal.models.wan.parts:empty_vae",
                load="dualparal.models.wan.parts:load_vae",
                fits=("z_dim", "in_channels"),
            ),
            "text_encoder": Component(
                "transformers",
                ("UMT5EncoderModel",),
                empty="dualparal.models.wan.parts:empty_text_encoder",
                load="dualparal.models.wan.parts:load_text_encoder",
                fits=("d_model", "text_dim"),
            ),
            "tokenizer": Component("transformers", ("T5Tokenizer", "T5TokenizerFast")),
        },
        spec_class="dualparal.models.wan.spec:WanSpec",
        decoder_class="dualparal.models.wan.vae:StreamingDecoder",
        prompt_encoder_class="dualparal.models.wan.text:PromptEncoder",
        known_sizes="dualparal.models.wan.sizes:MODELS",
        read_sizes="dualparal.models.wan.sizes:read_sizes",
        hub_owner="wan-ai",
        light_file_class="dualparal.models.wan.light_decoder:LightFile",
    ),
}


def resolve(name: str) -> Any:
    """Imports the object that an import string, "module:name", names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def supported_pipelines() -> str:
    """Names of all supported pipeline classes, joined by commas, for messages."""
    return ", ".join(name for family in FAMILIES.values() for name in family.pipelines)


def family_of(pipeline: object) -> Family | None:
    """The family of a pipeline class, by its name; None: no family reads it."""
    return next((family for family in FAMILIES.values() if pipeline in family.pipelines), None)


def family_in(directory: Path) -> Family:
    """The family of a pipeline in diffusers format on disk.

    Raises:
        ModelError: not such a directory, or a pipeline of no family.
    """
    path = directory / "model_index.json"
    name = read_json(path).get("_class_name")
    family = family_of(name)
    if family is None:
        raise ModelError(f"{path}: pipeline class {name!r} is not supported; supported: {supported_pipelines()}")
    return family


def model_sizes(model: str) -> ModelSizes:
    """Sizes of a model.

    Args:
        model: a name or hub id that a family knows, in any case, or a directory in diffusers format, of which only
            config files are read.

    Raises:
        ValueError: neither, or configs of no family (``ModelError``).
    """
    plain = model.lower().rstrip("/")
    names: list[str] = []
    for family in FAMILIES.values():
        known = family.named_sizes()
        name = plain.removeprefix(f"{family.hub_owner}/").removesuffix("-diffusers").replace("_", "-")
        if name in known:
            return known[name]
        names += known
    path = Path(model)
    if not path.is_dir():
        raise ValueError(
            f"model {model!r} is not known; use one of {', '.join(names)}, or a directory in diffusers format "
            "(its config files are enough)"
        )
    return family_in(path).sizes(path)
