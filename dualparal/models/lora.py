"""LoRA files: checked by header, merged matrix by matrix in float32 while a rank reads its layers.

Layouts: diffusers ("transformer.NAME.lora_A.weight"), PEFT ("base_model.model.NAME.lora_A.weight", with the
adapter_config.json beside it), a model's original names ("diffusion_model.NAME.lora_down.weight", ".alpha", whole
differences ".diff", ".diff_b", ".diff_m"), kohya ("lora_unet_NAME.lora_down.weight", dots as underscores).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from dualparal.config.lora import Lora
from dualparal.models.headers import sampled
from dualparal.models.json_files import ModelError, read_json, shorten

_PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "lora_unet_")
_TEXT_ENCODERS = ("text_encoder", "lora_te", "cond_stage_model")
_ROLES = {
    ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora_A.default.weight": "down",
    ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora_B.default.weight": "up",
    ".lora_B.bias": "up_bias", ".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff_m",
}  # fmt: skip
_DTYPES = ("F64", "F32", "F16", "BF16")
_METADATA = "lora_adapter_metadata"  # diffusers: key of its header in which r and lora_alpha are kept


class _Change(NamedTuple):
    """A change of one tensor of the model: factor * up @ down, or factor * down where there is no ``up``.

    Attributes:
        down, up: keys of the file.
        factor: weight of the LoRA, and alpha / rank where they count.
    """

    down: str
    up: str | None
    factor: float


class LoraFile:
    """A LoRA that fits a transformer. Only its header, its scalars and a sample of its bytes are read to make one.

    Args:
        lora: the file and its weight.
        shapes: name and shape of every tensor of the transformer.
        modules: names that files have for parts of the transformer, dots or underscores between, to the name that
            ``shapes`` has, without ".weight" and ".bias".

    Attributes:
        fingerprint: of its header, size and 64 samples of 4 KiB, its alphas and its weight, not of its name.

    Raises:
        ModelError: no safetensors file, or a key that is not understood, a shape that does not fit, an alpha without
            matrices; names it.
    """

    def __init__(self, lora: Lora, shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, str]) -> None:
        self.lora, self.path = lora, Path(lora.file)
        self._changes: dict[str, list[_Change]] = {}  # by tensor of the model
        with self._open() as handle:
            found = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
            self._shapes = {key: tuple(part.get_shape()) for key, part in found.items()}
            if not found:
                raise self._error("holds no tensors")
            for key, part in found.items():
                if part.get_dtype() not in _DTYPES:
                    raise self._error(f"{shorten(key)} is {part.get_dtype()}; {', '.join(_DTYPES)} are read")
            parts = self._parts(modules)
            alphas = self._alphas(handle.metadata() or {})
            for module, keys in parts.items():
                alpha = self._scalar(handle, keys["alpha"]) if "alpha" in keys else alphas.of(module)
                self._add_module(module, keys, alpha, alphas.by_root, shapes)
        self.fingerprint = self._digest()

    def changes(self, name: str) -> bool:
        """True for a tensor that the file changes."""
        return name in self._changes

    def merge(self, name: str, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        """Rows of a tensor of the model with the changes of the file, in float32.

        Args:
            name: of a tensor in the model's checkpoint that ``changes``.
            tensor: these rows of it, on any device, where the product is made. It is not written to.
            rows: where in the tensor they are.
        """
        made = tensor.to(torch.float32, copy=True)
        with self._open() as handle:
            for change in self._changes[name]:
                if change.up is None:
                    difference = handle.get_slice(change.down)[rows].to(made.device, torch.float32)
                    made.add_(difference, alpha=change.factor)
                else:
                    down = handle.get_tensor(change.down).to(made.device, torch.float32)
                    up = handle.get_slice(change.up)[rows].to(made.device, torch.float32)
                    made.flatten(1).addmm_(up.flatten(1), down.flatten(1), alpha=change.factor)
        return made

    def _parts(self, modules: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The keys of each module, by role. Raises ModelError."""
        parts: dict[str, dict[str, str]] = {}
        for key in sorted(self._shapes):
            if key.startswith(_TEXT_ENCODERS):
                raise self._error(f"{shorten(key)} is of a text encoder, whose LoRA is not merged; take it out")
            if "dora_scale" in key or "lora_magnitude_vector" in key:
                raise self._error(f"{shorten(key)}: DoRA, which is no sum of matrices, is not supported; use a LoRA")
            suffix = next((end for end in _ROLES if key.endswith(end)), None)
            name = key.removesuffix(suffix or "")
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            if suffix == ".diff_m":
                name = f"{name}.modulation" if name else "modulation"
            module = modules.get(name)
            if suffix is None or module is None:
                raise self._error(
                    f"{shorten(key)} is not understood: the model has no such part, or it is none of "
                    f"{', '.join(_ROLES)}; is it a LoRA for this model?"
                )
            keys, role = parts.setdefault(module, {}), _ROLES[suffix].replace("diff_m", "diff")
            if role in keys:
                raise self._error(f"{shorten(keys[role])} and {shorten(key)} mean the same part")
            keys[role] = key
        return parts

    def _add_module(
        self,
        module: str,
        keys: Mapping[str, str],
        alpha: float | None,
        by_root: bool,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Takes down the changes of one module. Raises ModelError."""
        weight = module if module in shapes else f"{module}.weight"
        bias = f"{module}.bias"
        if ("down" in keys) != ("up" in keys):
            raise self._error(f"{shorten(keys.get('down') or keys['up'])} has no matrix that it is multiplied with")
        if "down" not in keys and (lone := keys.get("alpha") or keys.get("up_bias")):
            raise self._error(f"{shorten(lone)} has no matrices, and so no rank that it belongs to")
        factor = float(self.lora.weight)
        if "diff" in keys:
            self._add(weight, _Change(keys["diff"], None, factor), shapes)
        if "diff_b" in keys:
            self._add(bias, _Change(keys["diff_b"], None, factor), shapes)
        if "down" in keys:
            rank = self._shapes[keys["down"]][:1]
            if not rank or rank[0] < 1:
                raise self._error(f"{shorten(keys['down'])} is {list(self._shapes[keys['down']])}: no matrix")
            if alpha is not None:
                factor *= alpha / (math.sqrt(rank[0]) if by_root else rank[0])
            self._add(weight, _Change(keys["down"], keys["up"], factor), shapes)
            if "up_bias" in keys:
                self._add(bias, _Change(keys["up_bias"], None, factor), shapes)

    def _add(self, name: str, change: _Change, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Takes down a change of the tensor ``name``, if shapes fit. Raises ModelError."""
        wanted, down = shapes.get(name), self._shapes[change.down]
        if wanted is None:
            raise self._error(f"{shorten(change.down)} changes {name}, which the model does not have")
        if change.up is None:
            fits, have = down == wanted, f"{shorten(change.down)} is {list(down)}"
        else:
            up = self._shapes[change.up]
            matrices = len(wanted) > 1 and down[1:] == wanted[1:] and up[:1] == wanted[:1]
            fits = matrices and math.prod(up[1:]) == down[0] and len(up) in (2, len(wanted))
            have = f"{shorten(change.down)} is {list(down)} and {shorten(change.up)} {list(up)}"
        if not fits:
            raise self._error(f"{have}; they do not fit {name}, {list(wanted)}: is it a LoRA for this model?")
        self._changes.setdefault(name, []).append(change)

    def _alphas(self, metadata: Mapping[str, str]) -> _Alphas:
        """The alphas that are told beside the matrices: by diffusers in the header, by PEFT in a file. ModelError."""
        beside = self.path.with_name("adapter_config.json")
        if _METADATA in metadata:
            try:
                values = json.loads(metadata[_METADATA])
            except (ValueError, RecursionError) as error:
                raise self._error(f"{_METADATA} in its header is no JSON ({error})") from None
            if not isinstance(values, dict):
                raise self._error(f"{_METADATA} in its header is no object")
            values = {key.removeprefix("transformer."): value for key, value in values.items()}
        elif any(key.startswith("base_model.model.") for key in self._shapes) and beside.exists():
            values = read_json(beside)
        else:
            return _Alphas(None, {}, False)
        if values.get("use_dora"):
            raise self._error("DoRA, which is no sum of matrices, is not supported; use a LoRA")
        default, by_name = values.get("lora_alpha"), values.get("alpha_pattern") or {}
        listed: list[Any] = [default, *by_name.values()] if isinstance(by_name, dict) else [None]
        if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in listed):
            raise self._error(f"lora_alpha={default!r} and alpha_pattern={shorten(by_name)}: numbers are needed")
        return _Alphas(float(default), by_name, bool(values.get("use_rslora")))

    def _scalar(self, handle: Any, key: str) -> float:
        """The number that a tensor of one element holds. Raises ModelError."""
        value = float(handle.get_tensor(key)) if math.prod(self._shapes[key]) == 1 else math.nan
        if not math.isfinite(value):
            raise self._error(f"{shorten(key)} is {list(self._shapes[key])}: one finite number is needed")
        return value

    def _digest(self) -> str:
        """The fingerprint. Files of one trainer share header and size, so it has samples of the data, too."""
        digest = sampled(self.path)
        changes = sorted((name, change.factor) for name, listed in self._changes.items() for change in listed)
        digest.update(json.dumps(changes).encode())
        return digest.hexdigest()

    def _open(self) -> Any:
        if not self.path.is_file():
            raise self._error("there is no such file")
        try:
            return safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise self._error(f"not a whole safetensors file ({error}); get it again") from None

    def _error(self, text: str) -> ModelError:
        return ModelError(f"LoRA {self.path}: {text}")


class _Alphas(NamedTuple):
    """Alphas of modules that have no tensor for it; without a default alpha is the rank, as all loaders take it.

    Attributes:
        default: of all modules that are not in ``by_name``.
        by_name: by the end of a module's name.
        by_root: divided by the root of the rank, in place of the rank (rsLoRA).
    """

    default: float | None
    by_name: Mapping[str, float]
    by_root: bool

    def of(self, module: str) -> float | None:
        """The alpha of a module; None: its rank."""
        return next((a for name, a in self.by_name.items() if f".{module}".endswith(f".{name}")), self.default)
