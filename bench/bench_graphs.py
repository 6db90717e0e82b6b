"""Captured against eager stage steps on one GPU, where tokens are few and the host is the limit.

    python bench/bench_graphs.py [--timeline captured.json.gz]

The timeline (Perfetto, chrome://tracing) is of a few blocks over two stages on one card, captured: the graphs of both,
the copies between them on their streams, and what the host does meanwhile.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from harness.options import parser
from harness.record import record

from dualparal.engine.engine import Engine
from dualparal.models.wan.tiny import build_tiny_pipeline


def run(engine: Engine, height: int, steps: int) -> float:
    """Seconds of 6 blocks of 8 frames with guidance."""
    zero = torch.zeros(1, 64, engine.source.spec.text_dim)
    call = {"height": height, "width": height, "num_frames": 4 * 47 + 1, "num_inference_steps": steps}
    for _ in engine.stream(prompt_embeds=zero, negative_prompt_embeds=zero, output_type="latent", **call):
        pass
    torch.cuda.synchronize()
    assert engine.stats is not None
    return engine.stats.seconds


def seconds(model: Path, height: int, stages: int, graphs: bool, repeats: int) -> float:
    engine = Engine.from_pretrained(model, device="cuda", stages=stages, graphs=graphs)
    found = [run(engine, height, 20) for _ in range(repeats)]
    # A run makes its own stages and captures anew, so the figure holds capturing too.
    return statistics.median(found)


def timeline(model: Path, path: Path) -> None:
    engine = Engine.from_pretrained(model, device="cuda", stages=2, graphs=True)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run(engine, 64, 4)
    profile.export_chrome_trace(str(path))


def main() -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--timeline", type=Path, help="write a trace there (.json or .json.gz)")
    arguments = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_pipeline(Path(folder) / "model", layers=30, heads=12, head_dim=128, ffn_dim=8960)
        for height, stages in ((height, stages) for height in (64, 128, 256) for stages in (1, 4)):
            if arguments.only in f"{height}x{height} {stages} stages":
                eager, captured = (
                    seconds(model, height, stages, graphs, arguments.repeats) for graphs in (False, True)
                )
                rows.append({"pixels": height, "stages": stages, "eager_s": round(eager, 3),
                             "captured_s": round(captured, 3), "ratio": round(eager / captured, 3)})  # fmt: skip
                print(f"graphs {height:4d}x{height} {stages} stages: eager {eager:.3f} s, captured {captured:.3f} s, "
                      f"{eager / captured:.2f}x", flush=True)  # fmt: skip
        if arguments.timeline is not None:
            timeline(model, arguments.timeline)
    if not arguments.no_record:
        record("graphs", rows)


if __name__ == "__main__":
    main()
