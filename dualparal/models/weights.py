"""Weight files of a component: safetensors only, names and shapes by header, tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from dualparal.models.headers import FP8, Entry, check_dtypes, read_entries, shapes_of
from dualparal.models.json_files import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    FP8: torch.float8_e4m3fn,
}


class WeightFiles:
    """The tensors of one component in safetensors files, of which headers are read at first.

    Args:
        place: a file, or the component's folder.
        entries: its tensors by the names that they are asked for; None: those of the headers.

    Attributes:
        entries: see above.
        shapes: the shape of each tensor.

    Raises:
        ModelError: no safetensors file, or one that is cut or corrupt.
    """

    def __init__(self, place: Path, entries: Mapping[str, Entry] | None = None) -> None:
        self.place = place
        self.entries: Mapping[str, Entry] = read_entries(place) if entries is None else entries
        self.shapes = shapes_of(self.entries)

    def read(self, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields (name, tensor on the CPU, in memory of its own) of just these tensors, file by file.

        Raises:
            ModelError: a file has been cut since its header was read.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].path, []).append(name)
        for path, wanted in by_file.items():
            with _open(path) as file:
                for name in wanted:
                    yield name, file.get_tensor(self.entries[name])


class _TensorFile:
    """An open file, from which tensors are copied."""

    def __init__(self, path: Path) -> None:
        self._file: BufferedReader = path.open("rb")

    def __enter__(self) -> _TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def get_tensor(self, entry: Entry) -> torch.Tensor:
        """The tensor of an entry of this file."""
        made = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        self._file.seek(entry.begin)
        if self._file.readinto(made.numpy().data) != len(made):
            raise ModelError(f"{entry.path} was cut while it was read; download it again")
        return made.view(_DTYPES[entry.dtype]).view(entry.shape)


def _open(path: Path) -> _TensorFile:
    return _TensorFile(path)


def channels_last(module: torch.nn.Module) -> torch.nn.Module:
    """Lays the weights of a module's convolutions out channels last, in place; what they make lies so, too."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
    return module


def check_tensors(files: WeightFiles, expected: dict[str, tuple[int, ...]], unused: Callable[[str], bool]) -> None:
    """Checks the tensors that a slice is built from, by header.

    Args:
        files: of the transformer.
        expected: name and shape of every tensor that must be there.
        unused: (name) -> True for a tensor that may be there besides.

    Raises:
        ModelError: tensors are missing, too many, quantized in a way that is not read, or of another shape.
    """
    check_dtypes(files.place, (files.entries[name] for name in expected if name in files.entries), also=(FP8,))
    found = files.shapes
    missing = sorted(set(expected) - set(found))
    extra = sorted(name for name in set(found) - set(expected) if not unused(name))
    shapes = [f"{n} {found[n]} instead of {s}" for n, s in expected.items() if n in found and found[n] != s]
    _refuse(files.place, missing, extra, shapes)


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
    floats = (name for name, tensor in tensors.items() if tensor.is_floating_point() and name in found)
    check_dtypes(folder, (files.entries[name] for name in floats))
    there = {id(tensor) for name, tensor in tensors.items() if name in found}
    missing = sorted(name for name, tensor in tensors.items() if id(tensor) not in there)  # tied ones are stored once
    shapes = [
        f"{name} {found[name]} instead of {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in found and found[name] != tuple(tensor.shape)
    ]
    _refuse(folder, missing, [], shapes)
