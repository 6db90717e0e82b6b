"""The command ``dualparal plan``: flags to ``planner.plan``, a plan to tables. No torch, no weights, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualparal.cli.block_flags import BlockFlags, ReuseFlags
from dualparal.cli.eight_bit_flags import EightBitFlags
from dualparal.cli.flags import parse_steps
from dualparal.config.blocks import DEFAULT_VERSION
from dualparal.config.decoding import AUTO
from dualparal.config.units import GIB
from dualparal.planning import planner
from dualparal.planning.devices import BY_MEMORY, Device
from dualparal.planning.plan import NoPlan, Plan


def _size(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """Height and width in pixels of "WIDTHxHEIGHT"; None: not given. Raises ValueError."""
    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdecimal() or not height.isdecimal():
        raise ValueError(f"--size {text!r}: use WIDTHxHEIGHT in pixels, such as 832x480")
    return int(height), int(width)


def _decoders(gpus: str, in_place: bool) -> dict[str, Any]:
    """The choice of who decodes, as options of ``planner.plan``; none: it is searched. Raises ValueError."""
    if gpus != AUTO and not gpus.isdecimal():
        raise ValueError(f"--decode-gpus {gpus!r}: use a number of cards, or {AUTO}")
    if in_place:
        return {"decode_in_place": True, "decode_ranks": 0 if gpus == AUTO else int(gpus)}
    return {} if gpus == AUTO else {"decode_ranks": int(gpus)}


def _places(cards: str) -> dict[str, Any]:
    """The cards of a stage as options of ``planner.plan``; none: they are searched. Raises ValueError."""
    if cards != AUTO and not cards.isdecimal():
        raise ValueError(f"--sequence-parallel {cards!r}: use a number of cards, or {AUTO}")
    return {} if cards == AUTO else {"sequence_parallel": int(cards)}


@dataclass(frozen=True)
class PlanFlags:
    """Video, model and cards"""

    gpus: Annotated[
        str, typer.Option(help="COUNTxCARD, such as 8x24GB, 8xrtx4090 or 4xa100-80gb,2xrtx4090; stages in this order.")
    ]
    model: Annotated[
        str,
        typer.Option(help="A name that 'dualparal models' lists, or a directory in diffusers format."),
    ] = "wan2.1-t2v-1.3b"
    transformer: Annotated[
        list[str] | None,
        typer.Option(help="FILE, weights in the transformer's place, as in 'generate'.", show_default=False),
    ] = None
    num_frames: Annotated[int, typer.Option(help="Length in frames: 1, 5, 9 ... (4k + 1).")] = 1025
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT in pixels. Default: the model's own, or 832x480.", show_default=False),
    ] = None
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            "--num-inference-steps",
            help="Denoising steps. Default: as many as --timesteps or --sigmas names, or the model's own, or 50.",
            show_default=False,
        ),
    ] = None
    timesteps: Annotated[
        str | None, typer.Option(help="The steps one by one, as in 'generate'; here their number counts.")
    ] = None
    sigmas: Annotated[str | None, typer.Option(help="The same as noise levels.")] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="1: no guidance, half the work. Default: the model's own, or 5.", show_default=False),
    ] = None
    vae_dtype: Annotated[
        str, typer.Option(help="Of the VAE: float32, bfloat16, float16, or auto, as in 'generate'.")
    ] = AUTO
    decoder: Annotated[
        str | None, typer.Option(help="A light decoder (.safetensors) in the VAE's place, as in 'generate'.")
    ] = None
    decode_gpus: Annotated[
        str,
        typer.Option(
            help="Cards, the last ones, that only decode, each a part of the rows; 0: none; auto: what is fastest, the "
            "stages' cards in place included."
        ),
    ] = AUTO
    decode_in_place: Annotated[bool, typer.Option(help="Every stage's card decodes a part beside its units.")] = False
    sequence_parallel: Annotated[
        str, typer.Option(help="Cards of each stage, as in 'generate'; auto: what is fastest.")
    ] = AUTO
    link: Annotated[
        str | None, typer.Option(help="Between cards: pcie4, nvlink4, 25gbe ... Default: the cards' own.")
    ] = None
    between: Annotated[str | None, typer.Option(help="The same between the groups of --gpus.")] = None
    memory_limit: Annotated[float | None, typer.Option(help="GiB per card that may be used.")] = None
    first_frame_limit: Annotated[
        float | None, typer.Option(help="Seconds after which the first frames must be there.")
    ] = None


GROUPS = (PlanFlags, BlockFlags, EightBitFlags, ReuseFlags)


def plan(
    call: typer.Context, flags: PlanFlags, blocks: BlockFlags, eight_bit: EightBitFlags, reuse: ReuseFlags
) -> None:
    """Says what a video will cost on some cards, before weights are downloaded. A prediction."""
    options = {**asdict(flags), **blocks.given(), **eight_bit.options(), **asdict(reuse)}
    height, width = _size(options.pop("size"))
    options["transformers"] = options.pop("transformer")
    options |= {name: parse_steps(f"--{name}", options[name]) for name in ("timesteps", "sigmas")}
    options |= _places(options.pop("sequence_parallel"))
    options |= _decoders(options.pop("decode_gpus"), options.pop("decode_in_place"))
    console = Console()
    try:
        found = planner.plan(height=height, width=width, **options)
    except NoPlan as error:
        if error.nearest is not None:
            show(error.nearest, Console(stderr=True))
        raise
    show(found, console)


def show(found: Plan, console: Console) -> None:
    """Prints a plan as tables for people."""
    video, blocks, steps = found.work.video, found.work.blocks, found.work.steps
    skipped = ""
    if found.work.engine.reuse.on:
        units = found.schedule.units_per_block
        skipped = f" ({units} of {steps.num_steps * found.schedule.branches} forwards of a block are run)"
    cap = "no limit" if blocks.max_blocks_in_flight is None else f"at most {blocks.max_blocks_in_flight}"
    console.print(
        f"[bold]{found.work.model.name}[/], {video.num_frames} frames of {video.width}x{video.height}, "
        f"{video.num_inference_steps} steps{skipped}{'' if video.guidance else ', no guidance'}: "
        f"{found.work.layout.num_blocks} blocks of {blocks.frames_per_block} latents, context {blocks.context} of "
        f"{blocks.context_frames}, blocks in flight: {cap}{f' ({found.note})' if found.note else ''}",
        highlight=False,
    )
    vae = f", VAE on {found.decode}" if found.work.decode else ""
    console.print(
        f"[bold]{found.seconds:.0f} s[/], {found.frames_per_second:.2f} frames/s, first frames after "
        f"{found.first_frame:.0f} s, bubble {100 * found.bubble:.0f} %{vae}. "
        "[italic]A prediction: nothing here was measured on these cards.[/]",
        highlight=False,
    )
    for line in _remarks(found):
        console.print(line, highlight=False)
    if seconds := found.image_seconds:
        console.print(f"Before that, {seconds:.1f} s in which the video's images are encoded.", highlight=False)
    console.print(_stages(found))
    if found.alternatives:
        console.print(_alternatives(found))
    for origin in dict.fromkeys(map(_rates, found.cards.devices)):
        console.print(f"[dim]rests on: {origin}[/]", highlight=False)
    for origin in dict.fromkeys(f"{link.name}: {link.origin}" for link in found.cards.links):
        console.print(f"[dim]rests on: {origin}[/]", highlight=False)


def _remarks(found: Plan) -> Iterator[str]:
    """Yields the error of the prediction, what stands for a size of memory, fewer blocks in flight, and the share of
    decoding, a line each."""
    error, cards = found.error, found.all_devices
    untimed = ", ".join(dict.fromkeys(card.name for card in cards if not card.efficiency.timings))
    yield (
        f"Error: {found.seconds * error.low:.0f} to {found.seconds * error.high:.0f} s, since {error.timings} "
        f"published runs of other engines took {error.low:.2f} to {error.high:.2f} of what is predicted for them"
        + (f"; none of them ran on {untimed}" if untimed else "")
        + ". The VAE was timed on one card only, and is less certain."
    )
    for card in {card.stands_for: card for card in cards if card.stands_for}.values():
        others = [name for name in BY_MEMORY[int(card.stands_for[:-2])] if name != card.name]
        yield f"{card.stands_for} stands for {card.name}" + (
            f"; if yours is {' or '.join(others)}, name it" if others else ""
        )
    if (early := found.earlier) is not None:
        limit = early.work.blocks
        flag = "" if limit.context_version == DEFAULT_VERSION else f" --context-version {limit.context_version}"
        yield (
            f"With --max-blocks-in-flight {limit.max_blocks_in_flight}{flag}: {early.seconds:.0f} s, first frames "
            f"after {early.first_frame:.0f} s, VAE on {early.decode} "
            f"({'' if early.replay else 'closed form; '}{early.note}: docs/quality.md)"
        )
    if found.work.decode:
        yield (
            f"Decoding is {100 * found.decode_rule / len(cards):.1f} % of the work: {found.decode_rule:.2f} of "
            f"{len(cards)} cards by PipeDiT's rule, N T_dec / (T_dec + T_den). Here the VAE is on {found.decode}."
        )


def _rates(card: Device) -> str:
    """The rates that a card's predictions rest on."""
    shares = card.efficiency
    fused, eager = (1e-12 * card.linear * share for share in (shares.fused, shares.eager))
    timed = f"by {shares.timings} published runs" if shares.timings else "no published run"
    return (
        f"{card.name}: matrix products at {fused:.0f} TFLOP/s in runs of fused engines, as this one is, at {eager:.0f} "
        f"in eager ones ({timed}); {shares.origin}"
    )


