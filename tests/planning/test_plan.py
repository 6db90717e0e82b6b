"""The planner: what it chooses fits and is balanced, what cannot be done is refused with the nearest that can."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dualparal.cli.main import app
from dualparal.config.engine import EngineConfig
from dualparal.models.registry import model_sizes
from dualparal.planning.devices import BY_MEMORY, DEVICES, TIMED, device, links, parse_gpus
from dualparal.planning.plan import NoPlan
from dualparal.planning.planner import plan
from dualparal.planning.search import EARLY_BLOCKS
from dualparal.schedule.validate import validate
from pairwise import pairwise

BIG = "wan2.1-t2v-14b"


def test_it_is_a_public_name() -> None:
    import dualparal

    for _ in range(2):  # a module of that name would take its place
        assert isinstance(dualparal.plan("wan2.1-t2v-1.3b", "2xh100"), dualparal.Plan)


def test_it_needs_no_torch_and_no_gpu_and_answers_in_seconds() -> None:
    code = (
        "import time, sys; from dualparal.planning.planner import plan; begin = time.process_time();"
        f"plan({BIG!r}, '8x24GB').describe(); seconds = time.process_time() - begin;"
        "assert 'torch' not in sys.modules and seconds < 5, seconds"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "context, gpus, model",
    pairwise(
        ["prior", "paper"],
        ["8x24GB", "4xa100-80gb,2xrtx4090", "1xh200", "2xl40s", "3xb200"],
        ["wan2.1-t2v-1.3b", BIG, "wan2.2-t2v-a14b"],
    ),
)
def test_what_it_says_fits(model: str, gpus: str, context: str) -> None:
    found = plan(model, gpus, context=context, num_frames=257)
    cards = [card for group in parse_gpus(gpus) for card in group]
    assert sum(found.split) == found.work.model.num_layers and len(found.split) == len(cards)
    for memory, card in zip(found.memory, cards, strict=True):
        assert memory.peak <= card.usable < card.memory
    assert 0 < found.first_frame < found.seconds and 0 <= found.bubble < 1
    assert found.alternatives == tuple(sorted(found.alternatives, key=lambda other: other.seconds))
    validate(found.schedule)


def test_the_split_follows_the_cards() -> None:
    found = plan(BIG, "2xh100,2xrtx4090", context="prior")
    fast, slow = found.split[1], found.split[2]
    assert fast > 3 * slow  # 5 times the rate
    assert found.split[3] >= found.split[2] - 1
    assert found.simulation is None or max(s.busy for s in found.simulation.stages) < found.seconds
    beside, own = (plan("wan2.1-t2v-1.3b", "8xrtx4090", decode_ranks=ranks).split for ranks in (0, 1))
    assert beside[0] < 3 and own[0] >= 4 and len(own) == 7  # the VAE takes its share of stage 0


def test_a_better_split_is_not_found_by_moving_a_layer() -> None:
    from dualparal.planning.cost import Costing
    from dualparal.schedule.simulate import simulate

    found = plan(BIG, "1xh100,2xa100-80gb,1xrtx4090", context="prior", num_frames=257, num_inference_steps=12)
    cards = found.cards
    for give in range(4):
        for take in range(4):
            split = list(found.split)
            split[give] -= 1
            split[take] += 1
            if give != take and min(split) > 0:
                other = simulate(
                    found.schedule, Costing(found.work, found.schedule, split, cards.devices, cards.links).costs
                )
                assert other.seconds > 0.97 * found.seconds, split


SHORT = {"num_frames": 4 * (8 * 32 - 1) + 1, "num_inference_steps": 4, "guidance_scale": 1.0}  # M = 32, T = 4


def test_few_steps_on_many_cards_are_shared() -> None:
    """Four units in flight keep half of eight stages busy; four stages of two cards are as quick and all busy."""
    given = {**SHORT, "output_type": "latent"}
    eight, shared, four = (plan(BIG, "8xh100", sequence_parallel=places, **given) for places in (1, 2, 4))
    assert len(shared.split) == 4 and shared.work.places == 2 and len(shared.all_devices) == 8
    assert shared.replay and shared.seconds <= 0.65 * eight.seconds and four.seconds <= 0.65 * eight.seconds
    assert eight.bubble > 0.4 and shared.bubble < 0.1
    slow = [plan(BIG, "8xh100", link="10gbe", sequence_parallel=places, **given).seconds for places in (1, 2)]
    assert slow[1] > 2 * slow[0], "not over a slow wire"
    found = plan(BIG, "8xh100", **SHORT)
    assert found.work.places > 1 and found.engine_options["sequence_parallel"] == found.work.places
    assert f", {found.work.places} a stage" in found.describe()
    for memory, card in zip(found.memory, found.cards.usable, strict=True):
        assert memory.peak <= card


def test_steps_that_fill_the_pipe_are_not_shared() -> None:
    assert plan("wan2.1-t2v-1.3b", "4xrtx4090", num_frames=257, decode_ranks=0).work.places == 1


@pytest.mark.parametrize(
    ("gpus", "options", "words"),
    [
        ("8xh100", {"sequence_parallel": 3}, "sequence_parallel=3 with 8 cards for stages: every stage takes 3"),
        ("1xh100,1xrtx4090", {"sequence_parallel": 2}, "the cards of a stage must be alike"),
        ("16xh100", {"sequence_parallel": 16}, "sequence_parallel=16 with a model of 12 heads"),
        ("2xh100", {"sequence_parallel": 2, "height": 16, "width": 16}, "too few tokens"),
        ("2xh100", {"sequence_parallel": 2, "attention_8bit": "int8"}, "attention_8bit='int8' with sequence_para"),
    ],
)
def test_cards_that_cannot_share_are_refused(gpus: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan("wan2.1-t2v-1.3b", gpus, num_frames=81, decode_ranks=0, **options)


@pytest.mark.slow
def test_limits_on_blocks_in_flight() -> None:
    free = plan(BIG, "4xh100")
    early = plan(BIG, "4xh100", first_frame_limit=free.first_frame / 3)
    assert early.first_frame <= free.first_frame / 3 * 1.15  # the limit is kept in closed form
    assert early.work.blocks.max_blocks_in_flight and early.seconds < 1.1 * free.seconds
    assert f"neighbours {early.schedule.gap} steps apart" in early.note
    tight = plan(BIG, "8x24GB")  # all blocks in flight would need 50 GiB
    assert tight.work.blocks.context == "cached" and tight.work.blocks.context_version == "newest"
    assert max(memory.peak for memory in tight.memory) <= DEVICES["rtx4090"].usable
    own = plan(BIG, "4xh100", max_blocks_in_flight=6, context_version="newest")
    assert own.work.blocks.max_blocks_in_flight == 6 and own.schedule.max_in_flight == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"gpus": "8xrtx3080"},
            r"card 'rtx3080' is not known; use one of rtx3090.*24gb.*the nearest name is rtx[345]090",
        ),
        ({"gpus": "8 cards"}, "is not known"),
        ({"gpus": "0xrtx4090"}, "use COUNTxCARD"),
        ({"gpus": "8xrtx4090", "link": "tin-can"}, "link 'tin-can' is not known; use one of pcie4"),
        ({"model": "wan9"}, r"model 'wan9' is not known; use one of wan2.1-t2v-1.3b"),
        ({"gpus": "8xrtx4090", "memory_limit": -1.0}, "memory_limit=-1.0: use a number above 0"),
        ({"num_frames": 1024}, "num_frames=1024 cannot be decoded exactly"),
        ({"height": 481}, "height=481 is not divisible by 16"),
        ({"context_frames": 9}, "context_frames=9 exceeds frames_per_block=8"),
        ({"decode_ranks": -1}, "decode_ranks=-1: use the number of ranks that only decode"),
        ({"decode_ranks": 1, "decode_in_place": True}, "leave one out"),
        (
            {"gpus": "1xh200", "decode_ranks": 1},
            "decode_ranks=1 with 1 card: the stages need one, too; use 0 or fewer",
        ),
        ({"decode_ranks": 7, "height": 32, "width": 64}, "7 cards that decode and 4 rows of latents: each needs one"),
    ],
)
def test_bad_input(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan(**{"gpus": "8xrtx4090", **options})


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_the_nearest_that_does() -> None:
    with pytest.raises(
        NoPlan, match=r"64 cards for a model of 40 layers.*use 40 or fewer.*nearest.*layers 1\+1"
    ) as few:
        plan(BIG, "64xh100", decode_ranks=0, sequence_parallel=1)
    assert few.value.nearest is not None and len(few.value.nearest.split) == 40
    with pytest.raises(NoPlan, match=r"stage 0 \(rtx4090\) needs \d+\.\d GiB and may use 21.*nearest.*prior") as one:
        plan("wan2.1-t2v-1.3b", "1xrtx4090", max_blocks_in_flight=40)
    assert one.value.nearest is not None and one.value.nearest.work.blocks.context == "prior"
    with pytest.raises(NoPlan, match=r"first_frame_limit=1 s: the first block takes .* at least") as late:
        plan("wan2.1-t2v-1.3b", "8xrtx4090", first_frame_limit=1.0)
    assert late.value.nearest is not None and late.value.nearest.work.blocks.max_blocks_in_flight
    with pytest.raises(NoPlan, match=r"nearest that works.*on 2 x rtx4090") as more:
        plan(BIG, "1xrtx4090", context="paper")
    assert more.value.nearest is not None
    with pytest.raises(NoPlan, match="use larger cards") as never:
        plan(BIG, "8xrtx4090", memory_limit=2.0)
    assert never.value.nearest is None


@pytest.mark.parametrize(
    ("options", "flags", "says"),
    [
        ({"linear_8bit": "fp8"}, ["--linear-8bit", "fp8"], "linear_8bit='fp8'"),
        ({"attention_8bit": "fp8"}, ["--attention-8bit", "fp8"], "attention_8bit='fp8'"),
        ({"features_8bit": True}, ["--features-8bit"], "features_8bit=True"),
    ],
    ids=str,
)
def test_cards_without_fp8_are_refused(options: dict[str, Any], flags: list[str], says: str) -> None:
    """As the engine refuses them; on others the flags of 8 bits reach the plan."""
    for gpus in ("2xa100", "1xh100,1xa100-40gb"):
        with pytest.raises(NoPlan, match=f"{says} on a100-.*: it needs fp8"):
            plan("wan2.1-t2v-1.3b", gpus, num_frames=81, **options)
    plain, changed = (plan("wan2.1-t2v-1.3b", "2xh200", num_frames=81, **each) for each in ({}, options))
    assert (plain.seconds, plain.memory) != (changed.seconds, changed.memory)
    video = ["plan", "--num-frames", "81", "--gpus"]
    refused = CliRunner().invoke(app, [*video, "2xa100", *flags])
    assert isinstance(refused.exception, NoPlan) and says in str(refused.exception)
    done = CliRunner().invoke(app, [*video, "2xh200", *flags])
    assert done.exit_code == 0 and f"{changed.seconds:.0f} s" in done.output


def test_int8_attention_needs_no_fp8() -> None:
    assert plan("wan2.1-t2v-1.3b", "2xa100", num_frames=81, attention_8bit="int8").seconds > 0


def test_links() -> None:
    groups = parse_gpus("2xh100,2x24GB")
    assert [link.name for link in links(groups)] == ["nvlink4", "pcie4-host", "pcie4-host", "pcie4-host"]
    assert [link.name for link in links(groups, between="25gbe")] == ["nvlink4", "25gbe", "pcie4-host", "25gbe"]
    assert {link.name for link in links(groups, within="pcie5")} == {"pcie5"}
    slow = plan(BIG, "2xh100,2xh100", context="prior", num_frames=257, between="10gbe")
    assert slow.seconds > plan(BIG, "2xh100,2xh100", context="prior", num_frames=257).seconds


def test_a_directory_is_as_good_as_a_name(wan21: Path, tmp_path: Path) -> None:
    model = model_sizes(str(wan21))
    assert (model.num_layers, model.inner, model.vae.base_dim, model.vae.num_res_blocks) == (4, 48, 4, 1)
    found = plan(str(wan21), "2xrtx4090", num_frames=81, height=64, width=96)
    assert found.split in ((2, 2), (1, 3)) and found.seconds > 0
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model_index\.json is missing"):
        plan(str(tmp_path), "2xrtx4090")
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="not the configs of a Wan model"):
        plan(str(tmp_path), "2xrtx4090")


def test_the_command() -> None:
    run = CliRunner().invoke
    done = run(
        app,
        ["plan", "--model", BIG, "--gpus", "8x24GB", "--size", "832x480", "--context", "prior", "--num-frames", "257"],
    )
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    for words in ("A prediction", "frames/s", "first frames after", "bubble", "rtx4090", "GiB per card", "rests on"):
        assert words in text
    found = plan(BIG, "8x24GB", context="prior", num_frames=257)
    assert found.error == TIMED and found.earlier is not None
    for words in (
        f"Error: {found.seconds * TIMED.low:.0f} to {found.seconds * TIMED.high:.0f} s",
        "24gb stands for rtx4090; if yours is rtx4090d or rtx3090, name it",
        f"With --max-blocks-in-flight 6: {found.earlier.seconds:.0f} s, first frames after "
        f"{found.earlier.first_frame:.0f} s",
        f"{found.decode_rule:.2f} of 8 cards by PipeDiT's rule",
        "at 140 TFLOP/s in runs of fused engines",
    ):
        assert words in text
    named = " ".join(run(app, ["plan", "--gpus", "2xh100,1xl40s", "--steps", "4", "--decode-gpus", "0"]).output.split())
    assert "stands for" not in named and "--max-blocks-in-flight 6" not in named
    assert "none of them ran on l40s" in named and "0.83 to 1.72" in named
    assert "matrix products at 568 TFLOP/s in runs of fused engines, as this one is, at 471 in eager ones" in named
    bad = run(app, ["plan", "--gpus", "8x24GB", "--size", "big"])
    assert isinstance(bad.exception, ValueError) and "--size 'big'" in str(bad.exception)


def test_a_size_of_memory_says_which_card_it_stands_for() -> None:
    for size, names in BY_MEMORY.items():
        card = device(f"{size}GB")
        assert (card.name, card.stands_for) == (names[0], f"{size}gb") and all(name in DEVICES for name in names)
        assert all(0.88 * size < DEVICES[name].memory / 1e9 < 1.12 * size for name in names)
    assert not any(card.stands_for for card in DEVICES.values())
    assert "layers 15+15 on 2 x l40s (for 48gb): " in plan("wan2.1-t2v-1.3b", "2x48GB", output_type="latent").describe()


@pytest.mark.parametrize("name", ["RTX 3090", "A6000", "L20", "H20", "4090D", "RTX PRO 6000", "rtx-4090-d"])
def test_cards_by_their_usual_names(name: str) -> None:
    assert name.lower().replace(" ", "").replace("-", "").endswith(device(name).name.removeprefix("rtx"))


def test_products_in_fp8_need_a_card_that_has_them() -> None:
    for card in DEVICES.values():
        assert card.fp8 == 0 or card.fp8 == pytest.approx(2 * card.tensor, rel=0.02)
    assert DEVICES["a6000"].linear_8bit == DEVICES["a6000"].linear
    assert DEVICES["h100"].linear_8bit == 1.6 * DEVICES["h100"].linear


def test_an_endless_video_has_a_rate() -> None:
    """It is that of a long one. Blocks in flight, memory and alternatives are chosen by it, too."""
    for model, gpus, context in (
        ("wan2.1-t2v-1.3b", "8x24GB", "cached"),
        (BIG, "8x24GB", "cached"),
        (BIG, "3xh100", "paper"),
    ):
        endless = plan(model, gpus, context=context, num_frames=None)
        long = plan(model, gpus, context=context, num_frames=10_000_001)
        assert endless.seconds == math.inf and f"{endless.frames_per_second:.2f} frames/s, first" in endless.describe()
        assert endless.frames_per_second == pytest.approx(long.frames_per_second, rel=1e-3)
        assert endless.split == long.split and endless.work.blocks == long.work.blocks
        assert endless.first_frame == pytest.approx(long.first_frame)
        assert endless.bubble == pytest.approx(long.bubble, abs=1e-3) and endless.memory == long.memory
        assert [other.work.blocks for other in endless.alternatives] == [
            other.work.blocks for other in long.alternatives
        ]


def test_the_share_of_decoding_is_said() -> None:
    """PipeDiT's rule by hand, on equal cards: N T_dec / (T_dec + T_den) with the times of one card."""
    for steps, scale, rule in ((50, 5.0, 0.45), (4, 1.0, 4.8)):
        alone: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale, "sequence_parallel": 1}
        found = plan("wan2.1-t2v-1.3b", "8xrtx4090", **alone)
        assert found.decode_rule == pytest.approx(rule, rel=0.02)
        beside = plan("wan2.1-t2v-1.3b", "8xrtx4090", **alone, decode_ranks=0)
        assert beside.decode_rule == pytest.approx(found.decode_rule, rel=0.01)
        one = plan("wan2.1-t2v-1.3b", "1xh200", num_inference_steps=steps, guidance_scale=scale)
        costing = one.costing
        units = sum(costing.run(0, unit) for unit in one.schedule.units()) / 33
        assert one.decode_rule == pytest.approx(costing.decode(1) / (costing.decode(1) + units), rel=0.05)
    assert plan("wan2.1-t2v-1.3b", "2xh200", output_type="latent").decode_rule == 0


