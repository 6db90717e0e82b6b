"""The cost model counts what the real classes have and do; its memory is what ranks use."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.shapes import GPU_SHAPES, wan_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dualparal.config.blocks import BlockConfig
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.launch.blame import Limits
from dualparal.launch.supervisor import supervise
from dualparal.models.registry import model_sizes
from dualparal.models.wan.encoder import StreamingEncoder
from dualparal.models.wan.sizes import MODELS, SKYREELS, SkyReelsSizes
from dualparal.models.wan.skyreels import SkyReelsSpec
from dualparal.models.wan.spec import WanSpec
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.models.wan.vae import StreamingDecoder
from dualparal.models.wan.vae_sizes import WanVaeSizes
from dualparal.planning.closed_form import closed_form
from dualparal.planning.cost import Costing, balance, exchange_seconds, layer_arithmetic, unit_arithmetic
from dualparal.planning.devices import DEVICES, LINKS
from dualparal.planning.memory import decode_bytes, place_memory, slice_bytes, slot_bytes, stage_memory
from dualparal.planning.workload import Workload
from dualparal.schedule.actions import DECODE_BOUND, Unit
from dualparal.schedule.schedule import Schedule
from dualparal.schedule.simulate import simulate
from live_bytes import LiveBytes
from pairwise import pairwise
from steady_heap import STEADY


@pytest.mark.parametrize("name", [*MODELS, *SKYREELS])
def test_parameters_are_the_real_ones(name: str) -> None:
    shape = model_sizes(name)
    config = wan_config(shape.heads, shape.head_dim, shape.ffn_dim, shape.num_layers)
    config |= {"in_channels": shape.in_channels + shape.condition_channels, "out_channels": shape.out_channels}
    if shape.image_dim:
        positions = shape.image_tokens if shape.positions else None
        config |= {"image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": positions}
    tells_rate = isinstance(shape, SkyReelsSizes) and shape.tells_rate
    expands = shape.image_counts == (0, 1)
    spec = SkyReelsSpec((config | {"inject_sample_info": True},)) if tells_rate else WanSpec((config,))
    assert expands or spec.image_counts == shape.image_counts
    assert shape.parameters == sum(math.prod(size) for size in spec.shapes(0).values())


def test_slices_weigh_what_their_tensors_do(wan21: Path) -> None:
    model = model_sizes(str(wan21))
    spec = WanSpec((json.loads((wan21 / "transformer" / "config.json").read_text()),))
    work = Workload(model, VideoConfig(32, 32, 29, 3), EngineConfig(BlockConfig(2, 1)))
    split, start = [1, 2, 1], 0
    for stage, layers in enumerate(split):
        names = spec.names(0, range(start, start + layers))
        real = sum(math.prod(spec.shapes(0)[n]) * spec.tensor_dtype(n, torch.bfloat16).itemsize for n in names)
        assert slice_bytes(work, split, stage) == real
        start += layers


def vae_of(base_dim: int, blocks: int, residual: bool) -> tuple[Any, WanVaeSizes]:
    """diffusers' VAE of these sizes; residual: as in Wan 2.2 5B, with a decoder twice as wide as the encoder."""
    from diffusers import AutoencoderKLWan

    if not residual:
        found = AutoencoderKLWan(base_dim=base_dim, num_res_blocks=blocks)
        return found, WanVaeSizes(base_dim, num_res_blocks=blocks)
    patches = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    lists = {"z_dim": 48, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    found = AutoencoderKLWan(base_dim, 2 * base_dim, num_res_blocks=blocks, **patches, **lists)
    return found, WanVaeSizes(2 * base_dim, 48, num_res_blocks=blocks, residual=True, patch=2, encoder_dim=base_dim)


@pytest.mark.parametrize(
    ("base_dim", "blocks", "residual", "height", "width"),
    [(96, 2, False, 60, 104), (8, 1, False, 8, 6), (128, 2, True, 44, 80)],
)
def test_the_decoder_is_counted_as_it_is(base_dim: int, blocks: int, residual: bool, height: int, width: int) -> None:
    with torch.device("meta"):
        vae, shape = vae_of(base_dim, blocks, residual)
        latents = torch.zeros(1, shape.z_dim, 1, height, width)
    decoder = StreamingDecoder(vae)
    for _ in range(2):
        decoder.push(latents)
    with FlopCounterMode(display=False) as counter:
        assert len(decoder.push(latents)) == shape.temporal_factor
    assert shape.flops(height * width) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert shape.cache_bytes(height * width, 4) == decoder.state_bytes
    assert shape.parameters == pytest.approx(sum(p.numel() for p in vae.parameters()), rel=0.15)
    side, level = shape.spatial_factor, 22 if residual else 18
    encoder, frames = StreamingEncoder(vae), torch.zeros(5, 3, side * height, side * width, device="meta")
    encoder.push(frames)
    with FlopCounterMode(display=False) as counter:
        encoder.push(frames[1:])
    assert shape.encode_flops(height * width) == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert shape.encoder_history == encoder.history
    held = sum(cache.nbytes for cache in encoder._caches if isinstance(cache, torch.Tensor))
    assert shape.encode_bytes(height * width, 4) - held == 4 * base_dim * level * 64 * height * width
    assert sum((c.kernel * c.inputs + 1) * c.outputs for c in shape.encoder_convs) == pytest.approx(
        sum(p.numel() for name, p in vae.named_parameters() if name.startswith(("encoder.", "quant_conv"))), rel=0.01
    )


def test_the_residual_decoder_holds_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.models.wan.vae.CpuOps", nullcontext)  # the CPU's own way to convolve
    vae, shape = vae_of(8, 1, True)
    decoder, latents = StreamingDecoder(vae), torch.zeros(1, 48, 1, 2, 3)
    with LiveBytes() as live:
        for _ in range(3):
            live.peak = 0
            decoder.push(latents)
    found = live.peak - decoder.state_bytes
    assert shape.working_bytes(2 * 3, 4) == pytest.approx(found, rel=0.05)


def test_a_layer_costs_what_the_benches_count() -> None:
    for shape in GPU_SHAPES:
        model = MODELS["wan2.1-t2v-14b" if shape.heads == 40 else "wan2.1-t2v-1.3b"]
        work = Workload(model, VideoConfig(shape.height, shape.width, 1025))
        found = layer_arithmetic(work, 100, 300)
        assert found.attention + found.linear == shape.layer_flops(100, 300)


def test_neighbours_and_first_blocks_are_counted() -> None:
    work = Workload(MODELS["wan2.1-t2v-1.3b"], VideoConfig(num_frames=1025), EngineConfig(BlockConfig(8, 4, "cached")))
    schedule = work.schedule(4)
    keys = lambda unit: unit_arithmetic(work, schedule, unit).attention / (4 * 8 * 1560 * 1536) - 512  # noqa: E731
    assert keys(Unit(0, 0, 0)) == 8 * 1560  # nobody before, nobody after yet
    assert keys(Unit(0, 1, 0)) == keys(Unit(1, 0, 0)) == 12 * 1560
    assert keys(Unit(1, 1, 0)) == 16 * 1560
    paper = Workload(MODELS["wan2.1-t2v-1.3b"], VideoConfig(num_frames=1025), EngineConfig(BlockConfig(8, 4, "paper")))
    assert unit_arithmetic(paper, paper.schedule(4), Unit(1, 1, 0)).linear == pytest.approx(
        1.5 * unit_arithmetic(work, schedule, Unit(1, 1, 0)).linear
    )


@pytest.mark.parametrize(("model", "seconds"), [("wan2.1-t2v-1.3b", 0.36e-3), ("wan2.1-t2v-14b", 1.19e-3)])
def test_features_in_8_bits_cost_passes(model: str, seconds: float) -> None:
    """The sums of docs/gpu.md: 5 bytes per number borrowed or lent, for two neighbours, C = 8 and both branches."""
    work = Workload(MODELS[model], VideoConfig(num_frames=1025), EngineConfig.of(features_8bit=True))
    plain = replace(work, engine=EngineConfig())
    own = 8 * work.tokens
    for each, expected in ((work, seconds), (plain, 3 / 5 * seconds)):
        busy, alone = (layer_arithmetic(each, own, 3 * own, *lent) for lent in ((2 * own, 2 * own), ()))
        assert 2 * (busy.moved - alone.moved) / DEVICES["h200"].copy == pytest.approx(expected, rel=0.02)
    half = replace(work, engine=EngineConfig.of(features_8bit=True, attention_8bit=EightBitPolicy("fp8", (), 25)))
    moved = [layer_arithmetic(each, own, 3 * own, 2 * own, 2 * own).moved for each in (plain, half, work)]
    assert moved[1] == pytest.approx((moved[0] + moved[2]) / 2)


def decoded_by(parts: int = 0, in_place: bool = False, **options: Any) -> Workload:
    engine = EngineConfig.of(decode_ranks=parts, decode_in_place=in_place, vae_dtype="float32", **options)
    return Workload(MODELS["wan2.1-t2v-1.3b"], VideoConfig(num_frames=1025), engine)


def test_seconds_of_a_part_by_hand() -> None:
    """Seven parts of 60 rows: nine of them, and the exchange with two neighbours and among all, nothing overlapped."""
    work, cards = decoded_by(7), [DEVICES["rtx4090"]] * 8
    links = [LINKS["pcie4-host"]] * 8
    found = Costing(work, work.schedule(1), [30], cards, links)
    vae, rate = work.model.vae, DEVICES["rtx4090"].conv
    borders = vae.borders(104)
    keys = 2 * 384 * 6240 * 6 / 7
    exchange = 4 * (2 * borders.numbers + keys) / 10e9 + (borders.messages + 1) * 30e-6
    assert found.decode(1) == pytest.approx(8 * (9 / 60 * vae.flops(6240) / rate + exchange))
    assert found.decode(0) == found.decode(1) and found.decode(32) == pytest.approx(found.decode(1) / 8)
    assert found.hand_over(1) == pytest.approx(7 * 4 * 8 * 16 * 6240 / 10e9 + 30e-6)
    beside = Costing(decoded_by(), decoded_by().schedule(8), [4] * 8, cards, links)
    assert beside.decode(1) == pytest.approx(8 * vae.flops(6240) / rate) and beside.hand_over(1) == 0
    in_place = Costing(decoded_by(in_place=True), decoded_by(in_place=True).schedule(8), [4] * 8, cards, links)
    keys = keys / 6 * 7 / 8 * 7
    exchange = 4 * (2 * borders.numbers + keys) / 10e9 + (borders.messages + 1) * 30e-6
    assert in_place.decode(1) == pytest.approx(8 * (8 / 60 * vae.flops(6240) / rate + exchange))


def test_seconds_of_places_by_hand() -> None:
    """Two cards have half of each layer, and five have the share of three of twelve heads; the wire is waited for."""
    alone, cards, wire = Workload(MODELS["wan2.1-t2v-1.3b"]), [DEVICES["h100"]] * 2, LINKS["nvlink4"]
    own, h = 8 * alone.tokens, alone.model.inner
    plain = layer_arithmetic(alone, own, 2 * own)
    for places, heads in ((2, 6), (5, 3)):
        work = replace(alone, engine=EngineConfig.of(sequence_parallel=places))
        rows = work.place_tokens(own)
        assert rows == own / 2 if places == 2 else own / 5 <= rows < own / 5 + 64
        found = layer_arithmetic(work, own, 2 * own)
        text = 4.0 * h * rows * 512
        assert found.attention == pytest.approx((plain.attention - 4.0 * h * own * 512) * heads / 12 + text)
        assert found.linear == pytest.approx(plain.linear * rows / own)
        assert found.moved == pytest.approx(plain.moved * rows / own * (20 + 14) / 20)
        least = 4 * 2 * h * (own / places) * (1 - 1 / places) / wire.bandwidth
        waits = exchange_seconds(work, own, 2 * own, wire, cards[0])
        assert least <= waits - 2 * wire.latency <= 1.26 * least
        engine = replace(work.engine, sequence_parallel_form="pipelined")
        slow = [
            exchange_seconds(each, own, 2 * own, LINKS["pcie4"], cards[0])
            for each in (work, replace(work, engine=engine))
        ]
        assert 0.8 * slow[0] < slow[1] < slow[0], "attention hides the way back of all groups of heads but one"
    assert exchange_seconds(alone, own, 2 * own, None, cards[0]) == 0


def test_memory_of_places() -> None:
    """Features by heads, messages by tokens, weights whole, and latents on the first rank of a stage alone."""
    alone = Workload(MODELS["wan2.1-t2v-14b"])
    work = replace(alone, engine=EngineConfig.of(sequence_parallel=2))
    one = stage_memory(alone, alone.schedule(2), [20, 20], 0)
    first, second = (stage_memory(work, work.schedule(2), [20, 20], 0, leads) for leads in (True, False))
    assert first.features == one.features / 2 and first.weights == one.weights
    assert first.buffers == pytest.approx(one.buffers / 2, rel=1e-6) and first.activations == one.activations / 2
    assert second.latents == second.decode == second.before == 0 < first.latents == one.latents
    assert second.features == first.features and second.running < first.running < one.running


def test_the_slowest_card_and_link_decide_for_all_parts() -> None:
    work = decoded_by(2)
    schedule = work.schedule(2)
    fast, slow = DEVICES["h100"], DEVICES["l20"]
    wire, line = LINKS["nvlink4"], LINKS["10gbe"]
    quick, card, link = (
        Costing(work, schedule, [15, 15], [slow, slow, *cards], [line, line, *links]).decode(1)
        for cards, links in (((fast, fast), (wire, wire)), ((fast, slow), (wire, wire)), ((fast, fast), (wire, line)))
    )
    assert quick < 8 * 0.55 * work.model.vae.flops(work.pixels) / fast.conv
    assert card > 3 * quick and link > 1.1 * quick


@pytest.mark.parametrize(("base_dim", "blocks", "residual"), [(8, 1, False), (12, 2, False), (8, 1, True)])
def test_borders_are_rows_of_what_the_decoder_convolves(base_dim: int, blocks: int, residual: bool) -> None:
    """Counted on the real decoder: the inputs of its convolutions over space, without what it kept."""
    with torch.device("meta"):
        vae, shape = vae_of(base_dim, blocks, residual)
        latents = torch.zeros(1, shape.z_dim, 1, 4, 6)
    decoder, counted = StreamingDecoder(vae), []
    for _ in range(2):
        decoder.push(latents)

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        frames = args[0].shape[2] if args[0].ndim == 5 else args[0].shape[0]
        counted.append(args[0].shape[1] * frames * args[0].shape[-1])

    for module in vae.decoder.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)) and module.kernel_size[-1] == 3:
            module.register_forward_pre_hook(count)
    decoder.push(latents)
    borders = shape.borders(6)
    assert (borders.numbers, borders.messages) == (sum(counted), len(counted))
    assert borders.gathered == 2 * 4 * shape.base_dim


