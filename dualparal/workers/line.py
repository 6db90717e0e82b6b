"""The line between a parent and one of its ranks: messages of JSON and tensors, in memory that changes hands.

A message is a piece of anonymous memory, and what travels over the socket is one byte with its descriptor. So a message
goes whole or not at all, whoever sends beside it (a signal handler, too), the other end reads tensors where they lie,
and nothing has a name that could be left behind. No code travels.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

Message = tuple[dict[str, Any], dict[str, torch.Tensor]]

_LENGTH = struct.Struct("<Q")  # of the JSON, in front of it
_ALIGNED = 64  # bytes: where a tensor may begin
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_CLOSED_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Line:
    """One end. Any thread may send; one receives.

    Args:
        connection: a Unix socket to the other end, connected, blocking.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Sends a message; the tensors are copied. Raises OSError: the other end is gone, or there is no memory."""
        memory = _write(fields, tensors or {})
        try:
            socket.send_fds(self._connection, [b"m"], [memory], _NO_SIGNAL)
        finally:
            os.close(memory)

    def receive(self) -> Message | None:
        """The next message; its tensors are this process's own. None: the line has ended."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._connection, 1, 1, _CLOSED_ON_EXEC)
        except OSError:
            return None
        if not data or not descriptors:
            return None
        try:
            return _read(descriptors[0])
        finally:
            os.close(descriptors[0])

    def end(self) -> None:
        """Ends the line: both ends receive None."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended

    def close(self) -> None:
        """Frees an ended line's socket, when nobody receives any more."""
        self._connection.close()


def _write(fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> int:
    """The descriptor of memory that holds a message."""
    places: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        places[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), at, tensor.nbytes]
        at += _aligned(tensor.nbytes)
    head = json.dumps({"fields": fields, "tensors": places}).encode()
    begin = _aligned(_LENGTH.size + len(head))
    memory = _memory()
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(_LENGTH.pack(len(head)) + head)
            for name, tensor in tensors.items():
                file.seek(begin + places[name][2])
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    except BaseException:
        os.close(memory)
        raise
    return memory


def _read(memory: int) -> Message:
    """The message that memory holds. Pages are mapped, not copied; what is written to them is seen here alone."""
    whole = torch.from_file(f"/dev/fd/{memory}", False, os.fstat(memory).st_size, dtype=torch.uint8)
    size = _LENGTH.size
    (length,) = _LENGTH.unpack(whole[:size].numpy().tobytes())
    head = json.loads(whole[size : size + length].numpy().tobytes())
    begin = _aligned(size + length)
    tensors = {}
    for name, (dtype, shape, at, count) in head["tensors"].items():
        flat = whole[begin + at : begin + at + count]
        tensors[name] = flat.view(getattr(torch, dtype)).view(shape) if count else torch.empty(shape)
    return head["fields"], tensors


def _memory() -> int:
    """The descriptor of new memory without a name; a file without one where the system has no such memory."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("dualparal", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
