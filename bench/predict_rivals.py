"""Prediction: 1,025 frames on eight RTX 4090, our three context policies beside what else could be done. No GPU.

    python bench/predict_rivals.py                       # the tables of docs/plan.md

All rows use the same rates of the card and the same fused kernels, so that ratios speak of the method alone. Rivals
attend over the whole video at once, as stock Wan does. For them:

* Ulysses: four all-to-alls per layer, none overlapped; heads are padded to a multiple of the cards.
* Ring: keys and values go round N - 1 times per layer, and what attention takes longer hides them.
* Every card holds the whole transformer; activations and keys of 1/N of the tokens.
* The VAE decodes on one card, after everything (ours: beside the units of stage 0).
* Links run at full speed although all cards use them at once, which favours the rivals.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from dualparal.config.blocks import BlockConfig
from dualparal.config.engine import EngineConfig
from dualparal.config.units import GIB
from dualparal.config.video import VideoConfig
from dualparal.models.wan.sizes import MODELS
from dualparal.planning.cost import layer_arithmetic
from dualparal.planning.devices import LINKS, device, parse_gpus
from dualparal.planning.memory import decode_bytes
from dualparal.planning.plan import NoPlan
from dualparal.planning.planner import plan_for
from dualparal.planning.workload import Workload

CARDS = 8


class Row(NamedTuple):
    """seconds: with decoding. first: seconds to the first frame. memory: bytes of the first and of another card while
    the transformer runs (the text encoder's time is over). note: what is special."""

    name: str
    seconds: float
    first: float
    memory: tuple[int, int]
    bubble: float | None
    note: str


def whole_video(work: Workload, cards: int, kind: str, link: str, card: str) -> Row:
    """Sequence parallelism over the whole video (cards = 1: none)."""
    model, rates, wire = work.model, device(card), LINKS[link]
    frames = work.layout.num_latents or 0
    tokens, h = frames * work.tokens, model.inner
    own = tokens / cards
    layer = layer_arithmetic(work, tokens, tokens)
    padded = 1.0
    if kind == "Ulysses":
        padded = -(-model.heads // cards) * cards / model.heads
    attention = layer.attention * padded / cards / rates.attention
    rest = layer.linear / cards / rates.linear + layer.moved / cards / rates.copy
    shipped = {
        "Ulysses": 4 * own * h * work.itemsize * padded * (cards - 1) / cards,
        "Ring": 2 * own * h * work.itemsize * (cards - 1),
        "one card": 0.0,
    }[kind] / wire.bandwidth
    busy = max(attention, shipped) + rest if kind == "Ring" else attention + rest + shipped
    branches = 2 if work.video.guidance else 1
    denoise = busy * model.num_layers * work.video.num_inference_steps * branches
    decode = frames * model.vae.flops(work.pixels) / rates.conv
    weights = model.parameters * work.itemsize * model.experts
    activations = int(own * (9 * h + 2 * model.ffn_dim) * work.itemsize)
    exchanged = int(own * h * work.itemsize * {"Ulysses": 8 * padded, "Ring": 4, "one card": 0}[kind])
    latents = 4 * 4 * frames * model.in_channels * work.pixels
    running = weights + activations + exchanged + latents
    vae = decode_bytes(work)
    fits = running <= rates.usable
    note = "" if fits else f"does not fit {rates.usable / GIB:.0f} GiB"
    name = f"{kind}, whole video" if cards == 1 else f"{kind} over {cards} cards, whole video"
    return Row(name, denoise + decode, denoise + decode, (max(running, weights + latents + vae), running), None, note)


def in_blocks(work: Workload, gpus: str, name: str) -> Row:
    """Ours, with the engine's even handling left to the planner: split by cost, VAE beside stage 0."""
    try:
        found = plan_for(work, parse_gpus(gpus))
        note = found.note
    except NoPlan as error:
        if error.nearest is None:
            return Row(name, float("nan"), float("nan"), (0, 0), None, str(error).split(":")[0])
        return Row(name, float("nan"), float("nan"), (0, 0), None, "does not fit")
    found = replace(found, replay=True)
    limit = found.work.blocks.max_blocks_in_flight
    name += "" if limit is None or work.blocks.max_blocks_in_flight else f", K = {limit}"
    memory = [m.running for m in found.memory]
    return Row(
        name, found.seconds, found.first_frame, (memory[0], max(memory[1:], default=memory[0])), found.bubble, note
    )


def rows(model: str, context_frames: int, card: str, link: str) -> Iterator[Row]:
    work = Workload(MODELS[model], VideoConfig(num_frames=1025), EngineConfig(BlockConfig(8, context_frames)))
    yield whole_video(work, 1, "one card", link, card)
    yield whole_video(work, CARDS, "Ring", link, card)
    yield whole_video(work, CARDS, "Ulysses", link, card)
    prior = replace(work, engine=EngineConfig(BlockConfig(8, context_frames, "prior")))
    yield in_blocks(prior, f"1x{card}", "`prior`, one card")
    for context in ("paper", "cached", "prior"):
        policy = replace(work, engine=EngineConfig(BlockConfig(8, context_frames, context)))  # type: ignore[arg-type]
        yield in_blocks(policy, f"{CARDS}x{card}", f"`{context}`, {CARDS} cards")
    early = replace(work, engine=EngineConfig(BlockConfig(8, context_frames, "cached", 6, "newest")))
    yield in_blocks(early, f"{CARDS}x{card}", f"`cached`, {CARDS} cards, K = 6")


def table(model: str, context_frames: int, card: str, link: str) -> str:
    found = list(rows(model, context_frames, card, link))
    ring = next(row for row in found if row.name.startswith("Ring"))
    lines = [
        f"{model}, 480p, 50 steps, guidance, B = 8, C = {context_frames}, {CARDS} x {card}, {link}: predictions",
        "",
        "| | seconds | against ring | first frame, s | bubble | GiB, first card | GiB, other cards | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row.seconds != row.seconds:
            lines.append(f"| {row.name} | | | | | | | {row.note} |")
            continue
        bubble = "" if row.bubble is None else f"{100 * row.bubble:.0f} %"
        first, other = (f"{size / GIB:.1f}" for size in row.memory)
        lines.append(
            f"| {row.name} | {row.seconds:,.0f} | {ring.seconds / row.seconds:.2f}x | {row.first:,.0f} | {bubble} | "
            f"{first} | {other} | {row.note} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="rtx4090")
    parser.add_argument("--link", default="pcie4-host")
    options = parser.parse_args()
    tables = [
        table(model, context_frames, options.card, options.link)
        for model in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b")
        for context_frames in (8, 4)
    ]
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