def test_balance() -> None:
    assert balance([1, 1, 1], [0, 0, 0], [9, 9, 9], 10) == [4, 3, 3]
    assert balance([1, 2, 1], [0, 0, 0], [99, 99, 99], 10) == [4, 2, 4]
    assert balance([1, 1, 1], [3, 0, 0], [9, 9, 9], 12) == [2, 5, 5]
    assert balance([1, 1], [0, 0], [2, 9], 8) == [2, 6]
    assert balance([1, 1], [0, 0], [3, 4], 8) is None and balance([1] * 3, [0] * 3, [9] * 3, 2) is None


@pytest.mark.parametrize(
    "blocks_in_flight, steps, context, decoders",
    pairwise(
        [None, 5],
        [8, 50],
        ["cached", "prior", "paper"],
        [{}, {"decode_ranks": 1}, {"decode_ranks": 3}, {"decode_in_place": True}],
    ),
)
def test_the_closed_form_is_near_the_replay(
    context: str, steps: int, blocks_in_flight: int | None, decoders: dict[str, Any]
) -> None:
    engine = EngineConfig(BlockConfig(8, 4, context, blocks_in_flight), **decoders)  # type: ignore[arg-type]
    work = Workload(MODELS["wan2.1-t2v-14b"], VideoConfig(num_frames=1025, num_inference_steps=steps), engine)
    cards, links = [DEVICES["h100"]] * 11, [LINKS["nvlink4"]] * 11
    schedule = work.schedule(8)
    costing = Costing(work, schedule, [5] * 8, cards, links)
    replayed = simulate(schedule, costing.costs)
    unit = [costing.run(stage, Unit(2, min(schedule.gap, steps - 1), 0)) for stage in range(8)]
    found = closed_form(schedule, unit, 8 * costing.transfer(0, Unit(0, 0, 0)), costing.decode(1))
    assert found.seconds == pytest.approx(replayed.seconds, rel=0.13 if schedule.decode_in_place else 0.11)
    assert found.first_frame == pytest.approx(replayed.first_frame, rel=0.15)