def _stages(found: Plan) -> Table:
    """The memory and the busy time of each stage, and of each card that only decodes."""
    table = Table("stage", "card", title="GiB per card")
    places = found.work.places
    times = found.simulation and [*found.simulation.stages, *found.simulation.decoders]
    for name in ("layers", "weights", "features", "other", "peak", "usable", "busy"):
        table.add_column(name, justify="right")
    for stage, memory in enumerate(found.memory):
        busy = "-" if not times else f"{100 * times[stage].busy / found.seconds:.0f} %"
        other = memory.running - memory.weights - memory.features
        numbers = [memory.weights, memory.features, other, memory.peak, found.cards.usable[stage]]
        table.add_row(
            str(stage) if stage < len(found.split) else "VAE",
            found.cards.devices[stage].name + (f" x {places}" if stage < len(found.split) and places > 1 else ""),
            str(found.split[stage]) if stage < len(found.split) else "-",
            *(f"{number / GIB:.1f}" for number in numbers),
            busy,
        )
    return table


def _alternatives(found: Plan) -> Table:
    """The plans that differ from the one found in one choice."""
    table = Table("context", title="one choice changed at a time (closed form, within some percent)")
    for name in ("B", "C", "K", "s", "frames/s", "first s", "GiB"):
        table.add_column(name, justify="right")
    table.add_column("what")
    for other in found.alternatives:
        blocks = other.work.blocks
        table.add_row(
            blocks.context,
            str(blocks.frames_per_block),
            str(blocks.context_frames),
            str(blocks.max_blocks_in_flight or "-"),
            f"{other.seconds:.0f}",
            f"{other.frames_per_second:.2f}",
            f"{other.first_frame:.0f}",
            f"{max(memory.peak for memory in other.memory) / GIB:.1f}",
            other.note,
        )
    return table
