"""Groups over private sockets: every tensor arrives, ends that differ or end are told, and no other user takes part."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from dualparal.distributed.private import PrivateGroup, _Pair
from dualparal.launch.heartbeat import RENDEZVOUS
from places import WORKERS

NOBODY = 65534
PYTHON = ["/usr/bin/env", "python3"]  # one that others may read
ATTACKER = WORKERS / "other_user.py"
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can be another user")


def _groups(folder: Path, size: int, seconds: float = 10.0) -> list[Any]:
    """The groups of ``size`` ranks, which are threads here."""
    store, found = dist.HashStore(), {}

    def join(rank: int) -> None:
        found[rank] = PrivateGroup(store, rank, size, timedelta(seconds=seconds))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(folder.iterdir()) == [], "names of sockets are left"
    return [found[rank] for rank in range(size)]


@pytest.fixture(params=["short", "n" * 120], ids=["short", "long"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run; the path of a socket has at most 107 bytes."""
    path = tmp_path / request.param
    path.mkdir(mode=0o700)
    monkeypatch.setenv(RENDEZVOUS, str(path / "store"))
    return path


@pytest.fixture
def groups(folder: Path) -> Iterator[list[Any]]:
    made = _groups(folder, 3)
    yield made
    for group in made:
        group.shutdown()


def test_all_arrives_in_order_whatever_its_size_and_dtype(groups: list[Any]) -> None:
    """More than sockets hold, in both directions at once, and small ones behind it."""
    generator = torch.Generator().manual_seed(1)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)
    shapes = [(3_000_000,), (7,), (1,), (), (2, 3, 500_000), (0,), (5,)]
    sent = [torch.randint(0, 255, s, generator=generator).to(dtypes[k % 5]) for k, s in enumerate(shapes * 2)]
    works, got = [], {}
    for here, there in ((0, 1), (1, 0), (2, 0), (0, 2), (1, 2)):
        works += [groups[here].send([tensor], there, 0) for tensor in sent]
    for here, there in ((0, 1), (1, 0), (2, 0), (0, 2), (1, 2)):
        got[here, there] = [torch.empty_like(tensor) for tensor in sent]
        works += [groups[there].recv([tensor], here, 0) for tensor in got[here, there]]
    for work in works:
        assert work.wait(timedelta(seconds=30))
    for tensors in got.values():
        assert all(torch.equal(a, b) for a, b in zip(tensors, sent, strict=True))


def test_a_small_message_waits_for_the_rest_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the socket has room again before the thread that sends the rest has run."""
    monkeypatch.setattr(_Pair, "_start", lambda *_: None)
    here, there = socket.socketpair()
    pair = _Pair(here, 1, 10.0)
    with here, there:
        there.setblocking(False)
        assert not pair.send(torch.zeros(10_000_000, dtype=torch.uint8)).is_completed()
        with pytest.raises(BlockingIOError):
            while there.recv(1 << 20):
                pass
        assert not pair.send(torch.ones(1)).is_completed()
        with pytest.raises(BlockingIOError):
            there.recv(1)


def test_a_message_of_another_size_is_an_error_on_the_one_who_takes_it(groups: list[Any]) -> None:
    """And so is all that follows: nobody knows where the next one begins."""
    groups[0].send([torch.zeros(4)], 1, 0)
    with pytest.raises(RuntimeError, match="a message of 16 bytes where 12 are expected"):
        groups[1].recv([torch.zeros(3)], 0, 0).wait()
    with pytest.raises(RuntimeError, match="16 bytes"):
        groups[1].recv([torch.zeros(4)], 0, 0).wait()


def test_what_was_sent_before_the_end_arrives_and_then_the_end_is_told(groups: list[Any]) -> None:
    groups[2].send([torch.ones(3)], 0, 0).wait()
    groups[2].shutdown()
    tensor = torch.zeros(3)
    assert groups[0].recv([tensor], 2, 0).wait() and tensor.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="receive from rank 2: connection closed by peer"):
        groups[0].recv([tensor], 2, 0).wait()
    with pytest.raises(RuntimeError, match="send to rank 2"):
        groups[0].send([tensor], 2, 0).wait()


def test_waiting_has_an_end(groups: list[Any]) -> None:
    work = groups[0].recv([torch.zeros(3)], 1, 0)
    with pytest.raises(RuntimeError, match=r"receive from rank 1: timed out after 0\.05 s"):
        work.wait(timedelta(seconds=0.05))
    assert not work.is_completed()
    with pytest.raises(ValueError, match="contiguous"):
        groups[0].send([torch.zeros(4, 4).T], 1, 0)


def test_a_rank_that_does_not_connect_is_named(folder: Path) -> None:
    with pytest.raises(TimeoutError, match=r"rank\(s\) \[1\] of the group did not come within 0.1 s"):
        PrivateGroup(dist.HashStore(), 0, 2, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match=r"rank\(s\) \[0\] of the group did not come within 0.1 s"):
        PrivateGroup(dist.HashStore(), 1, 2, timedelta(seconds=0.1))


# Another user of the machine ---------------------------------------------------------------------------------------


CALLER = """
import socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
try:
    link.sendall(bytes.fromhex(sys.argv[2]))
    got = link.recv(1)
