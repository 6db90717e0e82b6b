"""The flags of what computes or is kept in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from dualparal.config.eight_bit import EightBitPolicy, LinearPolicy


@dataclass(frozen=True)
class EightBitFlags:
    """8 bits"""

    attention_8bit: Annotated[
        str | None,
        typer.Option(help="int8 (queries and keys) or fp8 (values besides): self-attention in 8 bits. Default: off."),
    ] = None
    attention_8bit_keep_layers: Annotated[
        str, typer.Option(help="Layers that stay in 16 bits, such as 0,29.", show_default=False)
    ] = ""
    attention_8bit_keep_first_steps: Annotated[
        int, typer.Option(help="Number of steps at the start that stay in 16 bits.")
    ] = 0
    attention_8bit_keep_last_steps: Annotated[int, typer.Option(help="The same at the end.")] = 0
    linear_8bit: Annotated[
        str | None, typer.Option(help="fp8: linears of the layers in 8 bits; needs bfloat16. Default: off.")
    ] = None
    linear_8bit_keep_layers: Annotated[
        str, typer.Option(help="Layers whose linears stay in 16 bits, such as 0,29.", show_default=False)
    ] = ""
    features_8bit: Annotated[
        bool, typer.Option(help="Keep neighbours' features in fp8, in half the memory; attention stays as it is.")
    ] = False

    def options(self) -> dict[str, Any]:
        """The options of ``EngineConfig`` that the flags ask for. Raises ValueError."""
        kept = _kept_layers("--attention-8bit-keep-layers", self.attention_8bit_keep_layers)
        first, last = self.attention_8bit_keep_first_steps, self.attention_8bit_keep_last_steps
        linears = _kept_layers("--linear-8bit-keep-layers", self.linear_8bit_keep_layers)
        return {
            "attention_8bit": EightBitPolicy(self.attention_8bit or "off", kept, first, last),  # type: ignore[arg-type]
            "linear_8bit": LinearPolicy(self.linear_8bit or "off", linears),  # type: ignore[arg-type]
            "features_8bit": self.features_8bit,
        }


def _kept_layers(flag: str, text: str) -> tuple[int, ...]:
    """The numbers of a flag such as "0,29". Raises ValueError."""
    try:
        return tuple(int(layer) for layer in text.split(",") if text)
    except ValueError:
        raise ValueError(f"{flag} {text!r}: use numbers of layers from 0 on, such as 0,29") from None