def walked(schedule: Schedule, stages: list[float], decode: float, beside: float) -> tuple[float, float]:
    """(seconds, seconds to the first frame) of a closed form that walks every iteration.

    beside: seconds of a unit on the card that decodes.
    """
    slowest, around = max(stages), sum(stages) + 1.0
    least = around + (schedule.branches * schedule.policy.blocks_awaited - 1) * slowest
    now = backlog = first = 0.0
    for iteration in range((schedule.num_blocks or 0) * schedule.gap + schedule.num_steps - schedule.gap):
        units = len(schedule.in_flight(iteration)) * schedule.branches
        duration = max(units * slowest, least)
        backlog = max(0.0, backlog - (duration - units * beside))
        now += duration
        done = iteration - schedule.num_steps + 1
        if done >= 0 and done % schedule.gap == 0:
            first = first or now + decode
            backlog += decode
            wait = max(0.0, backlog - DECODE_BOUND * decode)
            now, backlog = now + wait, backlog - wait
    return now + backlog, first


@settings(max_examples=300)
@given(
    steps=st.integers(1, 20), blocks=st.integers(1, 90), in_flight=st.sampled_from([None, 1, 2, 3, 6]),
    context=st.sampled_from(["cached", "prior", "paper"]), stages=st.lists(st.floats(0.5, 1.5), min_size=1, max_size=6),
    decode=st.one_of(st.just(0.0), st.floats(0.01, 3), st.floats(3, 90)), guidance=st.booleans(),
    decoders=st.sampled_from([{}, {"decode_ranks": 2}, {"decode_in_place": True}]),
)  # fmt: skip
def test_periods_that_are_alike_need_not_be_walked(
    steps: int, blocks: int, in_flight: int | None, context: str, stages: list[float], decode: float, guidance: bool,
    decoders: dict[str, Any],
) -> None:  # fmt: skip
    version = "newest" if in_flight else "matching"
    schedule = Schedule(
        len(stages), steps, blocks, context, 4, guidance, max_blocks_in_flight=in_flight, context_version=version,
        **decoders,
    )  # fmt: skip
    found = closed_form(schedule, stages, 1.0, decode)
    beside = 0.0 if "decode_ranks" in decoders else max(stages) if decoders else stages[0]
    assert found[:2] == pytest.approx(walked(schedule, stages, decode, beside), rel=1e-9)


