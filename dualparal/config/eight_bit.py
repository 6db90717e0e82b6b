"""The parts of a model that compute or are kept in 8 bits: values that import nothing of ours and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

EightBitMode = Literal["off", "int8", "fp8"]
EIGHT_BIT_MODES: tuple[str, ...] = get_args(EightBitMode)
LinearMode = Literal["off", "fp8"]
LINEAR_MODES: tuple[str, ...] = get_args(LinearMode)


@dataclass(frozen=True)
class EightBitPolicy:
    """The layers and steps at which self-attention has 8 bits. Off unless asked for.

    The first steps fix the composition of a video and the last ones its detail, and some layers react to errors
    more than others: both can be left in 16 bits.

    Attributes:
        mode: "off"; "int8" (queries and keys); "fp8" (values and weights besides).
        keep_layers: indices of layers of the model that stay in 16 bits.
        first_steps, last_steps: numbers of steps at each end that stay in 16 bits.

    Raises:
        ValueError: a value is out of range, or there are exceptions to "off"; the message names the value, the rule
            and the way out.
    """

    mode: EightBitMode = "off"
    keep_layers: tuple[int, ...] = ()
    first_steps: int = 0
    last_steps: int = 0

    def __post_init__(self) -> None:
        if self.mode not in EIGHT_BIT_MODES:
            raise ValueError(f"mode={self.mode!r} is not a mode of 8-bit attention; use one of {EIGHT_BIT_MODES}")
        _check_indices(self.keep_layers, "8-bit attention")
        for name in ("first_steps", "last_steps"):
            if not _is_count(getattr(self, name)):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: a number of steps to leave in 16 bits; use an integer from 0 on"
                )

        if self.mode == "off" and (self.keep_layers or self.first_steps or self.last_steps):
            raise ValueError(
                f"keep_layers={self.keep_layers}, first_steps={self.first_steps}, last_steps={self.last_steps} with "
                "8-bit attention off: they are exceptions from it; choose a mode ('int8' or 'fp8') or leave them out"
            )

    @property
    def on(self) -> bool:
        """True unless the mode is "off"."""
        return self.mode != "off"

    @property
    def everywhere(self) -> bool:
        """True when it is on without exceptions."""
        return self.on and not (self.keep_layers or self.first_steps or self.last_steps)

    def covers(self, layer: int) -> bool:
        """True when ``layer`` of the model attends in 8 bits at the steps at which that is on."""
        return self.on and layer not in self.keep_layers

    def at(self, step: int, num_steps: int) -> bool:
        """True when it is on at ``step`` (from 0 on) of ``num_steps``, for the layers that it covers."""
        return self.on and self.first_steps <= step < num_steps - self.last_steps

    def check(self, num_layers: int) -> None:
        """Checks ``keep_layers`` against a model of ``num_layers``.

        Raises:
            ValueError: it names a layer that the model does not have, or leaves none to 8 bits.
        """
        _check_layers(self.keep_layers, num_layers, "8-bit attention")

    def check_steps(self, num_steps: int) -> None:
        """Checks the exceptions against a video of ``num_steps`` steps.

        Raises:
            ValueError: they leave none of the steps to 8 bits.
        """
        if self.on and self.first_steps + self.last_steps >= num_steps:
            raise ValueError(
                f"first_steps={self.first_steps} and last_steps={self.last_steps} leave none of {num_steps} steps to "
                "8-bit attention; keep fewer, use more steps, or turn it off"
            )


@dataclass(frozen=True)
class LinearPolicy:
    """The layers whose linears have 8 bits. Off unless asked for.

    Weights are kept in one format, so there are no exceptions by step.

    Attributes:
        mode: "off"; "fp8" (weights and inputs in e4m3, scales by output channel and by token).
        keep_layers: indices of layers of the model that stay in 16 bits.

    Raises:
        ValueError: a value is out of range, or there are exceptions to "off"; the message names the value, the rule
            and the way out.
    """

    mode: LinearMode = "off"
    keep_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in LINEAR_MODES:
            raise ValueError(f"mode={self.mode!r} is not a mode of 8-bit linears; use one of {LINEAR_MODES}")
        _check_indices(self.keep_layers, "8-bit linears")
        if self.mode == "off" and self.keep_layers:
            raise ValueError(
                f"keep_layers={self.keep_layers} with 8-bit linears off: they are exceptions from it; choose a mode "
                "('fp8') or leave them out"
            )

    @property
    def on(self) -> bool:
        """True unless the mode is "off"."""
        return self.mode != "off"

    def covers(self, layer: int | None) -> bool:
        """True when the linears of ``layer`` of the model have 8 bits; None is no layer."""
        return self.on and layer is not None and layer not in self.keep_layers

    def check(self, num_layers: int) -> None:
        """Checks ``keep_layers`` against a model of ``num_layers``.

        Raises:
            ValueError: it names a layer that the model does not have, or leaves none to 8 bits.
        """
        _check_layers(self.keep_layers, num_layers, "8-bit linears")


def _check_indices(keep_layers: object, feature: str) -> None:
    """Checks that the exceptions from ``feature`` are a tuple of different indices. Raises ValueError."""
    if not isinstance(keep_layers, tuple) or not all(map(_is_count, keep_layers)):
        raise ValueError(
            f"keep_layers={keep_layers!r} of {feature}: layers are counted from 0; use a tuple of indices such as "
            "(0, 29)"
        )
    if len(set(keep_layers)) < len(keep_layers):
        raise ValueError(f"keep_layers={keep_layers!r} of {feature} names a layer twice; name each once")


def _check_layers(keep_layers: tuple[int, ...], num_layers: int, feature: str) -> None:
    """Checks indices against a model of ``num_layers``, of which ``feature`` must be left one. Raises ValueError."""
    if any(layer >= num_layers for layer in keep_layers):
        raise ValueError(
            f"keep_layers={keep_layers} of {feature}: the model has {num_layers} layers; use indices from 0 to "
            f"{num_layers - 1}"
        )
    if len(keep_layers) == num_layers:
        raise ValueError(
            f"keep_layers={keep_layers} leaves none of the model's {num_layers} layers to {feature}; name fewer, or "
            "turn it off"
        )


def _is_count(value: object) -> bool:
    """True for an int (no bool) from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


OFF = EightBitPolicy()
LINEAR_OFF = LinearPolicy()
