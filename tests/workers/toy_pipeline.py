"""A pipeline of ranks without torch, with faults on request: what the supervisor is tested against.

Blocks go round a ring of Unix sockets, two at a time, so that every rank soon waits for the one that fails.
A fault is `NAME:RANK[,NAME:RANK]` in TOY_FAULT and strikes at block 5. With TOY_DEAF the transport never
notices a dead peer, as NCCL may not. No rank gets past block 5 before the file TOY_GATE is there.
As `toy_pipeline.py parent ...` it runs a supervisor on itself instead.
"""

import ctypes
import json
import logging
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from dualparal.launch.heartbeat import Heartbeat, on_stop_signals

FAULT_BLOCK = 5
STOP_BLOCK = -1


class PeerLost(Exception):
    pass


class Link:
    """A connected socket that carries block numbers."""

    def __init__(self, sock: socket.socket, deaf: bool) -> None:
        self._sock = sock
        self._deaf = deaf

    def send(self, block: int) -> None:
        try:
            self._sock.sendall(block.to_bytes(8, "big", signed=True))
        except OSError as error:
            self._lost(str(error))

    def receive(self) -> int:
        try:
            data = self._sock.recv(8, socket.MSG_WAITALL)
        except OSError as error:
            self._lost(str(error))
        if len(data) < 8:
            self._lost("connection closed by peer")
        return int.from_bytes(data, "big", signed=True)

    def _lost(self, why: str) -> NoReturn:
        if self._deaf:
            sleep_for_ever()
        raise PeerLost(why)


def sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(1)


def connect(rank: int, world_size: int, deaf: bool) -> tuple[Link, Link]:
    """The link from the previous rank and the link to the next."""
    folder = Path(os.environ["DUALPARAL_RENDEZVOUS"]).parent
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / f"{rank}.sock"))
    server.listen()
    nxt = socket.socket(socket.AF_UNIX)
    while True:
        try:
            nxt.connect(str(folder / f"{(rank + 1) % world_size}.sock"))
            break
        except OSError:
            time.sleep(0.01)
    return Link(server.accept()[0], deaf), Link(nxt, deaf)


def strike(fault: str | None, heartbeat: Heartbeat) -> None:
    """The fault of this rank, if it has one."""
    if fault == "raise":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")
    if fault == "numerics":
        heartbeat.error("latents are not finite", exit_code=6)
        sys.exit(6)
    if fault == "zombie_raise":  # reports, but never exits
        heartbeat.error(RuntimeError("boom"))
        sleep_for_ever()
    if fault == "exit0":
        os._exit(0)
    if fault == "exit7":
        os._exit(7)
    if fault == "hang":
        sleep_for_ever()
    if fault == "segv":
        ctypes.string_at(0)
    if fault == "abort":
        os.abort()
    if fault == "gil":
        ctypes.PyDLL(None).sleep(1000)


def run(heartbeat: Heartbeat, rank: int, world_size: int, fault: str | None) -> None:
    previous, following = connect(rank, world_size, deaf=bool(os.environ.get("TOY_DEAF")))
    blocks = int(os.environ.get("TOY_BLOCKS", "1000000"))
    unit = float(os.environ.get("TOY_UNIT", "0.005"))
    gate = os.environ.get("TOY_GATE")
    block = 0
    while True:
        where = {"stage": rank, "step": 3, "block": block}
        if rank > 0 or block >= 2:
            heartbeat.phase("wait_recv", **where)
            received = previous.receive()
            if rank > 0:
                block = received
        where["block"] = block
        if rank == 0 and (block >= blocks or heartbeat.stop_requested.is_set()):
            block = STOP_BLOCK
        if block == STOP_BLOCK:
            if fault == "ignore_stop":
                sleep_for_ever()
            following.send(STOP_BLOCK)
            while rank == 0 and previous.receive() != STOP_BLOCK:
                pass
            return
        heartbeat.phase("run", **where)
        time.sleep(unit)
        if block >= FAULT_BLOCK:
            while gate and not os.path.exists(gate):
                time.sleep(0.001)
            strike(fault, heartbeat)
        if not (fault == "drop" and block >= FAULT_BLOCK):
            following.send(block)
        block += 1


def rank_main() -> None:
    heartbeat = Heartbeat.from_env()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faults = dict(item.split(":")[::-1] for item in os.environ.get("TOY_FAULT", "").split(",") if item)
    fault = faults.get(str(rank))
    on_stop_signals(heartbeat.pass_on)
    heartbeat.message(pid=os.getpid())
    if fault == "child":
        child = subprocess.Popen(["sleep", "1000"])
        heartbeat.message(child=child.pid)
    if fault == "never_start":
        heartbeat.stop_requested.wait()
    try:
        run(heartbeat, rank, world_size, fault)
    except PeerLost as error:
        heartbeat.error(error, peer=True)
        os._exit(3)
    except Exception as error:
        heartbeat.error(error)
        raise
    if fault == "silent_end":
        return
    heartbeat.done()
    if fault == "linger":
        sleep_for_ever()
    if fault == "late_segv":
        ctypes.string_at(0)
    if fault == "late_exit":
        os._exit(9)


def parent_main(pid_file: Path, world_size: int) -> None:
    """Supervises this script; writes the ranks' pids to a file and the result to standard output."""
    from dualparal.launch.blame import Limits
    from dualparal.launch.supervisor import supervise

    logging.basicConfig(level=logging.INFO)
    pids: dict[int, int] = {}
    running: set[int] = set()

    def note(rank: int, message: dict) -> None:
        pids[rank] = message.get("pid", pids.get(rank, 0))
        if message.get("block", 0) >= 3 and rank not in running:
            running.add(rank)
            if len(running) == world_size:
                partial = pid_file.with_suffix(".tmp")
                partial.write_text(json.dumps([pids[r] for r in sorted(pids)]))
                partial.rename(pid_file)

    limits = Limits(grace=float(os.environ.get("TOY_GRACE", "5")))
    result = supervise([sys.executable, __file__], world_size, limits=limits, on_message=note)
    failure = asdict(result.failure) if result.failure else None
    sys.stdout.write(json.dumps({"exit_code": result.exit_code, "failure": failure}) + "\n")
    sys.exit(result.exit_code)


if __name__ == "__main__":
    if sys.argv[1:2] == ["parent"]:
        parent_main(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        rank_main()
