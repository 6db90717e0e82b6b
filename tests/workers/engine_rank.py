"""One rank of tests/distributed/test_distributed.py: runs the cases of a JSON file, rank 0 saves what they give."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dualparal.config.blocks import BlockConfig
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.distributed.messages import PeerLost
from dualparal.engine.engine import Engine
from dualparal.launch.heartbeat import Heartbeat


def run(engine: Engine, case: dict[str, Any], rank: int) -> dict[str, torch.Tensor] | None:
    """Latents and, unless they are all that is wanted, frames of a case, on rank 0."""
    call = {"height": 32, "width": 32, "output_type": "latent", **case["call"]}
    if "later" in case:  # JSON has no integer keys
        call["prompt"] = {0: call["prompt"], case["later"]: "a dog"}
    leave_after, change_after = case.get("leave_after"), case.get("change_after")
    prompts = call["prompt"]
    parts: list[list[torch.Tensor]] = [[] for _ in (prompts if isinstance(prompts, list) else [prompts])]
    frames: list[torch.Tensor] = []
    chunks = engine.stream(**call)
    for chunk in chunks:
        parts[chunk.video].append(chunk.latents)
        if chunk.frames is not None:
            frames.append(torch.as_tensor(chunk.frames))
        if chunk.block == change_after:
            engine.set_prompt("a dog")
        if chunk.block == leave_after:
            break
    chunks.close()  # type: ignore[attr-defined]
    if engine.stats is not None:
        assert len(engine.stats.ranks) == engine.mesh.stage_ranks
        assert len(engine.stats.ranks + engine.stats.decoders) == engine.mesh.world_size
    if not parts[0]:
        return None
    whole = [torch.cat(part, dim=2).cpu() for part in parts if part]
    latents = torch.cat([part[:, :, : whole[-1].shape[2]] for part in whole]).contiguous()
    return {"latents": latents, **({"frames": torch.cat(frames)} if frames else {})}


def forbid_collectives() -> None:
    """gloo runs them in threads of its own, one of which may abort the process while Python ends."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a collective in a run")

    for name in ("allgather", "allreduce", "barrier", "broadcast", "gather", "scatter"):
        setattr(dist.ProcessGroup, name, refuse)


def gloo_threads() -> int:
    found = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # one of ours has just ended
            found += "gloo" in (task / "comm").read_text()
    return found


def note_threads(path: Path) -> None:
    """Threads of gloo and of private groups after the last run, and those that are left at the very end."""
    private = sum(thread.name.startswith(("dualparal-send", "dualparal-receive")) for thread in threading.enumerate())
    with open(path, "a") as file:
        file.write(f"{gloo_threads()} {private} ")


def drain_and_tell(heartbeat: Heartbeat, phase: str, **where: Any) -> None:
    heartbeat.phase(phase, **where)
    torch.cuda.synchronize()


def interrupt_and_tell(heartbeat: Heartbeat, at: int, phase: str, **where: Any) -> None:
    """Interrupts the run before a unit of block ``at`` runs on stage 0, and so between that and its message."""
    heartbeat.phase(phase, **where)
    if phase == "run" and where["block"] == at and os.environ["RANK"] == "0":
        engines[0].interrupt()


engines: list[Engine] = []  # alive when Python ends


def main(path: Path) -> None:
    torch.set_num_threads(1)
    forbid_collectives()
    heartbeat = Heartbeat.from_env()
    cases = json.loads((path / "cases.json").read_text())
    try:
        for index, case in enumerate(cases):
            options = dict(case["options"])
            options["attention_8bit"] = EightBitPolicy(**case.get("eight_bit", {}))
            device = case.get("device", "cpu")
            report = partial(drain_and_tell, heartbeat) if case.get("drains") else heartbeat.phase
            if "interrupt_at" in case:
                report = partial(interrupt_and_tell, heartbeat, case["interrupt_at"])
            engine = Engine.from_pretrained(case["model"], device=device, report=report, **options)
            engines[:] = [engine]
            if index == 1:  # all is imported: engines collect garbage, and need not look at that
                gc.collect()  # what is frozen as garbage stays: the edges of the first engine, with gloo's threads
                gc.freeze()
            rank = engine.mesh.rank
            if rank == case.get("differs"):
                mode, blocks = EightBitPolicy("int8"), BlockConfig(context="prior")
                other = replace(engine.config, blocks=blocks, dtype="bfloat16", attention_8bit=mode)
                engine.setup = replace(engine.setup, config=other)
            made = run(engine, case, rank)
            if rank == 0:
                assert made is not None
                save_file(made, path / f"{index}.safetensors")
            else:
                assert made is None, "only rank 0 gets frames"
    except PeerLost as error:
        heartbeat.error(error, peer=True)
        sys.exit(3)
    except Exception as error:
        heartbeat.error(error)
        sys.exit(3)
    heartbeat.done()


if __name__ == "__main__":
    if sys.platform == "linux":
        threads = Path(sys.argv[1]) / f"threads-{os.environ['RANK']}.txt"
        atexit.register(note_threads, threads)  # before the engine registers its own, so it runs after that
        main(Path(sys.argv[1]))
        note_threads(threads)
    else:
        main(Path(sys.argv[1]))
