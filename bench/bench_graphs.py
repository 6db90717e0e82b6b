"""Captured against eager stage steps on one GPU, where tokens are few and the host is the limit.

python bench/bench_graphs.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from record import record

from dualparal.engine import Engine
from dualparal.tiny import build_tiny_pipeline

REPEATS = 5


def seconds(model: Path, height: int, stages: int, graphs: bool) -> float:
    """Of one run after one that captures; 6 blocks of 8 frames, 20 steps, guidance."""
    engine = Engine.from_pretrained(model, device="cuda", stages=stages, graphs=graphs)
    zero = torch.zeros(1, 64, engine.source.spec.text_dim)
    call = {"height": height, "width": height, "num_frames": 4 * 47 + 1, "num_inference_steps": 20}
    found = []
    for _ in range(REPEATS):
        for _chunk in engine.stream(
            prompt_embeds=zero, negative_prompt_embeds=zero, output_type="latent", **call
        ):  # fmt: skip
            pass
        torch.cuda.synchronize()
        assert engine.stats is not None
        found.append(engine.stats.seconds)
    # A run makes its own stages and captures anew; the best of several is the least disturbed.
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny_pipeline(Path(folder) / "model", layers=30, heads=12, head_dim=128, ffn_dim=8960)
        for height in (64, 128, 256):
            for stages in (1, 4):
                eager, captured = (seconds(model, height, stages, graphs) for graphs in (False, True))
                rows.append({"pixels": height, "stages": stages, "eager_s": round(eager, 3),
                             "captured_s": round(captured, 3), "ratio": round(eager / captured, 3)})  # fmt: skip
                print(f"graphs {height:4d}x{height} {stages} stages: eager {eager:.3f} s, captured {captured:.3f} s, "
                      f"{eager / captured:.2f}x", flush=True)  # fmt: skip
    if not arguments.no_record:
        record("graphs", rows)


if __name__ == "__main__":
    main()
