"""Search for the cut of a model and of a video that suits some cards: in closed form, the answers replayed. No torch.

A plan is a prediction that rests on the rates in ``devices``. It promises speed and memory, never quality: context
policy, block and context size are the user's or the defaults, and other choices are shown as alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from dualparal.config.engine import EngineConfig
from dualparal.config.units import GIB
from dualparal.config.video import VideoConfig
from dualparal.models.defaults import model_defaults
from dualparal.models.registry import model_sizes
from dualparal.planning.devices import Device, links, parse_gpus
from dualparal.planning.plan import Cards, NoPlan, Plan
from dualparal.planning.search import Search
from dualparal.planning.workload import Workload

REPLAY_LIMIT = 60_000  # runs of a unit on a stage that are replayed for an answer: about a second


def plan(
    model: str = "wan2.1-t2v-1.3b",
    gpus: str | Sequence[Sequence[Device]] = "8xrtx4090",
    *,
    link: str | None = None,
    between: str | None = None,
    memory_limit: float | None = None,
    first_frame_limit: float | None = None,
    extra_devices: Mapping[str, Device] | None = None,
    **options: Any,
) -> Plan:
    """The fastest way to make a video within the limits, and what else there is.

    Args:
        model: a name that ``dualparal models`` lists ("wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"), or a directory in
            diffusers format, of which only config files are read.
        gpus: "8xrtx4090", "8x24GB", "4xa100-80gb,2xrtx4090"; stages follow this order, and cards that only decode are
            the last.
        link, between: of cards in a group and between groups of ``gpus``, by name ("pcie4", "nvlink4", "25gbe").
        memory_limit: GiB per card that may be used. first_frame_limit: seconds.
        extra_devices: cards besides the built-in ones, by name.
        options: fields of ``VideoConfig`` (num_frames, by default 1025, None for an endless video, height, width,
            num_inference_steps, timesteps ...; size, steps and guidance are by default the model's), and of
            ``EngineConfig`` and ``BlockConfig`` (frames_per_block, context, dtype ...). Blocks and context are kept,
            unless nothing fits; without ``max_blocks_in_flight`` it is the model's own, or else there is no limit, or
            where that does not fit the largest that does (for memory with "newest" features, which take fewer slots).
            Without ``decode_ranks`` and ``decode_in_place`` the fastest way to decode is searched, and without
            ``sequence_parallel`` the fastest number of cards a stage.

    Raises:
        NoPlan: it cannot be done; says why, and what can.
        ValueError: a value is out of range or unknown; names it, the rule and the way out.
    """
    names = {item.name for item in fields(VideoConfig)} & set(options)
    asked = {"num_frames": 1025, **{name: options.pop(name) for name in names}}
    places = "sequence_parallel" not in options
    own = model_defaults(model)
    config = EngineConfig.of(own.blocks, **options)
    sizes = model_sizes(model, config.transformers)
    work = Workload(sizes, VideoConfig.of(own.video, **asked), config)
    search = not {"decode_ranks", "decode_in_place"} & set(options)
    groups = parse_gpus(gpus, extra_devices) if isinstance(gpus, str) else [list(group) for group in gpus]
    return plan_for(
        work,
        groups,
        search_decoders=search,
        search_places=places,
        link=link,
        between=between,
        memory_limit=memory_limit,
        first_frame_limit=first_frame_limit,
    )


def plan_for(
    work: Workload,
    groups: Sequence[Sequence[Device]],
    *,
    search_decoders: bool = False,
    search_places: bool = False,
    link: str | None = None,
    between: str | None = None,
    memory_limit: float | None = None,
    first_frame_limit: float | None = None,
) -> Plan:
    """Plans as ``plan`` does, for a workload and groups of cards.

    Args:
        work: the video and the model.
        groups: cards in order, by machine: those of the stages, then those that only decode.
        search_decoders: who decodes is chosen here; otherwise it is as ``work.engine`` says.
        search_places: the cards of a stage are, too.
        link, between, memory_limit, first_frame_limit: as in ``plan``.

    Raises:
        NoPlan: it cannot be done; the message says why, and names the nearest plan.
        ValueError: a value is out of range or unknown.
    """
    for name, limit in (("memory_limit", memory_limit), ("first_frame_limit", first_frame_limit)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name}={limit}: use a number above 0")
    devices = tuple(card for group in groups for card in group)
    _check_fp8(work.engine, devices)
    most = None if memory_limit is None else int(memory_limit * GIB)
    cards = Cards(
        devices,
        tuple(links(groups, link, between)),
        tuple(card.usable if most is None else min(card.usable, most) for card in devices),
    )
    search = Search(cards, first_frame_limit, search_decoders, search_places)
    found = search.candidates(work)
    if not found:
        raise search.refusal(work)
    best, left = _fastest(found, REPLAY_LIMIT)
    sooner = search.earlier(found[0])
    earlier = _fastest(sooner, left)[0] if sooner else None
    return replace(best, alternatives=tuple(search.alternatives(best)), earlier=earlier)


def _fastest(plans: Sequence[Plan], limit: float) -> tuple[Plan, float]:
    """The fastest of some plans, which come fastest first in closed form, by a replay of as many as ``limit`` runs of a
    unit allow. Returns (plan, what is left of the limit)."""
    if plans[0].runs > limit:  # others would only win because they can be replayed
        return plans[0], limit
    replayed = []
    for plan in plans:
        if plan.runs <= limit:
            limit -= plan.runs
            replayed.append(replace(plan, replay=True))
    return max(replayed, key=lambda plan: plan.frames_per_second, default=plans[0]), limit


def _check_fp8(engine: EngineConfig, devices: Sequence[Device]) -> None:
    """Checks that the cards have fp8 where options need it, as the engine does. Raises NoPlan."""
    wanted = {
        "linear_8bit='fp8'": engine.linear_8bit.on,
        "attention_8bit='fp8'": engine.attention_8bit.mode == "fp8",
        "features_8bit=True": engine.features_8bit,
    }
    without = dict.fromkeys(card.name for card in devices if not card.fp8)
    if engine.device == "cpu" or not without:
        return
    for name, on in wanted.items():
        if on:
            raise NoPlan(f"{name} on {', '.join(without)}: it needs fp8, from compute capability 8.9 on; leave it out")
