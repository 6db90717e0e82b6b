"""A pipeline in diffusers format on disk, read safely: JSON under caps, safetensors only, tensors checked by header."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dualparal.models.base import Slice
from dualparal.models.wan.transformer import WanSpec
from dualparal.sampling.sampler import SUPPORTED as SAMPLERS

SUPPORTED_PIPELINES = ("WanPipeline",)
_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")
COMPONENTS: dict[str, tuple[str, tuple[str, ...]]] = {  # library and classes
    "transformer": ("diffusers", ("WanTransformer3DModel",)),
    "transformer_2": ("diffusers", ("WanTransformer3DModel",)),
    "vae": ("diffusers", ("AutoencoderKLWan",)),
    "text_encoder": ("transformers", ("UMT5EncoderModel",)),
    "tokenizer": ("transformers", _TOKENIZERS),
    "scheduler": ("diffusers", SAMPLERS),
}
_MAX_JSON_BYTES = 1 << 24  # the index of the largest models has some hundred kilobytes
# Keys by which a config names code that a library would fetch and run.
_CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
_MODULE_COUNTS = ("num_layers", "num_decoder_layers", "num_res_blocks")  # a library builds so many, before any check
_MAX_MODULES = 1000


class ModelError(ValueError):
    """A model directory that cannot be used; the message names the file and the way out."""


@dataclass(frozen=True)
class ModelFiles:
    """A pipeline directory whose structure has been checked. No weights are read to make one.

    Raises:
        ModelError: not a supported pipeline, an unsupported class, or missing, corrupt or foreign weight files.
    """

    path: Path

    def __post_init__(self) -> None:
        index = self.index
        name = index.get("_class_name")
        if name not in SUPPORTED_PIPELINES:
            raise ModelError(
                f"{self.path / 'model_index.json'}: pipeline class {name!r} is not supported; "
                f"supported: {', '.join(SUPPORTED_PIPELINES)}"
            )
        for component, (library, classes) in COMPONENTS.items():
            if not self.has(component) and component == "transformer_2":
                continue
            if not self.has(component) or index[component][0] != library or index[component][1] not in classes:
                raise ModelError(
                    f"{self.path / 'model_index.json'}: {component} is {index.get(component)}; supported: "
                    f"{', '.join(classes)} of {library}"
                )
        foreign = sorted(name for name in index if name not in COMPONENTS and self.has(name))
        if foreign:
            raise ModelError(
                f"{self.path / 'model_index.json'}: component {foreign[0]!r} is none of a {name}, which has "
                f"{', '.join(COMPONENTS)}"
            )

    @cached_property
    def index(self) -> dict[str, Any]:
        return read_json(self.path / "model_index.json")

    def config(self, component: str) -> dict[str, Any]:
        path = self.path / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
        config = read_json(path)
        for key in _MODULE_COUNTS:
            if isinstance(config.get(key), (int, float)) and not 0 <= config[key] <= _MAX_MODULES:
                raise ModelError(f"{path}: {key}={config[key]}; from 0 to {_MAX_MODULES} are supported")
        return config

    def has(self, component: str) -> bool:
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    @cached_property
    def spec(self) -> WanSpec:
        """Facts of the model; ModelError for a variant of Wan that is not supported."""
        try:
            return WanSpec.from_configs(
                self.config("transformer"),
                self.config("transformer_2") if self.has("transformer_2") else None,
                self.index.get("boundary_ratio"),
                bool(self.index.get("expand_timesteps", False)),
            )
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{self.path / 'transformer' / 'config.json'}: not a config of a Wan transformer "
                f"({error!r} is missing or malformed)"
            ) from None
        except ValueError as error:
            raise ModelError(f"{self.path}: {error}") from None

    @property
    def vae_config(self) -> dict[str, Any]:
        return self.config("vae")

    @cached_property
    def fingerprint(self) -> str:
        """Names, shapes and sizes of the transformer files, for ranks to compare (no checksum of the data)."""
        parts = []
        for expert in range(self.spec.num_experts):
            found = WeightFiles(self.path / _expert_folder(expert))
            size = sum(path.stat().st_size for path in set(found.owner.values()))
            elements = sum(math.prod(shape) for shape in found.shapes.values())
            parts.append(f"{len(found.shapes)} tensors, {elements} elements, {size} bytes")
        return "; ".join(parts)

    def check_weights(self) -> None:
        """Names and shapes of all weight files against the configs, from the headers alone.

        Raises:
            ModelError: lists what is missing, what is too much and what has another shape.
        """
        for expert in range(self.spec.num_experts):
            _check_tensors(self.path / _expert_folder(expert), self.spec.shapes(expert))
        for component, build, width, wanted in (
            ("vae", _empty_vae, "z_dim", ("in_channels", self.spec.in_channels)),
            ("text_encoder", _empty_text_encoder, "d_model", ("text_dim", self.spec.text_dim)),
        ):
            config = self.config(component)
            if config.get(width) != wanted[1]:
                raise ModelError(
                    f"{self.path / component}: {width}={config.get(width)} does not fit the transformer's "
                    f"{wanted[0]}={wanted[1]}; are these parts of one model?"
                )
            _check_part(self.path / component, config, build)
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        folder = self.path / "tokenizer"
        for path in (folder / "config.json", folder / "tokenizer_config.json"):
            kind = read_json(path).get("tokenizer_class") if path.exists() else None
            if kind is not None and kind not in _TOKENIZERS:
                raise ModelError(f"{path}: tokenizer_class={kind!r}; supported: {', '.join(_TOKENIZERS)}")

    def load_slices(self, layers: range, dtype: torch.dtype, device: torch.device) -> list[Slice]:
        """One slice per expert, reading only the tensors of these layers."""
        slices: list[Slice] = []
        for expert in range(self.spec.num_experts):
            files = WeightFiles(self.path / _expert_folder(expert))
            tensors = {
                name: tensor.to(device, self.spec.tensor_dtype(name, dtype))
                for name, tensor in files.read(self.spec.names(expert, layers))
            }
            slices.append(self.spec.build(tensors, layers))
        return slices

    def load_scheduler(self) -> Any:
        import diffusers

        with _named(self.path / "scheduler"):
            return getattr(diffusers, self.index["scheduler"][1]).from_pretrained(self.path / "scheduler")

    def load_vae(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        """The VAE, in float32 unless asked otherwise, as the Wan authors run it."""
        from diffusers import AutoencoderKLWan

        with _named(self.path / "vae"):
            vae, info = AutoencoderKLWan.from_pretrained(
                self.path / "vae", torch_dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        _check_loaded(self.path / "vae", info)
        return vae.to(device).eval()

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
        """(tokenizer, text encoder). Only one rank calls this."""
        import transformers

        with _named(self.path / "tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path / "tokenizer", trust_remote_code=False)
        with _named(self.path / "text_encoder"):
            loaded: Any = transformers.UMT5EncoderModel.from_pretrained(
                self.path / "text_encoder", dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        encoder, info = loaded
        _check_loaded(self.path / "text_encoder", info)
        return tokenizer, encoder.to(device).eval()


class WeightFiles:
    """The safetensors files of one component, single or sharded, opened by header.

    Raises:
        ModelError: no safetensors file, or one that is cut or corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        indices = sorted(folder.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            raise ModelError(
                f"{folder}: {' and '.join(p.name for p in indices)}: which to read? Keep the index of one variant"
            )
        if indices:
            weight_map = read_json(indices[0]).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ModelError(f"{indices[0]}: no weight_map in it; download the model again")
            names = sorted(set(weight_map.values()))
        else:
            names = sorted(p.name for p in folder.glob("*.safetensors"))
            if len(names) > 1:
                raise ModelError(
                    f"{folder}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} and no index file says "
                    "which to read; keep one variant, or download the index too"
                )
        if not names:
            other = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            found = f"only {', '.join(other)}, which are pickles and never read" if other else "no weight file"
            raise ModelError(
                f"{folder}: {found}; a .safetensors file is needed (convert with "
                "pipe.save_pretrained(..., safe_serialization=True))"
            )
        self.owner: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{indices[0]}: names the file {shorten(name)} outside its folder")
            if not name.endswith(".safetensors") or "\0" in name or len(name) > 255:
                raise ModelError(f"{indices[0]}: names {shorten(name)}, which is no .safetensors file")
            with _open(folder / name) as handle:
                for key in handle.keys():  # noqa: SIM118 (not a dict)
                    self.owner[key] = folder / name
                    self.shapes[key] = tuple(handle.get_slice(key).get_shape())

    def read(self, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields (name, tensor) of just these tensors, file by file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.owner[name], []).append(name)
        for path, wanted in by_file.items():
            with _open(path) as handle:
                for name in wanted:
                    yield name, handle.get_tensor(name)


def _expert_folder(expert: int) -> str:
    return "transformer" if expert == 0 else f"transformer_{expert + 1}"


def read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ModelError(f"{path} is missing: not a model directory in diffusers format")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes: a config has at most {_MAX_JSON_BYTES}")
        data = json.loads(path.read_text(encoding="utf-8"))
        _refuse_code(path, data)
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds {type(data).__name__}, not an object")
    return data


def _refuse_code(path: Path, data: Any) -> None:
    """Raises ModelError for a config that names code to run, however deep: ours names none, whatever a library does.

    ``attn_implementation`` may name a repository of kernels (CVE-2026-4372 of transformers).
    """
    if isinstance(data, list):
        for value in data:
            _refuse_code(path, value)
    elif isinstance(data, dict):
        for key, value in data.items():
            named = "_implementation" in key and "/" in json.dumps(value)
            if named or (key in _CODE_KEYS and value):
                raise ModelError(f"{path}: {key}={shorten(value)} names code, and no code of a model is run; remove it")
            _refuse_code(path, value)


def shorten(value: object) -> str:
    """As it would be typed, and of a length that can be read."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text)} characters)"


def _open(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ModelError(f"{path} is no file; download it again")
        if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise ModelError(f"{path} is a Git LFS pointer, not the weights: run 'git lfs pull'")
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{path} is missing, though the index names it; download the model again") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); download it again") from None


def _check_tensors(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    found = WeightFiles(folder).shapes
    missing = sorted(set(expected) - set(found))
    extra = sorted(name for name in set(found) - set(expected) if "norm_added_q" not in name)
    shapes = [f"{n} {found[n]} instead of {s}" for n, s in expected.items() if n in found and found[n] != s]
    _refuse(folder, missing, extra, shapes)


def _refuse(folder: Path, missing: list[str], extra: list[str], shapes: list[str]) -> None:
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ModelError(
            f"{folder}: tensors do not fit its config: {'; '.join(problems)}; download it again, or mend config.json"
        )


def _empty_vae(config: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_config(config)


def _empty_text_encoder(config: dict[str, Any]) -> Any:
    import transformers

    return transformers.UMT5EncoderModel(transformers.UMT5Config.from_dict(config))


def _check_part(folder: Path, config: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> None:
    """Files of a part that its library loads: it would fill a missing tensor with random numbers and warn."""
    found = WeightFiles(folder).shapes
    try:
        with torch.device("meta"):
            tensors = build(config).state_dict(keep_vars=True)
    except Exception as error:  # whatever the library makes of a foreign config
        raise ModelError(f"{folder / 'config.json'}: cannot be built from it: {error}") from None
    there = {id(tensor) for name, tensor in tensors.items() if name in found}
    missing = sorted(name for name, tensor in tensors.items() if id(tensor) not in there)  # tied ones are stored once
    shapes = [
        f"{name} {found[name]} instead of {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    _refuse(folder, missing, [], shapes)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors of a library that reads this folder, as one of ours."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{folder} cannot be loaded ({text}); download the model again") from error


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys") or ())
    mismatched = sorted(str(key) for key in info.get("mismatched_keys") or ())
    if missing or mismatched:
        raise ModelError(f"{folder}: tensors missing {missing[:3]} or of another shape {mismatched[:3]}")
