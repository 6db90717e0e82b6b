"""The command line with a fault on request: `FAULT=NAME:RANK`, at the first unit of block FAULT_BLOCK on that rank.

With FAULT_DEAF the transport never notices a dead peer, as NCCL may not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Any, NoReturn

import torch

from dualparal.cli import main as cli
from dualparal.decoding.parts import PartDecoder
from dualparal.distributed import messages, prompts, remote
from dualparal.distributed.messages import Header, PeerLost
from dualparal.distributed.remote import SendEdge
from dualparal.launch.heartbeat import Heartbeat
from dualparal.runtime.executor import StageExecutor
from dualparal.runtime.stage import Stage, UnitPlan
from dualparal.schedule.actions import Unit

NAME, _, RANK = os.environ.get("FAULT", "none:-1").partition(":")
HERE = os.environ.get("RANK", "0") == RANK
BLOCK = int(os.environ.get("FAULT_BLOCK", "2"))
UNIT_SECONDS = float(os.environ.get("FAULT_UNIT_SECONDS", "0"))


def sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(1)


def strike() -> None:
    if NAME == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if NAME == "segv":
        ctypes.string_at(0)
    if NAME == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if NAME == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
    if NAME == "hang":
        sleep_for_ever()
    if NAME == "exit0":
        os._exit(0)


def strike_in_phases() -> None:
    told = Heartbeat.phase

    def phase(self: Heartbeat, name: str, **where: Any) -> None:
        told(self, name, **where)
        if HERE and name in ("run", "decode") and where["block"] >= BLOCK:
            strike()

    Heartbeat.phase = phase  # type: ignore[method-assign]


def make_deaf() -> None:
    heard = messages.guard

    def guard(*args: Any, **kwargs: Any) -> Any:
        try:
            return heard(*args, **kwargs)
        except PeerLost:
            sleep_for_ever()

    remote.guard = prompts.guard = guard  # type: ignore[attr-defined]


def change_units() -> None:
    computed = Stage.run

    def run(self: Stage, hidden: torch.Tensor, plan: UnitPlan) -> torch.Tensor:
        time.sleep(UNIT_SECONDS * (3 if HERE and NAME == "slow" else 1))
        result = computed(self, hidden, plan)
        if HERE and NAME == "nan" and (plan.unit.block, plan.unit.step) == (BLOCK, 1):
            result = result.clone()  # outside of inference mode
            result.view(-1)[7] = float("nan")
        return result

    Stage.run = run  # type: ignore[method-assign]


def change_messages() -> None:
    sent = SendEdge.send

    def send(self: SendEdge, header: Header, tensor: Any, mark: Any = None) -> None:
        if HERE and NAME == "order" and header.unit.block == BLOCK:
            header = header._replace(unit=header.unit._replace(block=BLOCK + 1))
        sent(self, header, tensor, mark)

    SendEdge.send = send  # type: ignore[method-assign]


def change_frames() -> None:
    decoded = PartDecoder._frames

    def frames(self: PartDecoder, video: int, block: int, latents: torch.Tensor) -> Any:
        time.sleep(float(os.environ.get("FAULT_DECODE_SECONDS", "0")))
        if HERE and NAME == "decoder" and block == BLOCK:
            raise MemoryError("no room for the rows")
        if HERE and NAME == "broken" and block == BLOCK:  # what has left for the other parts' rows was whole
            decoder: Any = self._decoders[video]
            push = decoder.push
            decoder.push = lambda latents: push(latents) * float("nan")
        return decoded(self, video, block, latents)

    PartDecoder._frames = frames  # type: ignore[method-assign]


def read_slowly() -> None:
    """The consumer of the first chunk stays away for 2 s."""
    gave, waited = StageExecutor._emit, []

    def emit(self: StageExecutor, unit: Unit) -> None:
        gave(self, unit)
        if not waited:
            waited.append(time.sleep(2.0))

    StageExecutor._emit = emit  # type: ignore[method-assign]


strike_in_phases()
change_units()
change_messages()
if os.environ.get("FAULT_DEAF"):
    make_deaf()
change_frames()
if NAME == "reader" and HERE:
    read_slowly()

if __name__ == "__main__":
    sys.exit(cli.main())
