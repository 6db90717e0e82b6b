"""What ranks that decode, and decoding in place, are worth, with layers and decoders that only take time. CPU.

    python bench/bench_decode.py                # a minute or two: four processes of this machine

The engine, the schedule, the sampler and the gloo transport are real; a unit is a sleep of --model-ms / N on each stage
and a latent frame a sleep in every part of its decoder, so there may be more processes than cores, and the bench says
nothing about computing. T = 4 without guidance, and on one process decoding takes --ratio times as long as denoising.
Side by side, for the same video on four processes:

beside     four stages, and stage 0's rank decodes
D ranks    4 - D stages, and D ranks that decode a part of the rows each
in place   four stages, each of which decodes a fourth of the rows; sleeps share no core, so this is the bound of it
schedule   what ``schedule.simulate`` says of each

Of --repeats runs the fastest counts: it is the least disturbed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from harness.options import parser
from harness.ranks import as_rank, in_processes
from harness.record import record
from harness.synthetic import embeds, sleeping_decoders, synthetic_engine

from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.schedule.replay import Costs
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.simulate import simulate

RANKS, STEPS, OWN = 4, 4, 8


class Mode(NamedTuple):
    """Who decodes: ``Schedule.decode_ranks`` and ``Schedule.decode_in_place``."""

    name: str
    decode_ranks: int = 0
    in_place: bool = False

    @property
    def parts(self) -> int:
        return RANKS if self.in_place else max(1, self.decode_ranks)


MODES = [Mode("beside"), Mode("1 rank", 1), Mode("2 ranks", 2), Mode("in place", in_place=True)]


def work(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """A run with one mode in these processes."""
    engine = synthetic_engine(
        job["model"],
        job["model_seconds"] / (RANKS - job["decode_ranks"]),
        decode_ranks=job["decode_ranks"],
        decode_in_place=job["in_place"],
    )
    sleeping_decoders(engine, job["latent_seconds"])
    call = {**embeds(engine), "height": 32, "width": 32, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    for _ in range(job["repeats"]):
        for _chunk in engine.stream(**call, num_frames=job["frames"], output_type="uint8"):
            pass
        if engine.stats is not None:
            tell({"seconds": engine.stats.seconds, "first": engine.stats.first_frame})


def ideal(mode: Mode, blocks: int, model_seconds: float, latent_seconds: float) -> float:
    """Seconds of the schedule."""
    stages = RANKS - mode.decode_ranks
    schedule = Schedule(
        stages, STEPS, blocks, guidance=False, decode_ranks=mode.decode_ranks, decode_in_place=mode.in_place
    )
    costs = Costs(
        run=lambda stage, unit: model_seconds / stages, decode=lambda block: OWN * latent_seconds / mode.parts
    )
    return simulate(schedule, costs).seconds


def main() -> None:
    if as_rank(work):
        return
    options = parser(__doc__, repeats=3)
    options.add_argument("--model-ms", type=float, default=80.0, help="of a unit through all stages")
    options.add_argument(
        "--ratio", type=float, default=3.0, help="seconds of decoding over those of denoising, each on one process"
    )
    options.add_argument("--blocks", type=int, default=12)
    arguments = options.parse_args()
    modes = [mode for mode in MODES if arguments.only in mode.name]
    if not modes:
        options.error(f"--only {arguments.only!r}: no mode has this in its name: {', '.join(m.name for m in MODES)}")
    model_seconds, blocks = arguments.model_ms / 1e3, arguments.blocks
    latent_seconds = arguments.ratio * STEPS * model_seconds / OWN
    with tempfile.TemporaryDirectory() as folder:
        model = str(build_tiny_pipeline(Path(folder) / "tiny", layers=RANKS))
        rows: list[dict[str, object]] = []
        for mode in modes:
            job = {
                "model": model, "model_seconds": model_seconds, "latent_seconds": latent_seconds,
                "decode_ranks": mode.decode_ranks, "in_place": mode.in_place,
                "frames": 4 * (OWN * blocks - 1) + 1, "repeats": arguments.repeats,
            }  # fmt: skip
            best = min(in_processes(__file__, RANKS, job), key=lambda run: run["seconds"])
            schedule = ideal(mode, blocks, model_seconds, latent_seconds)
            row: dict[str, object] = {
                "mode": mode.name, "ranks": RANKS, "stages": RANKS - mode.decode_ranks, "steps": STEPS,
                "blocks": blocks, "ratio": arguments.ratio, "unit_ms": round(1e3 * model_seconds / RANKS, 3),
                "seconds": round(best["seconds"], 3), "first_s": round(best["first"], 3),
                "schedule_s": round(schedule, 3), "excess": round(best["seconds"] / schedule - 1, 4),
            }  # fmt: skip
            rows.append(row)
            first = rows[0]["seconds"]
            row[f"times_{modes[0].name.replace(' ', '_')}"] = round(first / best["seconds"], 3)  # type: ignore[operator]
            print(f"decode {mode.name:9s} {best['seconds']:7.2f} s, first frames {best['first']:6.2f} s | schedule "
                  f"{schedule:7.2f} s, excess {100 * (best['seconds'] / schedule - 1):.1f} % | "
                  f"{first / best['seconds']:.2f}x {modes[0].name}", flush=True)  # type: ignore[operator]  # fmt: skip
        if not arguments.no_record:
            record("decode", rows, "cpu")


if __name__ == "__main__":
    main()
