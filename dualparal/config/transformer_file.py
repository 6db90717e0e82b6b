"""Weights of a transformer in place of those in a model's folder: a value without torch."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from dualparal.config.lora import LORA_EXPERTS, LoraExpert

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
NO_GGUF = (
    "GGUF is not read; use the same model as .safetensors, in 16 bits or in fp8 ('fp8_scaled'), which takes about as "
    "much memory as Q8"
)


@dataclass(frozen=True)
class TransformerFile:
    """A safetensors file with a transformer's weights, or a folder of such files, in the original or in diffusers'
    names.

    Attributes:
        file: the file or the folder.
        expert: of a model with two transformers (Wan2.2) the one that it is: "high" noise, the first steps, or "low"
            noise, the last ones. None: the only transformer.

    Raises:
        ValueError: a value is out of range; the message names the value, the rule and the way out.
    """

    file: str
    expert: LoraExpert | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not self.file:
            raise ValueError(f"transformer {self.file!r}: use a .safetensors file, or a folder of them")
        if self.file.endswith(".gguf"):
            raise ValueError(f"transformer {self.file}: {NO_GGUF}")
        if self.file.endswith(_PICKLES):
            raise ValueError(f"transformer {self.file}: a pickle, which is never read; use a .safetensors file")
        if self.expert not in (None, *LORA_EXPERTS):
            raise ValueError(f"transformer {self.file}: expert {self.expert!r}: use 'high' or 'low', or leave it out")

    @classmethod
    def of(cls, value: Any) -> TransformerFile:
        """The file of what a user gives: a ``TransformerFile``, "[high:|low:]FILE", or (file, "high" or "low").

        Raises:
            ValueError: none of them, or a value out of range.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, (str, PathLike)):
            text = fspath(value)
            head, colon, rest = text.partition(":")
            named = colon and head in LORA_EXPERTS
            return cls(rest, head) if named else cls(text)  # type: ignore[arg-type]
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ValueError(f"transformer {value!r}: use a file, or (file, 'high' or 'low')")
        file, expert = value
        return cls(fspath(file) if isinstance(file, PathLike) else file, expert)
