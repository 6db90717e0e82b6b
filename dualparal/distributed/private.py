"""The ranks of one machine over Unix sockets in the run's private folder, in gloo's place.

gloo listens on TCP ports, and to those of loopback every user of the machine may connect: whoever is there first takes
a rank's place. Here a socket is a name in a folder of mode 0700, for as long as it takes to connect, and its other end
must belong to the same user. Messages have no meaning here; a length in front of each finds ends that differ.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dualparal.distributed.handshake import wait_for
from dualparal.launch.heartbeat import RENDEZVOUS

NAME = "private"
_LENGTH = struct.Struct("<Q")
_RANK = struct.Struct("<I")
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_LONGEST_PATH = 100  # of a socket, in bytes; beyond it the kernel is led by a descriptor of the folder


class _Work(dist.Work):
    """A transfer that was posted.

    Args:
        what: its name, for error messages.
        limit: seconds that ``wait`` waits if nothing else is said.
    """

    def __init__(self, what: str, limit: float) -> None:
        super().__init__()
        self._what, self._limit = what, limit
        self._over = threading.Event()
        self._error: str | None = None

    def end(self, error: str | None = None) -> None:
        """Ends the transfer, well or with an error."""
        self._error = error
        self._over.set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Waits for its end. Raises RuntimeError, as torch's do: it failed, or takes too long."""
        limit = self._limit if timeout is None else timeout.total_seconds()
        if not self._over.wait(limit):
            raise RuntimeError(f"{self._what}: timed out after {limit:g} s")
        if self._error is not None:
            raise RuntimeError(f"{self._what}: {self._error}")
        return True

    def is_completed(self) -> bool:
        """True after its end."""
        return self._over.is_set()


class _Item(NamedTuple):
    work: _Work
    parts: list[memoryview]
    tensor: torch.Tensor  # whose memory it is


class _Pair:
    """The connection to one rank. Each direction has a queue, and a thread from its first wait on.

    Args:
        connection: connected, blocking.
        peer: the other rank, for error messages.
        limit: seconds that a transfer may take if nothing else is said.
    """

    def __init__(self, connection: socket.socket, peer: int, limit: float) -> None:
        self._connection, self._peer, self._limit = connection, peer, limit
        self._lock = threading.Lock()
        self._unsent = 0  # messages of the outgoing queue that have not left whole
        self._outgoing: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._threads: dict[str, threading.Thread] = {}

    def send(self, tensor: torch.Tensor) -> _Work:
        """Begins to send a contiguous CPU tensor, which must stay as it is until then."""
        data = _bytes(tensor)
        work = _Work(f"send to rank {self._peer}", self._limit)
        head = _LENGTH.pack(len(data))
        with self._lock:
            try:
                # What fits the socket's buffer leaves at once, without waking a thread.
                flags = socket.MSG_DONTWAIT | _NO_SIGNAL
                sent = 0 if self._unsent else self._connection.sendmsg([head, data], [], flags)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                work.end(_words(error))
                return work
            if sent == len(head) + len(data):
                work.end()
                return work
            self._unsent += 1
            rest = [memoryview(head)[sent:], data[max(0, sent - len(head)) :]]
            self._outgoing.put(_Item(work, rest, tensor))
            self._start("send", self._send_all)
        return work

    def receive(self, tensor: torch.Tensor) -> _Work:
        """Begins to fill a contiguous CPU tensor with the next message."""
        work = _Work(f"receive from rank {self._peer}", self._limit)
        with self._lock:
            self._incoming.put(_Item(work, [_bytes(tensor)], tensor))
            self._start("receive", self._receive_all)
        return work

    def close(self) -> None:
        """Ends the connection. What the other rank has been sent it can still read."""
        with contextlib.suppress(OSError):  # the other end may be gone
            self._connection.shutdown(socket.SHUT_RDWR)
        self._outgoing.put(None)
        self._incoming.put(None)
        for thread in self._threads.values():
            thread.join()
        self._connection.close()

    def _start(self, name: str, target: Any) -> None:
        if name not in self._threads:
            title = f"dualparal-{name}-{self._peer}"
            self._threads[name] = threading.Thread(target=target, name=title, daemon=True)
            self._threads[name].start()

    def _send_all(self) -> None:
        while (item := self._outgoing.get()) is not None:
            error = None
            try:
                for part in item.parts:
                    self._connection.sendall(part, _NO_SIGNAL)
            except OSError as failure:
                error = _words(failure)
            with self._lock:
                self._unsent -= error is None  # after an error nothing may overtake what was lost
            item.work.end(error)

    def _receive_all(self) -> None:
        error: str | None = None
        while (item := self._incoming.get()) is not None:
            error = error or self._fill(item.parts[0])  # after an error the stream has no beginning of a message
            item.work.end(error)

    def _fill(self, data: memoryview) -> str | None:
        """Reads one message; returns the reason why that failed."""
        head = bytearray(_LENGTH.size)
        try:
            if not _read(self._connection, memoryview(head)):
                return "connection closed by peer"
            (length,) = _LENGTH.unpack(head)
            if length != len(data):
                return f"a message of {length} bytes where {len(data)} are expected"
            return None if _read(self._connection, data) else "connection closed by peer in a message"
        except OSError as error:
            return _words(error)


