"""Thousands of blocks in one run, on the tiny model: does memory grow, do files stay open?

    python bench/soak.py --blocks 5000 [--stages 2] [--checkpoint]

Every rank reports its resident size and open files every hundred blocks (``dualparal.trace`` knows the peak only). The
slope is the least-squares line through what follows the first tenth. Exit code 1 at 1 MiB per 1,000 blocks or more, or
when the number of open files changes.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from harness.options import parser
from harness.ranks import as_rank, in_processes
from harness.record import record

from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline

EVERY = 100  # blocks
OPTIONS = {"frames_per_block": 2, "context_frames": 1, "device": "cpu", "refresh_every": 8}
CALL = {"height": 32, "width": 32, "num_frames": None, "num_inference_steps": 2, "guidance_scale": 1.0}


def rank(case: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Runs so many blocks of an endless video; leaves [blocks, bytes, open files] in a file of this rank's."""
    seen: list[list[int]] = []
    own = psutil.Process()
    done = 0

    def watch(phase: str, *, block: int, step: int, **_: Any) -> None:
        nonlocal done
        if block > done and block % EVERY == 0 and phase == "run":
            done = block
            gc.collect()
            seen.append([block, own.memory_info().rss, own.num_fds()])

    engine = Engine.from_pretrained(case["model"], report=watch, context=case["context"], **OPTIONS)
    spec = engine.source.spec
    rows = torch.randn(1, 16, spec.text_dim, generator=torch.Generator().manual_seed(0))
    checkpoint = Checkpoint(Path(case["folder"]) / "kept", every=8) if case["checkpoint"] else None
    for chunk in engine.stream(prompt_embeds=rows, output_type="uint8", checkpoint=checkpoint, **CALL):
        if chunk.block + 1 >= case["blocks"]:
            engine.interrupt()
    (Path(case["folder"]) / f"rank-{engine.mesh.rank}.json").write_text(json.dumps(seen))
    tell({"ended": True})


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--blocks", type=int, default=5000)
    arguments.add_argument("--stages", type=int, default=2)
    arguments.add_argument("--context", default="cached")
    arguments.add_argument("--checkpoint", action="store_true")
    options = arguments.parse_args()
    bad = False
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        model = build_tiny_pipeline(Path(folder) / "model", layers=options.stages)
        case = {"model": str(model), "folder": folder, **vars(options)}
        in_processes(__file__, options.stages, case)
        for number in range(options.stages):
            series = np.array(json.loads((Path(folder) / f"rank-{number}.json").read_text()), dtype=float)
            series = series[len(series) // 10 :]
            slope = np.polyfit(series[:, 0] / 1000, series[:, 1] / 2**20, 1)[0]
            # A snapshot that is just being written has a file open.
            files = [int(half[:, 2].min()) for half in np.array_split(series, 2)]
            bad |= slope >= 1 or files[0] != files[1]
            row = {
                "case": f"{options.context}{' checkpoint' if options.checkpoint else ''}",
                "rank": number,
                "blocks": int(series[-1, 0]),
                "slope_mib_per_1000": round(float(slope), 3),
                "resident_mib": round(float(series[-1, 1]) / 2**20),
                "open_files": "/".join(map(str, files)),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    if not options.no_record:
        record("soak", rows, "cpu")
    return int(bad)


if __name__ == "__main__":
    if not as_rank(rank):
        sys.exit(main())
