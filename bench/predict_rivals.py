"""Prediction: 1,025 frames on eight RTX 4090, our three context policies beside what else could be done. No GPU.

    python bench/predict_rivals.py                       # the tables of docs/plan.md

All rows use the same rates of the card and the same fused kernels, so that ratios speak of the method alone. Rivals
over the whole video attend to all of it at once, as stock Wan does. For them:

* Ulysses: four all-to-alls per layer, none overlapped; heads are padded to a multiple of the cards, or, so that nothing
  is padded, half of the cards take each guidance branch, or pairs of cards form rings (without guidance).
* Ring: keys and values go round N - 1 times per layer, and what attention takes longer hides them.
* Every card holds the whole transformer; activations and keys of 1/N of the tokens.
* The VAE decodes on one card, after everything (ours: where it is done soonest; see predict_decoders.py).
* Links run at full speed although all cards use them at once, which favours the rivals.

Clips: every card makes clips of 81 frames on its own, one after the other, as the model was trained and as few-step
engines do. Their seconds are those of a supply without end, 1,025 frames of it; no clip goes on from another.
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
from dualparal.planning.search import EARLY_BLOCKS
from dualparal.planning.workload import Workload

CARDS = 8
FRAMES, CLIP = 1025, 81
GUIDANCE = {50: 5.0, 4: 1.0}  # by steps: few-step weights run without


class Split(NamedTuple):
    """Cards over which a rival spreads the heads, rings of keys, and the branches of guidance."""

    heads: int = 1
    ring: int = 1
    guidance: int = 1


class Row(NamedTuple):
    """seconds: with decoding. first: seconds to the first frame. memory: bytes of the first and of another card while
    the transformer runs (the text encoder's time is over). note: what is special."""

    name: str
    seconds: float
    first: float
    memory: tuple[int, int]
    bubble: float | None
    note: str


def whole_video(work: Workload, name: str, over: Split, link: str, card: str) -> Row:
    """Sequence parallelism over the whole video."""
    model, rates, wire = work.model, device(card), LINKS[link]
    frames = work.layout.num_latents or 0
    tokens, h = frames * work.tokens, model.inner
    own = tokens / (over.heads * over.ring)
    layer = layer_arithmetic(work, tokens, tokens)
    padded = -(-model.heads // over.heads) * over.heads / model.heads
    shares = over.heads * over.ring * rates.efficiency.fused
    attention = layer.attention * padded / shares / rates.attention
    rest = (layer.linear / rates.linear + layer.moved / rates.copy) / shares
    exchanged = 4 * own * h * work.itemsize * padded * (over.heads - 1) / over.heads / wire.bandwidth
    rounds = 2 * own * h * work.itemsize * padded * (over.ring - 1) / wire.bandwidth
    busy = max(attention, rounds) + rest + exchanged
    branches = (2 if work.video.guidance else 1) // over.guidance
    denoise = busy * model.num_layers * work.video.num_inference_steps * branches
    decode = frames * model.vae.flops(work.pixels) / rates.conv
    buffers = (8 * padded if over.heads > 1 else 0) + (4 if over.ring > 1 else 0)
    memory = _memory(work, own, int(own * h * work.itemsize * buffers))
    note = "" if memory[1] <= rates.usable else f"does not fit {rates.usable / GIB:.0f} GiB"
    return Row(name, denoise + decode, denoise + decode, memory, None, note)


def _memory(work: Workload, own: float, exchanged: int) -> tuple[int, int]:
    """Bytes of the first and of another card that hold the whole transformer and ``own`` tokens."""
    model, frames = work.model, work.layout.num_latents or 0
    weights = model.parameters * work.itemsize * model.experts
    activations = int(own * (9 * model.inner + 2 * model.ffn_dim) * work.itemsize)
    latents = 4 * 4 * frames * model.in_channels * work.pixels
    running = weights + activations + exchanged + latents
    return max(running, weights + latents + decode_bytes(work)), running


def clips(work: Workload, cards: int, card: str) -> Row:
    """Independent clips of 81 frames on every card, each with the VAE beside it."""
    one, rates = replace(work, video=replace(work.video, num_frames=CLIP)), device(card)
    frames = one.layout.num_latents or 0
    tokens, branches = frames * one.tokens, 2 if one.video.guidance else 1
    layer = layer_arithmetic(one, tokens, tokens).in_a_run(rates)
    denoise = layer * one.model.num_layers * one.video.num_inference_steps * branches
    seconds = denoise + frames * one.model.vae.flops(one.pixels) / rates.conv
    memory = _memory(one, tokens, 0)
    count = -(-FRAMES // CLIP)
    note = f"no continuity: {count} clips take {-(-count // cards) * seconds:,.0f} s"
    if memory[0] > rates.usable:
        note = f"does not fit {rates.usable / GIB:.0f} GiB"
    name = f"clips of {CLIP} frames, " + ("one card" if cards == 1 else f"one on each of {cards} cards")
    return Row(name, FRAMES / CLIP * seconds / cards, seconds, memory, None, note)


def in_blocks(work: Workload, gpus: str, name: str) -> Row:
    """Ours, with all but the blocks left to the planner: split by cost, and who decodes."""
    try:
        found = plan_for(work, parse_gpus(gpus), search_decoders=True)
        note = ", ".join(filter(None, (found.note, f"VAE on {found.decode}")))
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


def rows(model: str, context_frames: int, steps: int, card: str, link: str) -> Iterator[Row]:
    video = VideoConfig(num_frames=FRAMES, num_inference_steps=steps, guidance_scale=GUIDANCE[steps])
    work = Workload(MODELS[model], video, EngineConfig(BlockConfig(8, context_frames)))
    yield whole_video(work, "one card, whole video", Split(), link, card)
    yield whole_video(work, f"Ring over {CARDS} cards, whole video", Split(ring=CARDS), link, card)
    yield whole_video(work, f"Ulysses over {CARDS} cards, whole video", Split(heads=CARDS), link, card)
    if video.guidance:
        fair = Split(heads=CARDS // 2, guidance=2)
        yield whole_video(
            work, f"Ulysses over {CARDS // 2} cards for each guidance branch, whole video", fair, link, card
        )
    else:
        fair = Split(heads=CARDS // 2, ring=2)
        yield whole_video(work, f"Ulysses over {CARDS // 2} cards x Ring over 2, whole video", fair, link, card)
    yield clips(work, 1, card)
    yield clips(work, CARDS, card)
    prior = replace(work, engine=EngineConfig(BlockConfig(8, context_frames, "prior")))
    yield in_blocks(prior, f"1x{card}", "`prior`, one card")
    for context in ("paper", "cached", "prior"):
        policy = replace(work, engine=EngineConfig(BlockConfig(8, context_frames, context)))  # type: ignore[arg-type]
        yield in_blocks(policy, f"{CARDS}x{card}", f"`{context}`, {CARDS} cards")
    if steps > EARLY_BLOCKS:
        early = replace(work, engine=EngineConfig(BlockConfig(8, context_frames, "cached", EARLY_BLOCKS, "newest")))
        yield in_blocks(early, f"{CARDS}x{card}", f"`cached`, {CARDS} cards, K = {EARLY_BLOCKS}")


def table(model: str, context_frames: int, steps: int, card: str, link: str) -> str:
    found = list(rows(model, context_frames, steps, card, link))
    ring = next(row for row in found if row.name.startswith("Ring"))
    guidance = "guidance" if GUIDANCE[steps] > 1 else "no guidance"
    lines = [
        f"{model}, 480p, {steps} steps, {guidance}, B = 8, C = {context_frames}, {CARDS} x {card}, {link}: predictions",
        "",
        "| | seconds | frames/s | against ring | first frame, s | bubble | GiB, first card | GiB, other cards | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row.seconds != row.seconds:
            lines.append(f"| {row.name} | | | | | | | | {row.note} |")
            continue
        bubble = "" if row.bubble is None else f"{100 * row.bubble:.0f} %"
        first, other = (f"{size / GIB:.1f}" for size in row.memory)
        lines.append(
            f"| {row.name} | {row.seconds:,.0f} | {FRAMES / row.seconds:.2f} | {ring.seconds / row.seconds:.2f}x | "
            f"{row.first:,.0f} | {bubble} | {first} | {other} | {row.note} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="rtx4090")
    parser.add_argument("--link", default="pcie4-host")
    options = parser.parse_args()
    tables = [
        table(model, context_frames, steps, options.card, options.link)
        for steps, contexts in ((50, (8, 4)), (4, (4,)))
        for model in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b")
        for context_frames in contexts
    ]
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
