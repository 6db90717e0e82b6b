"""Headers of a transformer's weights: its tensors by the model's own names, and scales of those in 8 bits. No torch.

Weights in fp8 (e4m3) come as a plain cast, or with a scale per matrix or per row: ComfyUI's "NAME.scale_weight" and
"NAME.weight_scale", which lightx2v writes, too. Static scales of inputs ("scale_input", "input_scale") and markers
("scaled_fp8", "comfy_quant") are left out: inputs are not quantised, or by token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualparal.config.lora import LORA_EXPERTS, LoraExpert
from dualparal.config.transformer_file import TransformerFile
from dualparal.models.headers import FP8, Entry, read_entries, sampled, shapes_of
from dualparal.models.json_files import ModelError, shorten

# (shapes by name, config of the folder) -> (config of these tensors, key of each tensor by the model's name)
Reader = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], tuple[dict[str, Any], dict[str, str]]]
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SCALES = (".scale_weight", ".weight_scale")
_LEFT_OUT = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_SCALE_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TransformerHeader:
    """The tensors of one transformer, of which no number has been read.

    Attributes:
        place: a file or a folder.
        config: as diffusers has it.
        entries: by the model's names; what is none of its tensors by its own key.
        scales: of weights in 8 bits, by the model's names of these; a weight without one was only cast.
    """

    place: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    scales: Mapping[str, Entry]

    @classmethod
    def of_folder(cls, folder: Path, config: Mapping[str, Any]) -> TransformerHeader:
        """The transformer in a component's folder, in diffusers' names. Raises ModelError."""
        entries, scales = _parted(folder, read_entries(folder))
        return cls(folder, config, entries, scales)

    @classmethod
    def of_file(cls, file: TransformerFile, read: Reader, folder: Mapping[str, Any]) -> TransformerHeader:
        """The transformer in a file that takes the place of the folder's.

        Args:
            file: the file, or a folder of files.
            read: the family's reader of names and shapes.
            folder: config of the transformer that it stands for, for what shapes do not tell.

        Raises:
            ModelError: no safetensors file, or one of no such transformer; says of what.
        """
        place = Path(file.file)
        if not os.path.isdir(place) and place.suffix != ".safetensors":
            raise ModelError(f"transformer {place}: use a .safetensors file, or a folder of them")
        if not os.path.exists(place):
            raise ModelError(f"transformer {place}: there is no such file")
        found, scales = _parted(place, read_entries(place))
        try:
            config, keys = read(shapes_of(found), folder)
        except ValueError as error:
            raise ModelError(f"transformer {place}: {error}") from None
        names = {key: name for name, key in keys.items()}
        entries = {names.get(key, key): entry for key, entry in found.items()}
        return cls(place, config, entries, {names.get(key, key): entry for key, entry in scales.items()})

    @property
    def fingerprint(self) -> str:
        """A checksum of headers, sizes and samples of the files, not of their names."""
        return " ".join(sampled(path).hexdigest() for path in sorted({entry.path for entry in self.entries.values()}))

    def is_8bit(self, name: str) -> bool:
        """True for a tensor in 8 bits."""
        return name in self.entries and self.entries[name].dtype == FP8


def _parted(place: Path, entries: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Tensors and scales of weights by key, prefixes and what nobody reads left out. Raises ModelError."""
    tensors: dict[str, Entry] = {}
    for key, entry in entries.items():
        name = key
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name.endswith(_LEFT_OUT):
            continue
        if name in tensors:
            raise ModelError(f"{place}: {shorten(tensors[name].key)} and {shorten(key)} mean the same tensor")
        tensors[name] = entry
    scales: dict[str, Entry] = {}
    for name in [name for name in tensors if name.endswith(_SCALES)]:
        entry = tensors.pop(name)
        weight = name.rpartition(".")[0] + ".weight"
        of = tensors.get(weight)
        if of is None or of.dtype != FP8:
            raise ModelError(f"{place}: {shorten(entry.key)} is the scale of no weight in {FP8}")
        count = math.prod(entry.shape)
        if weight in scales or entry.dtype not in _SCALE_DTYPES or count not in (1, of.shape[0]):
            raise ModelError(
                f"{place}: {shorten(entry.key)} is {entry.dtype} {list(entry.shape)}: scales of a matrix or of its "
                f"{of.shape[0]} rows are read, in {', '.join(_SCALE_DTYPES)}"
            )
        scales[weight] = entry
    return tensors, scales


def expert_of(kind: str, file: str, expert: LoraExpert | None, num_experts: int) -> int:
    """The index of the transformer that a file is for. Raises ModelError where the model leaves it open.

    Args:
        kind: of the file, for the message.
        file: its name.
        expert: as the user has it.
        num_experts: transformers of the model.
    """
    if num_experts > 1 and expert is None:
        raise ModelError(f"{kind} {file}: the model has two transformers; say high:{file} or low:{file}, or give both")
    if num_experts == 1 and expert is not None:
        raise ModelError(f"{kind} {file}: {expert!r} of a model with one transformer; leave {expert}: out")
    return 0 if expert is None else LORA_EXPERTS.index(expert)


def by_expert(files: Sequence[TransformerFile], num_experts: int) -> dict[int, TransformerFile]:
    """The file of each transformer that has one, by its index. Raises ModelError."""
    found: dict[int, TransformerFile] = {}
    for file in files:
        index = expert_of("transformer", file.file, file.expert, num_experts)
        if index in found:
            raise ModelError(f"transformer {file.file} and {found[index].file}: one transformer has one; leave one out")
        found[index] = file
    return found
