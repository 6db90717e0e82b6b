"""Weight files of a component: safetensors only, names and shapes by header, tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dualparal.models.json_files import ModelError, read_json, shorten

_DTYPES = ("F32", "BF16", "F16", "F64")


class WeightFiles:
    """The safetensors files of one component, single or sharded, opened by header.

    Attributes:
        owner: the file of each tensor.
        shapes: the shape of each tensor.
        dtypes: the dtype of each tensor, as safetensors names it.

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
        self.dtypes: dict[str, str] = {}
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{indices[0]}: names the file {shorten(name)} outside its folder")
            if not name.endswith(".safetensors") or "\0" in name or len(name) > 255:
                raise ModelError(f"{indices[0]}: names {shorten(name)}, which is no .safetensors file")
            with _open(folder / name) as handle:
                for key in handle.keys():  # noqa: SIM118 (not a dict)
                    self.owner[key] = folder / name
                    part = handle.get_slice(key)
                    self.shapes[key], self.dtypes[key] = tuple(part.get_shape()), part.get_dtype()

    def check_dtypes(self, names: Iterable[str]) -> None:
        """Refuses numbers that are none without a scale of their own, such as int8, which no config here speaks of.

        Raises:
            ModelError: one of these tensors is quantized.
        """
        odd = sorted(name for name in names if self.dtypes.get(name, _DTYPES[0]) not in _DTYPES)
        if odd:
            raise ModelError(
                f"{self.folder}: {len(odd)} tensors are {self.dtypes[odd[0]]} ({', '.join(odd[:3])}): quantized "
                f"weights are not supported; use those in {', '.join(_DTYPES)} (--linear-8bit makes 8 bits of them)"
            )

    def read(self, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields (name, tensor on the CPU) of just these tensors, file by file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.owner[name], []).append(name)
        for path, wanted in by_file.items():
            with _open(path) as handle:
                for name in wanted:
                    yield name, handle.get_tensor(name)


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


def channels_last(module: torch.nn.Module) -> torch.nn.Module:
    """Lays the weights of a module's convolutions out channels last, in place; what they make lies so, too."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
    return module


def check_tensors(folder: Path, expected: dict[str, tuple[int, ...]], unused: Callable[[str], bool]) -> None:
    """Checks the files that a slice is built from, by header.

    Args:
        folder: of the component.
        expected: name and shape of every tensor that must be there.
        unused: (name) -> True for a tensor that may be there besides.

    Raises:
        ModelError: tensors are missing, too many, quantized, or of another shape.
    """
    files = WeightFiles(folder)
    files.check_dtypes(expected)
    found = files.shapes
    missing = sorted(set(expected) - set(found))
    extra = sorted(name for name in set(found) - set(expected) if not unused(name))
    shapes = [f"{n} {found[n]} instead of {s}" for n, s in expected.items() if n in found and found[n] != s]
    _refuse(folder, missing, extra, shapes)


def _refuse(folder: Path, missing: list[str], extra: list[str], shapes: list[str]) -> None:
    """Raises ModelError that lists the first three tensors of each problem, if there is one."""
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ModelError(
            f"{folder}: tensors do not fit its config: {'; '.join(problems)}; download it again, or mend config.json"
        )


def check_part(folder: Path, config: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> None:
    """Checks the files of a part that its library loads, by header.

    The library itself would fill a missing tensor with random numbers and warn.

    Args:
        folder: of the part.
        config: its config.
        build: (config) -> torch module; called under the meta device.

    Raises:
        ModelError: nothing can be built from the config, or tensors are missing, quantized or of another shape.
    """
    files = WeightFiles(folder)
    found = files.shapes
    try:
        with torch.device("meta"):
            tensors = build(config).state_dict(keep_vars=True)
    except Exception as error:  # whatever the library makes of a foreign config
        raise ModelError(f"{folder / 'config.json'}: cannot be built from it: {error}") from None
    files.check_dtypes(name for name, tensor in tensors.items() if tensor.is_floating_point())
    there = {id(tensor) for name, tensor in tensors.items() if name in found}
    missing = sorted(name for name, tensor in tensors.items() if id(tensor) not in there)  # tied ones are stored once
    shapes = [
        f"{name} {found[name]} instead of {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    _refuse(folder, missing, [], shapes)