class PrivateGroup(dist.ProcessGroup):
    """A process group that sends and receives CPU tensors between two ranks, and does nothing else.

    Args:
        store: where the ranks tell each other the names of their sockets.
        rank, size: of this process in the group.
        timeout: until all are connected, and of a transfer if nothing else is said.

    Raises:
        TimeoutError: a rank did not come; names it.
        OSError: no socket can be made in the run's folder.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # its stub leaves that one out
        limit = timeout.total_seconds()
        self._pairs = {peer: _Pair(link, peer, limit) for peer, link in _connect(store, rank, size, limit).items()}

    def getBackendName(self) -> str:
        return NAME

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> _Work:
        return self._pairs[peer].send(tensors[0])

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> _Work:
        return self._pairs[peer].receive(tensors[0])

    def shutdown(self) -> None:
        while self._pairs:
            self._pairs.popitem()[1].close()


def register() -> None:
    """Makes the group known to torch under its name, once per process."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, PrivateGroup, devices=["cpu"])


def host_backend() -> str:
    """The backend of what goes between ranks from the CPU: that of the group of all ranks if it is ours, else gloo."""
    return NAME if dist.get_backend() == NAME else "gloo"


def _connect(store: Any, rank: int, size: int, limit: float) -> dict[int, socket.socket]:
    """Connects this rank with all others of a group; the higher rank of two calls the lower one."""
    deadline = time.monotonic() + limit
    links: dict[int, socket.socket] = {}
    with listen(Path(os.environ[RENDEZVOUS]).parent, size) as (server, name):
        store.set(f"socket/{rank}", name)
        for peer in range(rank):
            if not wait_for(store, [f"socket/{peer}"], deadline - time.monotonic()):
                raise TimeoutError(f"rank(s) [{peer}] of the group did not come within {limit:g} s")
            links[peer] = call(Path(store.get(f"socket/{peer}").decode()), rank)
        while len(links) < size - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link, _ = server.accept()
                found = caller(link, range(rank + 1, size))
            except TimeoutError:
                missing = sorted(set(range(size)) - {rank, *links})
                raise TimeoutError(f"rank(s) {missing} of the group did not come within {limit:g} s") from None
            if found is None or found in links:
                link.close()
            else:
                links[found] = link
    return links


@contextlib.contextmanager
def listen(folder: Path, size: int) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens under a name in a private folder, until all have connected. Raises OSError."""
    path = folder / secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as server:
        _at(path, server.bind)
        try:
            server.listen(size)
            yield server, str(path)
        finally:
            path.unlink(missing_ok=True)


def call(path: Path, rank: int) -> socket.socket:
    """A connection to whoever listens under a path, which is told this rank. Raises OSError."""
    link = socket.socket(socket.AF_UNIX)
    _at(path, link.connect)
    link.sendall(_RANK.pack(rank))
    return link


def _at(path: Path, reach: Any) -> None:
    """Calls ``bind`` or ``connect`` with a path of any length."""
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        reach(str(path))
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        reach(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def caller(link: socket.socket, expected: range) -> int | None:
    """The rank that has connected; None: another user's process, or none of these ranks."""
    if hasattr(socket, "SO_PEERCRED"):  # Linux; elsewhere the folder's mode alone keeps others out
        _, user, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != os.geteuid():
            return None
    head = bytearray(_RANK.size)
    if not _read(link, memoryview(head)):
        return None
    (rank,) = _RANK.unpack(head)
    return rank if rank in expected else None


def _read(connection: socket.socket, data: memoryview) -> bool:
    """Fills the memory; False: the other end has closed before."""
    while data:
        count = connection.recv_into(data)
        if not count:
            return False
        data = data[count:]
    return True


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor. Raises ValueError for another one."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"a contiguous tensor on the CPU is wanted, not one of {tensor.stride()} on {tensor.device}")
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _words(error: OSError) -> str:
    return error.strerror or str(error)
