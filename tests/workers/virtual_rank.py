"""One rank whose tensors go over a stand-in for NCCL, and whose device drains before every action.

    virtual_rank.py FOLDER [ahead]

With ``ahead`` receives are posted before their header, which is how it once was.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from dualparal.distributed import remote
from dualparal.distributed.messages import Header, Kind
from dualparal.distributed.remote import ReceiveEdge
from dualparal.engine.engine import Engine
from dualparal.launch.heartbeat import Heartbeat
from dualparal.schedule.actions import Unit
from virtual_nccl import DEVICE, NAME, Hang, register

SECONDS = 3.0  # after which a drain counts as one for ever
PAUSE = 2.0  # of the consumer


def post_ahead() -> None:
    posted: dict[ReceiveEdge, list[remote._Message]] = {}
    hear, post = ReceiveEdge._hear, ReceiveEdge._post

    def heard(self: ReceiveEdge) -> Header:
        waiting = posted.setdefault(self, [])
        while not self._free.empty():
            waiting.append(post(self, Header(Kind.UNIT, Unit(0, 0, 0), 0)))  # all are equally long
        return hear(self)

    ReceiveEdge._hear = heard  # type: ignore[method-assign]
    ReceiveEdge._post = lambda self, header: posted[self].pop(0)._replace(header=header)  # type: ignore[method-assign]


class Late:
    """An event that happens a moment later, as a device is behind its host."""

    def __init__(self, _: torch.device) -> None:
        self.at = time.monotonic() + 0.002

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.monotonic()))


def main(folder: Path, ahead: bool) -> None:
    torch.set_num_threads(1)
    register()
    remote._DATA_BACKENDS["cpu"] = NAME
    remote.event_on = Late  # type: ignore[assignment]
    if ahead:
        post_ahead()
    heartbeat = Heartbeat.from_env()

    def report(phase: str, **where: int) -> None:
        heartbeat.phase(phase, **where)
        DEVICE.drain(SECONDS)

    stats, rank = [], int(os.environ["RANK"])
    for index, case in enumerate(json.loads((folder / "cases.json").read_text())):
        engine = Engine.from_pretrained(case["model"], device="cpu", report=report, **case["options"])
        chunks = engine.stream(height=32, width=32, output_type="latent", **case["call"])
        try:
            made = []
            for chunk in chunks:
                made.append(chunk.latents)
                if chunk.block == case.get("pause_after"):
                    time.sleep(PAUSE)
                if chunk.block == case.get("leave_after"):
                    break
            chunks.close()  # type: ignore[attr-defined]
        except Hang as error:
            heartbeat.error(error)
            os._exit(3)
        if made:
            save_file({"latents": torch.cat(made, dim=2).contiguous()}, folder / f"{index}.safetensors")
        stats.append({"drains": DEVICE.drains, "launched": DEVICE.launched, "free": DEVICE.free})
        DEVICE.free = 0.0
    (folder / f"stats-{rank}.json").write_text(json.dumps(stats))
    heartbeat.done()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "ahead" in sys.argv)