def test_six_blocks_in_flight_are_shown_where_they_are_earlier() -> None:
    found = plan("wan2.1-t2v-1.3b", "8xrtx4090")
    assert found.work.blocks.max_blocks_in_flight is None  # no default
    early = found.earlier
    assert early and early.simulation and early.work.engine.decode_ranks == 0
    assert early is not None and early.work.blocks.max_blocks_in_flight == EARLY_BLOCKS == 6
    assert early.first_frame < 0.3 * found.first_frame and "neighbours 9 steps apart" in early.note
    for few in ({"max_blocks_in_flight": 5}, {"num_inference_steps": 6}, {"num_frames": 81}):
        assert plan("wan2.1-t2v-1.3b", "8xrtx4090", **few).earlier is None


WAYS: list[dict[str, Any]] = [*({"decode_ranks": ranks} for ranks in range(8)), {"decode_in_place": True}]


@pytest.mark.parametrize("card", ["rtx4090", "h100"])
@pytest.mark.parametrize("vae_dtype", ["float32", "bfloat16"])
def test_no_other_place_decodes_faster(vae_dtype: str, card: str) -> None:
    """The choice among all of them, by their replays; docs/plan.md has those of 50 steps."""
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "vae_dtype": vae_dtype, "num_frames": 513}
    found = plan("wan2.1-t2v-1.3b", f"8x{card}", **options)  # type: ignore[arg-type]
    others = [plan("wan2.1-t2v-1.3b", f"8x{card}", **options, **way) for way in WAYS]
    assert found.simulation and all(other.simulation for other in others)
    assert found.seconds == min(other.seconds for other in others)
    assert sum(other.decode == found.decode for other in others) == 1


