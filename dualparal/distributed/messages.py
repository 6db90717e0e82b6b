"""The header in front of every tensor that travels: which unit it is of, its size, its dtype, a checksum."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from dualparal.schedule.actions import Unit

_MAGIC = 0x6475616C70617205  # "dualpar", version 5
FIELDS = 10  # magic, kind, block, step, branch, video, prompt, elements, dtype, checksum
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kind(IntEnum):
    """The kinds of a message."""

    UNIT = 0
    STOP = 1  # the sender stops here; no tensor follows


class Header(NamedTuple):
    """The header of a message.

    Attributes:
        kind: UNIT, or a sign without a tensor.
        unit: the unit whose hidden states or velocity travel.
        prompt: number of the prompt that the unit's block has, see ``PromptChannel``.
    """

    kind: Kind
    unit: Unit
    prompt: int

    def __str__(self) -> str:
        return str(self.unit) if self.kind is Kind.UNIT else self.kind.name.lower()


class Lengths(NamedTuple):
    """The lengths of an edge's messages, which both ends know from the schedule.

    Attributes:
        most: elements of the longest, and of a buffer.
        of: (unit) -> elements of the message that carries it.
    """

    most: int
    of: Callable[[Unit], int]

    @classmethod
    def fixed(cls, elements: int) -> Lengths:
        """The same length for all."""
        return cls(elements, lambda unit: elements)


class TransportError(RuntimeError):
    """A message is not what the schedule says must arrive; names both ends."""


class PeerLost(RuntimeError):
    """The other end of an edge is gone. A consequence of some other failure, never its cause."""


def pack_header(header: Header, elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The header as int64 [10], the last field a CRC-32 of the others.

    Args:
        elements: of the tensor behind it.
        dtype: of every tensor on that edge.
    """
    code = _DTYPES.index(dtype)
    fields = torch.tensor([_MAGIC, header.kind, *header.unit, header.prompt, elements, code, 0], dtype=torch.int64)
    fields[-1] = zlib.crc32(fields[:-1].numpy().tobytes())
    return fields


def unpack_header(fields: torch.Tensor, lengths: Lengths, edge: str, dtype: torch.dtype = torch.float32) -> Header:
    """The inverse of ``pack_header``.

    Args:
        fields: int64 [10], as received.
        lengths, dtype: those expected on that edge.
        edge: its name, for error messages.

    Raises:
        TransportError: not a header of ours, damaged, or of a tensor with another number of elements or dtype.
    """
    values = fields.tolist()
    if len(values) != FIELDS or values[0] != _MAGIC or values[-1] != zlib.crc32(fields[:-1].numpy().tobytes()):
        raise TransportError(f"{edge}: message without a valid header: {values}")
    if values[1] not in tuple(Kind):
        raise TransportError(f"{edge}: message of unknown kind {values[1]}")
    unit = Unit(*values[2:6])
    elements = lengths.of(unit)
    if values[7] != elements or not 0 <= elements <= lengths.most:
        raise TransportError(
            f"{edge}: message of {values[7]} elements, expected {elements}: do both ends run the same configuration?"
        )
    if values[8] != _DTYPES.index(dtype):
        sent = _DTYPES[values[8]] if 0 <= values[8] < len(_DTYPES) else f"dtype {values[8]}"
        raise TransportError(f"{edge}: message of {sent}, expected {dtype}: do both ends run the same configuration?")
    return Header(Kind(values[1]), unit, values[6])


def guard(edge: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function of torch.distributed, with its result.

    Raises:
        PeerLost: in place of the bare RuntimeError with which torch reports it, both on starting and on waiting.
    """
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        raise PeerLost(f"{edge}: {str(error).splitlines()[0]}") from error
