"""The families of models: the pipelines that each one reads, and import strings of its code. No torch, no diffusers.

A family is a folder beside this file and a row here. No other module names one: it asks for the family of a pipeline
class or of a directory, and the row finds the code by an import string, "module:name", when it is first needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualparal.config.transformer_file import TransformerFile
from dualparal.models.family import Component, Family
from dualparal.models.json_files import ModelError, read_config, read_json
from dualparal.models.transformer_header import by_expert

if TYPE_CHECKING:
    from dualparal.models.sizes import ModelSizes

BUILT_IN = "moving-shapes"  # the trained model that ships with the package
BUILT_IN_FOLDER = Path(__file__).parents[1] / "moving_shapes"
_VACE, _ANIMATE = "video from control signals (VACE)", "a character in another's motion"

_SKYREELS = "SkyReels-V2, another model of Wan's architecture"


def _wan_components(transformer: str, experts: int) -> dict[str, Component]:
    """The folders of a pipeline with Wan's VAE and text encoder, and one or two transformers of a class."""
    names = ("transformer", "transformer_2")[:experts]
    return {
        **{name: Component("diffusers", (transformer,), required=name == names[0]) for name in names},
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
    }


FAMILIES: dict[str, Family] = {
    "wan": Family(
        name="Wan",
        pipelines=("WanPipeline", "WanImageToVideoPipeline"),
        components={
            **_wan_components("WanTransformer3DModel", 2),
            "image_encoder": Component(
                "transformers",
                ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
                required=False,
                empty="dualparal.models.wan.parts:empty_image_encoder",
                load="dualparal.models.wan.parts:load_image_encoder",
                fits=("hidden_size", "image_dim"),
            ),
            "image_processor": Component(
                "transformers",
                ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPProcessor"),
                required=False,
                load="dualparal.models.wan.parts:load_image_processor",
            ),
        },
        spec_class="dualparal.models.wan.spec:WanSpec",
        decoder_class="dualparal.models.wan.vae:StreamingDecoder",
        prompt_encoder_class="dualparal.models.wan.text:PromptEncoder",
        known_sizes="dualparal.models.wan.sizes:MODELS",
        read_sizes="dualparal.models.wan.sizes:read_sizes",
        hub_owner="wan-ai",
        encoder_class="dualparal.models.wan.encoder:StreamingEncoder",
        image_encoder_class="dualparal.models.wan.image_encoder:ImageEncoder",
        image_condition="dualparal.models.wan.condition:image_condition",
        light_file_class="dualparal.models.wan.light_decoder:LightFile",
        transformer_reader="dualparal.models.wan.single_file:read_transformer",
        resized="dualparal.models.wan.sizes:resized",
        lora_modules="dualparal.models.wan.lora:lora_modules",
        hub_ids={
            "wan2.1-t2v-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "wan2.1-t2v-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            "wan2.2-t2v-a14b": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "wan2.2-ti2v-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            "wan2.1-i2v-14b-480p": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            "wan2.1-i2v-14b-720p": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            "wan2.1-flf2v-14b-720p": "Wan-AI/Wan2.1-FLF2V-14B-720P-Diffusers",
            "wan2.2-i2v-a14b": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        },
        others={
            "wan2.1-vace-1.3b": _VACE,
            "wan2.1-vace-14b": _VACE,
            "wan2.2-s2v-14b": "speech to video",
            "wan2.2-animate-14b": _ANIMATE,
        },
        other_pipelines={
            "WanVACEPipeline": _VACE,
            "WanVideoToVideoPipeline": "video to video",
            "WanAnimatePipeline": _ANIMATE,
            "SkyReelsV2Pipeline": _SKYREELS,
            "SkyReelsV2DiffusionForcingPipeline": _SKYREELS,
        },
    ),
    "skyreels-v2": Family(
        name="SkyReels-V2",
        pipelines=("SkyReelsV2DiffusionForcingPipeline",),
        components=_wan_components("SkyReelsV2Transformer3DModel", 1),
        spec_class="dualparal.models.wan.skyreels:SkyReelsSpec",
        decoder_class="dualparal.models.wan.vae:StreamingDecoder",
        prompt_encoder_class="dualparal.models.wan.text:PromptEncoder",
        known_sizes="dualparal.models.wan.sizes:SKYREELS",
        read_sizes="dualparal.models.wan.sizes:read_skyreels_sizes",
        hub_owner="skywork",
        light_file_class="dualparal.models.wan.light_decoder:LightFile",
        lora_modules="dualparal.models.wan.lora:lora_modules",
        hub_ids={
            "skyreels-v2-df-1.3b-540p": "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
            "skyreels-v2-df-14b-540p": "Skywork/SkyReels-V2-DF-14B-540P-Diffusers",
            "skyreels-v2-df-14b-720p": "Skywork/SkyReels-V2-DF-14B-720P-Diffusers",
        },
        other_pipelines={
            "SkyReelsV2Pipeline": "a SkyReels-V2 model without diffusion forcing",
            "SkyReelsV2ImageToVideoPipeline": "image to video",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline": "image to video",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline": "video to video",
        },
    ),
}