except OSError:
    got = b""
print("connected, and", "given something" if got else "shown the door")
"""


@as_root
def test_a_socket_in_an_open_folder_still_takes_none_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's mode is one lock; the kernel's word on who calls is another."""
    with tempfile.TemporaryDirectory() as open_to_all:
        folder = Path(open_to_all)
        folder.chmod(0o777)
        monkeypatch.setenv(RENDEZVOUS, str(folder / "store"))
        store, found = dist.HashStore(), []
        first = threading.Thread(target=lambda: found.append(PrivateGroup(store, 0, 2, timedelta(seconds=20))))
        before = os.umask(0)
        try:
            first.start()
            while not store.check(["socket/0"]):
                pass
        finally:
            os.umask(before)
        name, hello = store.get("socket/0").decode(), struct.pack("<I", 1).hex()
        attack = subprocess.run(
            [*PYTHON, "-c", CALLER, name, hello], user=NOBODY, capture_output=True, text=True, timeout=20, check=False
        )
        assert attack.stdout == "connected, and shown the door\n", attack
        second = PrivateGroup(store, 1, 2, timedelta(seconds=20))
        first.join()
        second.send([torch.ones(2)], 0, 0).wait()
        tensor = torch.zeros(2)
        assert found[0].recv([tensor], 1, 0).wait() and tensor.tolist() == [1, 1]
        for group in (found[0], second):
            group.shutdown()


RANK = """
import sys, time, torch, torch.distributed as dist
from dualparal.distributed.mesh import Mesh
from dualparal.distributed.remote import make_groups, warm_up
mesh = Mesh.join("cpu")
groups = make_groups(2, mesh.device)
warm_up(groups, mesh.rank, mesh.device)
tensor = torch.arange(1000.0)
for group, control in enumerate(pair.control for pair in groups):
    if mesh.rank == group:
        dist.send(tensor, 1 - group, group=control)
    else:
        got = torch.zeros(1000)
        dist.recv(got, group, group=control)
        assert torch.equal(got, tensor)
"""


@as_root
def test_another_user_gets_no_tensor_and_ends_no_run(tmp_path: Path) -> None:
    """It tries every port and every named socket of the ranks from the first moment, as fast as it can."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    attacker = subprocess.Popen(
        [*PYTHON, "-c", ATTACKER.read_text(), str(folder)],
        user=NOBODY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    ranks = [
        psutil.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, RENDEZVOUS: str(folder / "store"), "WORLD_SIZE": "2", "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 100
        while any(rank.poll() is None for rank in ranks):
            assert time.monotonic() < deadline and attacker.poll() is None
            ports = [c.laddr.port for rank in ranks for c in _sockets(rank) if c.status == psutil.CONN_LISTEN]
            attacker.stdin.write("".join(f"{port}\n" for port in ports) or "\n")
            attacker.stdin.flush()
            time.sleep(0.005)
        assert [rank.wait() for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        told, _ = attacker.communicate(timeout=20)
    rounds, connections, received = map(int, told.split())
    assert rounds > 20 and (connections, received) == (0, 0)


def _sockets(process: Any) -> list[Any]:
    try:
        return process.net_connections(kind="inet")
    except psutil.Error:  # it has just ended
        return []
