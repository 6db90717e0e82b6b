"""Prediction: who decodes 1,025 frames on eight cards, and what is left above the best of it. No GPU.

    python bench/predict_decoders.py                     # the tables of docs/plan.md

Every number is a replay of the schedule that the engine walks. The second table holds the fastest way against two
bounds, for what is not built:

* A boundary between stages that moves: whole layers change their stage, so that at no moment units go faster than the
  fullest stage of an even split. At least: a run without any decoding, or the next bound if that is later.
* Help with attention: heads of a layer go to cards with nothing to do, as if any work could be halved and moved for
  nothing. At least: all work over all cards, and what they idle before the first block is finished, when nothing is to
  be decoded yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from dualparal.config.blocks import BlockConfig
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.models.wan.sizes import MODELS
from dualparal.planning.devices import links, parse_gpus
from dualparal.planning.plan import Cards, Plan
from dualparal.planning.search import EARLY_BLOCKS, Search, with_decoders
from dualparal.planning.workload import Workload
from dualparal.schedule.actions import Op, Unit
from dualparal.schedule.replay import Costs
from dualparal.schedule.simulate import simulate

CARDS, FRAMES = 8, 1025
DTYPES = ("float32", "bfloat16")


class Task(NamedTuple):
    """guidance_scale: 1: none. limit: on the blocks in flight."""

    name: str
    steps: int
    guidance_scale: float
    limit: int | None = None


TASKS = (
    Task("T = 50", 50, 5.0),
    Task(f"T = 50, K = {EARLY_BLOCKS}", 50, 5.0, EARLY_BLOCKS),
    Task("T = 4, no guidance", 4, 1.0),
)


def workload(task: Task, vae_dtype: str, output_type: str = "np") -> Workload:
    version = "matching" if task.limit is None else "newest"
    blocks = BlockConfig(8, 4, "cached", task.limit, version)
    video = VideoConfig(
        num_frames=FRAMES,
        num_inference_steps=task.steps,
        guidance_scale=task.guidance_scale,
        output_type=output_type,  # type: ignore[arg-type]
    )
    return Workload(MODELS["wan2.1-t2v-1.3b"], video, EngineConfig(blocks, vae_dtype=vae_dtype))


def ways(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Yields every way to decode, with its name."""
    yield "beside stage 0", work
    for ranks in range(1, CARDS):
        stages = CARDS - ranks
        name = f"{stages} stage{'s' if stages > 1 else ''} + {ranks} that decode{'s' if ranks == 1 else ''}"
        yield name, with_decoders(work, ranks)
    yield "in place, on every stage's card", with_decoders(work, in_place=True)


def replayed(work: Workload, card: str) -> Plan:
    """The plan of a workload, who decodes being given."""
    groups = parse_gpus(f"{CARDS}x{card}")
    cards = Cards(tuple(groups[0]), tuple(links(groups)), tuple(each.usable for each in groups[0]))
    found = Search(cards, None).best(work)
    assert found is not None, "it fits"
    return replace(found, replay=True)


def tables(card: str) -> str:
    """Markdown: seconds of every way, and the best of them against the bounds."""
    plans = {
        (task, dtype): {name: replayed(way, card) for name, way in ways(workload(task, dtype))}
        for task in TASKS
        for dtype in DTYPES
    }
    lines = [
        f"wan2.1-t2v-1.3b, 480p, {FRAMES:,} frames, `cached`, B = 8, C = 4, {CARDS} x {card}: predicted seconds with a "
        f"VAE in {' / '.join(DTYPES)}, first frames in {DTYPES[0]}, GiB while units run",
        "",
        "| | " + " | ".join(f"{task.name} | first | stage 0 | others" for task in TASKS) + " |",
        "|---|" + "---|" * 4 * len(TASKS),
    ]
    for name in plans[TASKS[0], DTYPES[0]]:
        cells = []
        for task in TASKS:
            found = plans[task, DTYPES[0]][name]
            seconds = [plans[task, dtype][name].seconds for dtype in DTYPES]
            sizes = [memory.running / 2**30 for memory in found.memory]
            both = " / ".join(f"{each:,.0f}" if each >= 10 else f"{each:.1f}" for each in seconds)
            first = f"{found.first_frame:.0f}" if found.first_frame >= 10 else f"{found.first_frame:.1f}"
            cells += [both, first, f"{sizes[0]:.1f}", f"{max(sizes[1:]):.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *_bounds(card, plans)]
    return "\n".join(lines)


def _bounds(card: str, plans: dict[tuple[Task, str], dict[str, Plan]]) -> Iterator[str]:
    yield (
        "| | VAE in | fastest | seconds | no decoding | a boundary that moves, at least | gain, at most | help with "
        "attention, at least | gain, at most |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for (task, dtype), found in plans.items():
        name, best = min(found.items(), key=lambda each: each[1].seconds)
        alone = replayed(workload(task, dtype, "latent"), card)
        any_work = fluid(found["beside stage 0"], alone)
        layers = max(alone.seconds, any_work)
        cells = [task.name, dtype, name, best.seconds, alone.seconds, layers, 1 - layers / best.seconds, any_work]
        cells.append(1 - any_work / best.seconds)
        shown = [
            each if isinstance(each, str) else f"{100 * each:.0f} %" if number in (6, 8) else f"{each:.1f}"
            for number, each in enumerate(cells)
        ]
        yield f"| {' | '.join(shown)} |"


def fluid(decoding: Plan, alone: Plan) -> float:
    """Seconds at least, when any work can be shared by all cards.

    Args:
        decoding: a plan whose stage 0 decodes, for the seconds of that.
        alone: one without decoding, for those of units.
    """
    costing, blocks = alone.costing, decoding.schedule.num_blocks or 0

    def even(_: int, unit: Unit) -> float:
        return sum(costing.run(stage, unit) for stage in range(CARDS)) / CARDS

    run = simulate(alone.schedule, Costs(run=even, update=costing.costs.update))
    units = sum(even(0, unit) for unit in alone.schedule.units())
    first = min(event.end for event in run.events[0] if event.action.op is Op.EMIT)
    busy = sum(
        min(e.end, first) - e.start for own in run.events for e in own if e.action.op is Op.RUN and e.start < first
    )
    decode = sum(decoding.costing.decode(block) for block in range(blocks))
    return first - busy / CARDS + units + decode / CARDS


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("\n\n".join(tables(card) for card in ("rtx4090", "h100")))


if __name__ == "__main__":
    main()