@pytest.mark.parametrize("decode", [0.0, 20.0, 99.99, 100.0, 100.01, 103.0, 300.0])
def test_the_closed_form_does_not_grow_with_the_video(decode: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog that is empty, that grows a little with every block, or that is full: never many iterations."""
    asked = 0
    real = Schedule.in_flight

    def counted(schedule: Schedule, iteration: int) -> range:
        nonlocal asked
        asked += 1
        assert asked < 1000, "it walks the video"
        return real(schedule, iteration)

    monkeypatch.setattr(Schedule, "in_flight", counted)
    stages = [1.0, 2.0]  # an iteration has 100 units; stage 0 is idle for 100 of its 200 s
    long, endless = (closed_form(Schedule(2, 50, m), stages, 0.1, decode) for m in (312_501, None))
    assert endless.seconds == math.inf and endless[1:] == pytest.approx(long[1:])
    assert long.seconds == pytest.approx(312_501 * long.block, rel=1e-3)
    assert long.block == pytest.approx(200 + max(0.0, decode - 100))


# Measured on ranks -------------------------------------------------------------------------------------------

RANK = """
import sys, json, torch
from dualparal.launch.heartbeat import Heartbeat
heartbeat = Heartbeat.from_env()
torch.set_num_threads(1)
from dualparal.engine.engine import Engine
from dualparal.trace.stats import peak_rss
case = json.loads(sys.argv[1])
engine = Engine.from_pretrained(case["model"], device="cpu", **case["options"])
spec = engine.source.spec
generator = torch.Generator().manual_seed(0)
rows = torch.randn(2, 512, spec.text_dim, generator=generator)
engine(prompt_embeds=rows[:1], negative_prompt_embeds=rows[1:], output_type="latent", **case["call"])
heartbeat.message(peak=peak_rss())
heartbeat.done()
"""


def run_ranks(case: dict[str, Any]) -> list[int]:
    """Peak bytes of each of two ranks. Not getrusage's, which begin with what the starting process weighs: all of
    torch, diffusers and the tests before."""
    heard: dict[int, int] = {}

    def listen(rank: int, message: dict[str, Any]) -> None:
        if "peak" in message:
            heard[rank] = message["peak"]

    command, env = [sys.executable, "-c", RANK, json.dumps(case)], {**STEADY, "OMP_NUM_THREADS": "1"}
    result = supervise(command, 2, limits=Limits(startup=250), env=env, on_message=listen)
    assert result.exit_code == 0, result
    return [heard[0], heard[1]]


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What Python, torch and gloo take on each rank: two ranks with the smallest model, less what is predicted."""
    folder = tmp_path_factory.mktemp("base")
    used, predicted = measure(build_tiny_pipeline(folder / "model", layers=2), 32, BlockConfig(1, 0), 2, 2)
    return [u - p for u, p in zip(used, predicted, strict=True)]


def measure(path: Path, side: int, blocks: BlockConfig, steps: int, count: int) -> tuple[list[int], list[int]]:
    """(peak resident bytes, predicted bytes) of two ranks that make ``count`` blocks."""
    options = {"frames_per_block": blocks.frames_per_block, "context_frames": blocks.context_frames}
    frames = 4 * (count * blocks.frames_per_block - 1) + 1
    call = {"height": side, "width": side, "num_frames": frames, "num_inference_steps": steps, "guidance_scale": 5.0}
    video = VideoConfig(side, side, frames, steps, output_type="latent")
    work = Workload(model_sizes(str(path)), video, EngineConfig(blocks, dtype="float32"))
    split, schedule = [work.model.num_layers // 2] * 2, work.schedule(2)
    case = {"model": str(path), "options": {**options, "context": blocks.context}, "call": call}
    return run_ranks(case), [resident(work, schedule, split, stage) for stage in range(2)]


SIZES = [
    # heads, ffn, layers, side, blocks, steps, blocks: what weighs most
    pytest.param(8, 512, 4, 192, BlockConfig(4, 4), 5, 6, id="features"),
    pytest.param(8, 8192, 2, 256, BlockConfig(8, 2, "prior"), 2, 2, id="activations"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("heads", "ffn", "layers", "side", "blocks", "steps", "count"), SIZES)
def test_predicted_memory_is_what_ranks_use(
    tmp_path: Path, constant: list[int], heads: int, ffn: int, layers: int, side: int, blocks: BlockConfig,
    steps: int, count: int,
) -> None:  # fmt: skip
    """Within 10 % of the peak resident size on both ranks, and of what the model adds to a bare process."""
    model = build_tiny_pipeline(tmp_path / "model", layers=layers, heads=heads, head_dim=64, ffn_dim=ffn)
    measured, predicted = measure(model, side, blocks, steps, count)
    for stage, (used, ours) in enumerate(zip(measured, predicted, strict=True)):
        print(f"stage {stage}: {used / 2**20:.0f} MiB used, {constant[stage] / 2**20:.0f} of them by a bare process; "
              f"of the other {(used - constant[stage]) / 2**20:.0f} predicted {ours / 2**20:.0f}")  # fmt: skip
        assert constant[stage] + ours == pytest.approx(used, rel=0.10)


def resident(work: Workload, schedule: Schedule, split: list[int], stage: int) -> int:
    """``stage_memory`` without the text encoder, and with what differs on a CPU: pages of the weight file stay beside
    the joined Q, K and V, and the plain definitions of the fused ops hold float32 copies."""
    memory = stage_memory(work, schedule, split, stage)
    return memory.running + memory.load


def test_the_vae_is_part_of_rank_0() -> None:
    work = Workload(MODELS["wan2.1-t2v-1.3b"], VideoConfig(num_frames=1025), EngineConfig(vae_dtype="float32"))
    first, second = (stage_memory(work, work.schedule(2), [15, 15], stage) for stage in range(2))
    assert first.decode == decode_bytes(work) > 5 * 2**30 and second.decode == 0
    assert first.before > 10 * 2**30  # UMT5-XXL, before the weights


def test_who_decodes_holds_the_vae() -> None:
    """A part has its rows of the history, and the whole VAE; stage 0 has none of it unless it decodes."""
    beside, ranks, in_place = decoded_by(), decoded_by(3), decoded_by(in_place=True)
    vae = beside.model.vae
    memory = lambda work: [  # noqa: E731
        place_memory(work, work.schedule(4), [8, 8, 7, 7], place) for place in range(4 + work.schedule(4).decode_ranks)
    ]
    one, three, each = memory(beside), memory(ranks), memory(in_place)
    assert [m.decode for m in one] == [decode_bytes(beside), 0, 0, 0]
    assert [m.decode for m in three] == [0, 0, 0, 0, *[decode_bytes(ranks, 3)] * 3]
    assert [m.decode for m in each] == [decode_bytes(in_place, 4)] * 4
    weights = 4 * vae.parameters
    assert decode_bytes(beside, 3) - weights == pytest.approx((decode_bytes(beside) - weights) / 3)
    assert decode_bytes(beside, 7) - weights == pytest.approx((decode_bytes(beside) - weights) * 9 / 60)
    assert three[0].running == one[0].running - one[0].decode and three[1:4] == one[1:]
    assert three[4].running == three[4].decode + three[4].latents < 1.2 * (weights + (one[0].decode - weights) / 3)
    latents = replace(ranks, video=replace(ranks.video, output_type="latent"))
    assert [m.decode for m in memory(latents)] == [0] * 4


def test_every_video_has_features_and_histories_of_its_own() -> None:
    """Four prompts in one call hold four times the features of one, and the check of a request counts them."""
    video = VideoConfig(num_frames=1025)
    one, four = (Workload(MODELS["wan2.1-t2v-1.3b"], video, num_videos=count) for count in (1, 4))
    split = [8, 8, 7, 7]
    memory = [stage_memory(work, work.schedule(4), split, 1) for work in (one, four)]
    assert [m.features / 2**30 for m in memory] == pytest.approx([18.85, 73.70], abs=0.01)
    history = one.model.vae.cache_bytes(one.pixels, one.decode_itemsize)
    assert decode_bytes(four) - decode_bytes(one) == 3 * history > 0
    means = Workload(MODELS["wan2.1-t2v-1.3b"], video, EngineConfig.of(attention_8bit="int8"))
    schedule = means.schedule(4)
    lent = 2 * sum(schedule.slots(side) * slot_bytes(means, range(8, 16), side) for side in ("head", "tail"))
    more = stage_memory(means, schedule, split, 1).features - lent
    assert more == 2 * schedule.places * 8 * 4 * means.model.inner  # branches, places, layers, float32