def test_what_eight_cards_are_to_do() -> None:
    """Predictions that the project has set itself: docs/plan.md has them in its tables."""
    fifty = plan("wan2.1-t2v-1.3b", "8xrtx4090")
    assert fifty.seconds <= 325 and fifty.decode == "every stage's card"
    assert fifty.earlier is not None and fifty.earlier.seconds <= 325 and fifty.earlier.first_frame < 60
    four = plan("wan2.1-t2v-1.3b", "8xrtx4090", num_inference_steps=4, guidance_scale=1.0)
    assert four.seconds <= 40 and four.schedule.decode_ranks == 5 and round(four.decode_rule) == 5
    assert four.memory[0].decode == 0 < four.memory[-1].decode
    beside = plan("wan2.1-t2v-1.3b", "8xrtx4090", num_inference_steps=4, guidance_scale=1.0, decode_ranks=0)
    assert beside.seconds > 3 * four.seconds
    assert {other.decode for other in four.alternatives} & {"stage 0", "every stage's card"}


def test_the_command_says_who_decodes() -> None:
    def run(*flags: str) -> str:
        done = CliRunner().invoke(app, ["plan", "--gpus", "4xh100", "--num-frames", "257", *flags])
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    assert "VAE on 2 cards of their own" in run("--decode-gpus", "2")
    assert "VAE on every stage's card" in run("--decode-in-place")
    assert "VAE on stage 0" in run("--decode-gpus", "0")
    for flags, words in (
        (["--decode-gpus", "most"], "--decode-gpus 'most': use a number of cards, or auto"),
        (["--decode-gpus", "2", "--decode-in-place"], "leave one out"),
        (["--decode-gpus", "4"], "decode_ranks=4 with 4 cards: the stages need one, too; use 3 or fewer"),
    ):
        refused = CliRunner().invoke(app, ["plan", "--gpus", "4xh100", *flags])
        assert isinstance(refused.exception, ValueError) and words in str(refused.exception)


