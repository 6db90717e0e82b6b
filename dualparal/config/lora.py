"""A LoRA that is merged into a model while its weights are read: a value without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, get_args

LoraExpert = Literal["high", "low"]
LORA_EXPERTS: tuple[str, ...] = get_args(LoraExpert)  # by the index of the transformer that each means


@dataclass(frozen=True)
class Lora:
    """A file of low-rank updates of a transformer's matrices, and the weight with which they are added.

    Attributes:
        file: a safetensors file.
        weight: factor of its updates, any finite number.
        expert: of a model with two transformers (Wan2.2) the one that is changed: "high" noise, the first steps, or
            "low" noise, the last ones. None: the only transformer.

    Raises:
        ValueError: a value is out of range; the message names the value, the rule and the way out.
    """

    file: str
    weight: float = 1.0
    expert: LoraExpert | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not self.file.endswith(".safetensors"):
            raise ValueError(f"LoRA {self.file!r}: not a .safetensors file (pickles, .pt and .bin, are never read)")
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not math.isfinite(self.weight):
            raise ValueError(f"LoRA {self.file}: weight {self.weight!r}: use a finite number, such as 1.0")
        if self.expert not in (None, *LORA_EXPERTS):
            raise ValueError(f"LoRA {self.file}: expert {self.expert!r}: use 'high' or 'low', or leave it out")

    @classmethod
    def of(cls, value: Any) -> Lora:
        """The LoRA of what a user gives: a ``Lora``, a text as ``parse`` takes it, or (file, weight[, expert]).

        Raises:
            ValueError: none of them, or a value out of range.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, (str, PathLike)):
            return cls.parse(str(value))
        if not isinstance(value, (tuple, list)) or not 1 <= len(value) <= 3:
            raise ValueError(f"LoRA {value!r}: use a file, (file, weight) or (file, weight, 'high' or 'low')")
        file, *rest = value
        return cls(str(file) if isinstance(file, PathLike) else file, *rest)

    @classmethod
    def parse(cls, text: str) -> Lora:
        """The LoRA of "[high:|low:]FILE[:WEIGHT]". Raises ValueError."""
        head, colon, rest = text.partition(":")
        expert = head if colon and head in LORA_EXPERTS else None
        file, weight = (rest if expert else text), "1"
        if not file.endswith(".safetensors"):
            file, colon, weight = file.rpartition(":")
            if not colon:
                file, weight = weight, "1"
        try:
            return cls(file, float(weight), expert)  # type: ignore[arg-type]
        except ValueError as error:
            if "could not convert" not in str(error):
                raise
            raise ValueError(f"LoRA {file}: weight {weight!r}: use a finite number, such as {file}:0.8") from None
