"""Runs a bench's job in several processes of this machine over gloo: the real engine, supervisor and transport."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from dualparal.launch.blame import Limits
from dualparal.launch.heartbeat import Heartbeat
from dualparal.launch.supervisor import supervise

FLAG = "--rank"
_PATIENT = Limits(startup=600.0)  # many processes that import torch at once, on few cores


def in_processes(script: str, ranks: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What rank 0 told, in order. ``script`` hands its own command line to ``as_rank``, first thing."""
    heard: list[dict[str, Any]] = []

    def listen(rank: int, message: dict[str, Any]) -> None:
        if "figures" in message:
            heard.append(message["figures"])

    result = supervise(
        [sys.executable, script, FLAG, json.dumps(job)],
        ranks,
        env={"OMP_NUM_THREADS": "1"},
        limits=_PATIENT,
        on_message=listen,
    )
    if result.exit_code or not heard:
        raise RuntimeError(f"{ranks} processes did not do their work: {result.failure or 'rank 0 told nothing'}")
    return heard


def as_rank(work: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]) -> bool:
    """In a process that ``in_processes`` started: does ``work(job, tell)``, ``tell`` being heard from rank 0 alone.

    False anywhere else, and nothing is done. With "apart" in the job the processes never meet: every one of them is
    rank 0 of its own.
    """
    if FLAG not in sys.argv:
        return False
    torch.set_num_threads(1)
    heartbeat = Heartbeat.from_env()
    job = json.loads(sys.argv[sys.argv.index(FLAG) + 1])
    rank = os.environ["RANK"]
    if job.get("apart"):
        for name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]

    def tell(figures: dict[str, Any]) -> None:
        if rank == "0":
            heartbeat.message(figures=figures)

    try:
        work(job, tell)
    except Exception as error:
        heartbeat.error(error)
        raise
    heartbeat.done()
    return True