def test_long_videos_take_no_longer_to_plan() -> None:
    begin = time.process_time()
    plan("wan2.1-t2v-1.3b", "8x24GB", num_frames=4001)
    assert time.process_time() - begin < 2


@pytest.mark.slow
def test_generate_takes_its_plan_from_here(tmp_path: Path) -> None:
    """One process cannot tell two stages apart on this machine, so that it runs and says its plan is what shows."""
    command = [
        sys.executable,
        "-m",
        "dualparal.cli",
        "generate",
        "--prompt",
        "a cat",
        "--num-frames",
        "29",
        "--steps",
        "2",
    ]
    command += ["--device", "cpu", "--stages", "2", "--latents-out", str(tmp_path / "l.safetensors"), "--plan"]
    done = subprocess.run([*command, "auto"], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "plan: cached, B=8, C=4, K=5, layers " in done.stderr and (tmp_path / "l.safetensors").exists()
    for more, words in ((["best"], "use auto"), (["auto", "--layers-per-stage", "1,3"], "that is what it chooses")):
        refused = CliRunner().invoke(app, [*command[3:], *more])
        assert isinstance(refused.exception, ValueError) and words in str(refused.exception)


@pytest.mark.parametrize("options", [{}, {"decode_ranks": 1}, {"decode_in_place": True}], ids=str)
def test_a_plan_is_a_choice_of_options(options: dict[str, Any]) -> None:
    found = plan("wan2.1-t2v-1.3b", "3xh100", num_frames=257, **options)
    given = found.engine_options
    assert given["layers_per_stage"] == list(found.split) and EngineConfig.of(**given).blocks == found.work.blocks
    assert all(given[name] == value for name, value in options.items())
    assert len(found.split) + len(found.schedule.decoders[3:] or range(found.schedule.decode_ranks)) == 3


def test_more_cards_than_layers_are_for_decoding() -> None:
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "sequence_parallel": 1}
    found = plan(gpus="32xrtx4090", **call)
    assert found.work.engine.decode_ranks >= 2 and len(found.split) <= 30
    with pytest.raises(NoPlan, match="use 30 or fewer, or let the others decode"):
        plan(gpus="32xrtx4090", **call, decode_ranks=0)


def test_rows_travel_among_those_that_decode_and_latents_to_them() -> None:
    """Machines of four cards with a slow link between them: only latents cross it, where one of them decodes."""
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "decode_ranks": 4}
    near, far = plan(gpus="8xrtx4090", **call), plan(gpus="4xrtx4090,4xrtx4090", between="10gbe", **call)
    assert near.costing.decode(1) == far.costing.decode(1)
    assert far.costing.hand_over(1) > 5 * near.costing.hand_over(1)
    across = plan(gpus="4xrtx4090,4xrtx4090", between="10gbe", **{**call, "decode_ranks": 5})
    assert across.costing.decode(1) > near.costing.decode(1)