def supported_pipelines() -> str:
    """Names of all supported pipeline classes, joined by commas, for messages."""
    return ", ".join(name for family in FAMILIES.values() for name in family.pipelines)


def family_of(pipeline: object) -> Family | None:
    """The family of a pipeline class, by its name; None: no family reads it."""
    return next((family for family in FAMILIES.values() if pipeline in family.pipelines), None)


def known_models() -> dict[str, str]:
    """The hub id of each model that is known by name and supported."""
    return {name: hub_id for family in FAMILIES.values() for name, hub_id in family.hub_ids.items()}


def hub_id_of(model: str) -> str | None:
    """The hub id of a model that is known by a name or an id, in any case; None: it is not known.

    Raises:
        ModelError: the model is known, and not supported.
    """
    for family in FAMILIES.values():
        name = family.plain_name(model)
        if name in family.hub_ids:
            return family.hub_ids[name]
        _refuse_other(family, model)
    return None


def _refuse_other(family: Family, model: str) -> None:
    """Raises ModelError for a name or a hub id of a model that is known and not supported."""
    name = family.plain_name(model)
    if name in family.others:
        raise ModelError(f"model {model!r} is {family.others[name]}, which is not supported; {_supported_models()}")


def _supported_models() -> str:
    """The models that would do, for messages."""
    return "supported are: " + ", ".join(f"{name} ({hub_id})" for name, hub_id in known_models().items())


def family_in(directory: Path) -> Family:
    """The family of a pipeline in diffusers format on disk.

    Raises:
        ModelError: not such a directory, or a pipeline of no family.
    """
    path = directory / "model_index.json"
    if not path.exists() and any(directory.glob("*.safetensors")):
        raise ModelError(
            f"{directory} holds weights alone, without VAE, text encoder and sampler: give them with --transformer "
            "(transformers=[...]) beside a model in diffusers format, or one that 'dualparal models' lists"
        )
    name = read_json(path).get("_class_name")
    family = family_of(name)
    if family is None:
        kinds = {kind: what for row in FAMILIES.values() for kind, what in row.other_pipelines.items()}
        if isinstance(name, str) and name in kinds:
            raise ModelError(f"{path}: {name} is {kinds[name]}, which is not supported; {_supported_models()}")
        raise ModelError(f"{path}: pipeline class {name!r} is not supported; supported: {supported_pipelines()}")
    return family


def model_sizes(model: str, transformers: Sequence[TransformerFile] = ()) -> ModelSizes:
    """Sizes of a model.

    Args:
        model: a name or hub id that a family knows, in any case, or a directory in diffusers format, of which only
            config files are read.
        transformers: files in place of its transformers, of which headers are read.

    Raises:
        ValueError: neither, or configs of no family (``ModelError``).
    """
    path = Path(model)
    names: list[str] = []
    for family in FAMILIES.values():
        known, name = family.named_sizes(), family.plain_name(model)
        if name in known:
            return _with_files(family, known[name], transformers, known[name].kind)
        if not path.is_dir():
            _refuse_other(family, model)
        names += known
    if not path.is_dir():
        raise ValueError(
            f"model {model!r} is not known; use one of {', '.join(names)}, or a directory in diffusers format "
            "(its config files are enough)"
        )
    return folder_sizes(path, transformers)


def folder_sizes(path: Path, transformers: Sequence[TransformerFile] = ()) -> ModelSizes:
    """The sizes of ``model_sizes`` for a directory. Raises ModelError."""
    family = family_in(path)
    config = read_config(path / "transformer" / "config.json") if transformers else {}
    return _with_files(family, family.sizes(path), transformers, config)


def _with_files(
    family: Family, sizes: ModelSizes, transformers: Sequence[TransformerFile], folder: Mapping[str, Any]
) -> ModelSizes:
    """Sizes with files in place of transformers; ``folder``: config of those. Raises ModelError."""
    headers = [family.transformer(file, folder) for file in by_expert(transformers, sizes.experts).values()]
    if headers and len(headers) < sizes.experts:  # nothing is known of how the other is stored
        headers.append(replace(headers[0], entries={}))
    return family.sizes_with(sizes, headers)
