"""What a snapshot costs: bytes and seconds at Wan's sizes, for each policy, with random data of the real shapes.

    python bench/bench_snapshot.py [--only 480p | --only share]

taken      seconds in which the run waits: references to tensors are taken, nothing is copied
written    seconds of the thread beside it: serialised, its checksum taken, synced, renamed
read       seconds until a run can go on: read, checksum, tensors
every      the least time between two snapshots with which writing takes 2 % of the run (the default's rule)
share      how much longer a whole run takes with snapshots at the default interval: the model of the package, with and
           without in turn, on the CPU, where writing competes with computing
features   GB of keys and values that blocks in flight of Wan2.1-1.3B (bfloat16, guidance) leave behind for each other,
           which a snapshot would have to hold without refreshes
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from harness.options import parser
from harness.record import record

from dualparal.checkpoint import snapshot
from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.checkpoint.snapshot import Snapshot
from dualparal.config.blocks import BlockConfig
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.engine.engine import Engine
from dualparal.models.registry import BUILT_IN
from dualparal.models.wan.sizes import MODELS
from dualparal.planning.workload import Workload
from dualparal.sampling.state import BlockState

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
STEPS = 50
CASES = {
    "paper": BlockConfig(context="paper"),
    "cached": BlockConfig(refresh_every=25),
    "cached K=8 newest": BlockConfig(max_blocks_in_flight=8, context_version="newest", refresh_every=25),
    "prior": BlockConfig(context="prior", refresh_every=25),
}


def states(height: int, width: int, blocks: range) -> dict[int, BlockState]:
    def tensor() -> torch.Tensor:
        return torch.randn(1, 16, 8, height // 8, width // 8)

    def state() -> BlockState:
        outputs = [tensor(), tensor()]
        memory = {"model_outputs": outputs, "timestep_list": [None, None], "last_sample": tensor(), "this_order": 2}
        return BlockState(tensor(), {**memory, "lower_order_nums": 2, "_step_index": 7})

    return {block: state() for block in blocks}


def feature_bytes(work: Workload) -> int:
    schedule = work.schedule(1)
    model, lent = work.model, work.blocks.context_frames * work.tokens
    kept = schedule.slots("tail") * schedule.branches
    return kept * model.num_layers * lent * 2 * model.inner * work.itemsize


def share(repeats: int) -> float:
    """Seconds of runs with snapshots over those without, less 1: the shortest of each."""
    engine = Engine.from_pretrained(BUILT_IN, device="cpu", refresh_every=10)
    call = {"num_frames": 637, "num_inference_steps": 20, "output_type": "uint8"}
    best = {True: float("inf"), False: float("inf")}
    for _ in range(repeats):
        for kept in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = Checkpoint(Path(folder) / "kept") if kept else None
                begin = time.perf_counter()
                for _ in engine.stream(
                    "a red circle drifting left on a dark background", checkpoint=checkpoint, **call
                ):
                    pass
                best[kept] = min(best[kept], time.perf_counter() - begin)
                print(f"{'with' if kept else 'without'} snapshots: {best[kept]:.1f} s at best", flush=True)
    return best[True] / best[False] - 1


def main() -> None:
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = arguments.parse_args()
    rows: list[dict[str, object]] = []
    for size, (height, width) in SIZES.items():
        for name, blocks in CASES.items():
            case = f"{size} {name}"
            if options.only not in case:
                continue
            video = VideoConfig(height, width, 1025, STEPS)
            work = Workload(MODELS["wan2.1-t2v-1.3b"], video, EngineConfig(blocks))
            in_flight = work.schedule(1).in_flight(STEPS - 1)
            live = states(height, width, in_flight)
            prompts = [{0: torch.randn(2, 512, 4096, dtype=torch.bfloat16)}]
            taken, written, read = [], [], []
            folder = Path(tempfile.mkdtemp(prefix="snapshot-", dir=options.folder))
            try:
                for number in range(options.repeats):
                    begin = time.perf_counter()
                    found = Snapshot(
                        number, {}, prompts, [{b: BlockState(*s.__dict__.values()) for b, s in live.items()}]
                    )
                    taken.append(time.perf_counter() - begin)
                    begin = time.perf_counter()
                    path = found.write(folder)
                    written.append(time.perf_counter() - begin)
                    begin = time.perf_counter()
                    snapshot.read(path)
                    read.append(time.perf_counter() - begin)
                megabytes = path.stat().st_size / 1e6
            finally:
                shutil.rmtree(folder)
            row = {
                "case": case,
                "blocks": len(in_flight),
                "megabytes": round(megabytes, 1),
                "taken_ms": round(1e3 * statistics.median(taken), 2),
                "written_s": round(statistics.median(written), 2),
                "read_s": round(statistics.median(read), 2),
                "every_s": round(50 * statistics.median(written)),
                "features_gb": round(feature_bytes(work) / 1e9, 1),
            }
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
    if not options.no_record:
        record("snapshot", rows, "cpu")
    if options.only in "share":
        torch.set_num_threads(2)
        row = {"model": BUILT_IN, "share_percent": round(100 * share(options.repeats), 2)}
        print(", ".join(f"{key} {value}" for key, value in row.items()))
        if not options.no_record:
            record("snapshot_share", [row], "cpu")


if __name__ == "__main__":
    main()
