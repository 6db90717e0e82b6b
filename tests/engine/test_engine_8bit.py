"""8-bit attention in the engine: the bits of the reference for any number of stages, on where it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

import dualparal.reference
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.engine.engine import Engine
from dualparal.kernels.attention_8bit import FP8
from dualparal.models.keys_values import Context8, Features8, KeysValues
from dualparal.models.wan import transformer
from dualparal.runtime.features import FeatureStore
from dualparal.runtime.workspace import Workspace, Workspace8
from engine_calls import embeds, reference_latents

# 60 tokens per frame: what is lent begins and ends inside of tiles of 128, and there are several
SIZE = {"height": 96, "width": 160}
POLICIES = ["cached", "prior", "paper"]
SCHEDULES = {
    "int8": EightBitPolicy("int8"),
    "fp8": EightBitPolicy("fp8"),
    "int8, some layers and steps": EightBitPolicy("int8", keep_layers=(1,), first_steps=1, last_steps=1),
    "fp8, some layers and steps": EightBitPolicy("fp8", keep_layers=(0, 2), first_steps=2, last_steps=1),
}
Build = Callable[..., Engine]


def build(engine: Build, *args: Any, **options: Any) -> Engine:
    return engine(*args, **{"frames_per_block": 4, "context_frames": 1, "dtype": "bfloat16", **options})


def call(latents: int, steps: int, guidance: float = 1.0) -> dict[str, Any]:
    return {"num_frames": 4 * latents - 3, "num_inference_steps": steps, "guidance_scale": guidance, "seed": 3, **SIZE}


def latents(built: Engine, asked: dict[str, Any]) -> torch.Tensor:
    made: torch.Tensor = built(**embeds(built, asked["guidance_scale"] > 1), output_type="latent", **asked).frames
    return made


def truth(built: Engine, asked: dict[str, Any]) -> torch.Tensor:
    return reference_latents(built, embeds(built, asked["guidance_scale"] > 1), **asked)


@pytest.mark.parametrize(("policy", "schedule"), zip(cycle(POLICIES), SCHEDULES))  # layers do not ask who is read
def test_engine_equals_reference_for_any_number_of_stages(engine: Build, policy: str, schedule: str) -> None:
    """Where only some steps are in 8 bits, the next neighbour's features or (prior) the previous one's are converted
    on both sides; the last block is ragged."""
    options = {"context": policy, "attention_8bit": SCHEDULES[schedule]}
    asked = call(9, 4, guidance=4.0 if schedule == "int8, some layers and steps" else 1.0)
    expected = truth(build(engine, **options), asked)
    assert expected.isfinite().all() and expected.std() > 0.1
    for stages in (1, 2, 3, 4):
        made = latents(build(engine, stages=stages, **options), asked)
        assert torch.equal(made, expected), f"{stages} stages: {(made - expected).abs().max()}"


@pytest.mark.parametrize(
    "policy, own, context, steps, length",
    [
        ("cached", 2, 2, 4, 5),  # C = B
        ("paper", 2, 2, 3, 7),
        ("cached", 4, 0, 3, 9),  # C = 0: no features, but a state
        ("prior", 3, 2, 1, 7),  # T = 1
        ("cached", 1, 1, 5, 3),
        ("paper", 8, 4, 3, 5),  # M = 1
    ],
)
def test_other_shapes(engine: Build, policy: str, own: int, context: int, steps: int, length: int) -> None:
    options = {"frames_per_block": own, "context_frames": context, "context": policy, "attention_8bit": "int8"}
    asked = call(length, steps)
    expected = truth(build(engine, **options), asked)
    for stages in (1, 3):
        assert torch.equal(latents(build(engine, stages=stages, **options), asked), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_two_experts(engine: Build, wan22: Path, policy: str) -> None:
    """The other expert takes over among the steps in 8 bits, with means of the one before."""
    options = {"context": policy, "attention_8bit": EightBitPolicy("int8", last_steps=1)}
    asked = {**call(9, 6, guidance=3.0), "guidance_scale_2": 2.0}
    expected = truth(build(engine, wan22, **options), asked)
    assert torch.equal(latents(build(engine, wan22, stages=2, **options), asked), expected)


def no_mean(k_sums: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.zeros_like(k_sums[0])


LEND, TO_8BIT, TO_16BIT, ARENA = (getattr(dualparal.reference, n) for n in ("lend", "to_8bit", "to_16bit", "arena"))


def lend(**wrong: Any) -> Callable[..., KeysValues | Features8]:
    def lend(made: KeysValues | Context8, *rows: int) -> KeysValues | Features8:
        lent = LEND(made, *rows)
        if isinstance(lent, Features8):
            return lent._replace(**{n: f(lent) for n, f in wrong.items()})
        return lent

    return lend


def arena(mean: torch.Tensor | None, parts: Any, like: torch.Tensor, *rest: Any) -> Context8:
    return ARENA(torch.zeros(like.shape[1]) if mean is None else mean, parts, like, *rest)


MISTAKES: dict[str, tuple[str, Any]] = {
    "the mean of the step before is not kept": ("key_mean", no_mean),
    "nor found at the first step": ("arena", arena),
    "a neighbour's mean is forgotten": ("lend", lend(mean=lambda lent: torch.zeros_like(lent.mean))),
    "rows that fill a tile are read": ("lend", lend(skip=lambda lent: 0)),
    "features in 16 bits are converted with another mean": (
        "to_8bit", lambda features, *rest: TO_8BIT(KeysValues(features.keys + 1, features.values), *rest)
    ),
    "features in 8 bits are converted without it": (
        "to_16bit", lambda lent, dtype: TO_16BIT(lent._replace(mean=torch.zeros_like(lent.mean)), dtype)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_equality_can_fail(engine: Build, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    """cached: the tail begins inside of a tile; the head is converted at the first step in 8 bits, after the last."""
    options = {"attention_8bit": EightBitPolicy("int8", first_steps=1, last_steps=1)}
    asked = call(9, 4)
    made = latents(build(engine, **options), asked)
    assert torch.equal(made, truth(build(engine, **options), asked))
    monkeypatch.setattr(dualparal.reference, *MISTAKES[mistake])
    assert not torch.equal(made, truth(build(engine, **options), asked))


@pytest.mark.parametrize("mode, limit", [("int8", 1.5), ("fp8", 2.5)])
def test_near_the_video_in_16_bits(engine: Build, mode: str, limit: float) -> None:
    """Attention itself errs 1.4 to 4 times as much as in bfloat16 (docs/attention-8bit.md), fp8 some 6 times; but
    only its output is added, and every other operation of a layer rounds as before."""
    asked = call(9, 5)
    exact = latents(build(engine, dtype="float32"), asked)
    plain, ours = (latents(build(engine, attention_8bit=kind), asked) for kind in ("off", mode))

    def error(made: torch.Tensor) -> float:
        return float((made - exact).norm() / exact.norm())

    assert 1e-3 < error(plain) < 1e-2
    assert error(ours) < limit * error(plain), (error(ours), error(plain))
    assert float((ours - plain).norm() / plain.norm()) > 1e-3, "it is on"


def test_on_where_it_was_asked_for_and_only_in_self_attention(engine: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {"attention": [], "attention_8bit": [], "qk_norm_rope_8bit": []}
    for name, calls in seen.items():
        original = getattr(transformer, name)

        def counted(*args: Any, _calls: list[int] = calls, _original: Any = original, **kwargs: Any) -> Any:
            _calls.append(len(args[1]) if isinstance(args[1], torch.Tensor) else -1)
            return _original(*args, **kwargs)

        monkeypatch.setattr(transformer, name, counted)
    schedule = EightBitPolicy("int8", keep_layers=(3,), first_steps=2, last_steps=1)
    asked = call(9, 5)  # 3 blocks of 5 steps, of which 2 are in 8 bits, in 3 of 4 layers
    latents(build(engine, attention_8bit=schedule), asked)
    units, text = 3 * 5 * 4, 16
    assert len(seen["attention_8bit"]) == 3 * 2 * 3
    assert len(seen["qk_norm_rope_8bit"]) == 3 * 2 * 3 + 3 * 3, "once more at a block's first step"
    assert seen["attention"].count(text) == units, "text is attended to in 16 bits"
    assert len(seen["attention"]) == 2 * units - 3 * 2 * 3


def test_off_does_nothing(engine: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = call(9, 3)
    made = latents(build(engine), asked)
    for name in ("attention_8bit", "qk_norm_rope_8bit"):
        monkeypatch.setattr(transformer, name, lambda *a, **k: pytest.fail("8 bits"))
    monkeypatch.setattr(Workspace8, "__init__", lambda *a, **k: pytest.fail("8 bits"))
    assert torch.equal(latents(build(engine, attention_8bit="off"), asked), made)


# The store


@pytest.mark.parametrize("policy", POLICIES)
def test_refreshes_are_in_16_bits(engine: Build, policy: str) -> None:
    """And what they leave behind is converted; the means of keys begin anew."""
    options = {"context": policy, "attention_8bit": "int8", "refresh_every": 3}
    asked = call(17, 4)
    expected = truth(build(engine, **options), asked)
    assert not torch.equal(expected, truth(build(engine, **{**options, "refresh_every": None}), asked))
    for stages in (1, 3):
        made = latents(build(engine, stages=stages, **options), asked)
        assert torch.equal(made, expected), f"{stages} stages: {(made - expected).abs().max()}"


@pytest.mark.parametrize("fp8", [False, True])
def test_slots_hold_either_format(fp8: bool) -> None:
    tokens, inner, heads, count, slots = 1000, 128, 2, 500, 3
    device = torch.device("cpu")
    plain = Workspace(tokens, {"tail": count}, inner, torch.bfloat16, device)
    values_dtype = FP8 if fp8 else torch.bfloat16
    eight = Workspace8(tokens, {"tail": tokens - count}, count, inner, heads, values_dtype, device)
    formats = {False: plain.fresh("tail", "meta"), True: eight.fresh("tail", "meta").tensors}
    both, only_16, only_8 = (
        FeatureStore({"tail": slots}, 1, [{"tail": chosen}] * 2, device)
        for chosen in (formats, {False: formats[False]}, {True: formats[True]})
    )
    rows = 500 + 500 % 128  # from the start of a tile on
    tiles = -(-rows // 128)
    values = inner * tiles * 128 + 4 * heads * tiles if fp8 else 2 * rows * inner
    assert only_16.nbytes == 2 * slots * 4 * count * inner
    exact = 2 * slots * (rows * inner + 4 * heads * tiles + values + 4 * inner)
    assert exact <= only_8.nbytes < exact + 2 * slots * 5 * 16
    assert only_8.nbytes < (0.7 if fp8 else 0.95) * only_16.nbytes
    # The largest of either format: keys in 16 bits, values in 16 bits with the rows that fill a tile, or without (fp8)
    largest = 2 * inner * (count + (count if fp8 else rows)) + 4 * inner + 4 * heads * tiles * (2 if fp8 else 1)
    assert 2 * slots * largest <= both.nbytes < 2 * slots * (largest + 5 * 16)

    def filled(tensors: Any, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors]

    made = [filled(formats[bool(i % 2)], i) for i in range(slots)]
    for layer in range(2):
        for slot, tensors in enumerate(made):
            both.save(layer, "tail", bool(slot % 2), both.row("tail", slot, 0), tensors)
    for slot, tensors in enumerate(made):
        places = [torch.empty(*t.shape[:-1], t.shape[-1] + 8, dtype=t.dtype)[..., :-8] for t in tensors]
        both.load(1, "tail", bool(slot % 2), both.row("tail", slot, 0), places)
        for ours, want in zip(places, tensors, strict=True):
            assert torch.equal(ours.float(), want.float()) and (ours.dtype != FP8 or fp8)


# What is refused


@pytest.mark.parametrize(
    "options, words",
    [
        ({"attention_8bit": "int4"}, "mode='int4'"),
        ({"attention_8bit": 8}, "mode=8"),
        ({"attention_8bit": EightBitPolicy("int8", (0, 4))}, "the model has 4 layers; use indices from 0 to 3"),
        ({"attention_8bit": EightBitPolicy("int8", (0, 1, 2, 3))}, "none of the model's 4 layers"),
        ({"attention_8bit": "fp8", "dtype": "float32"}, "dtype=float32.*dtype='bfloat16'"),
        ({"attention_8bit": "int8", "dtype": None}, "dtype=float32"),
    ],
)
def test_bad_values_are_refused_before_files_are_read(
    engine: Build, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    from dualparal.models.files import ModelFiles

    monkeypatch.setattr(ModelFiles, "check_weights", lambda *_, **__: pytest.fail("weights were looked at"))
    with pytest.raises(ValueError, match=words):
        build(engine, **options)


def test_a_head_that_the_kernel_does_not_know_is_refused(
    engine: Build, wan21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where the definition would be too slow to be taken unasked."""
    setup = build(engine, attention_8bit="int8", dtype="bfloat16").setup
    on_card = replace(setup, mesh=replace(setup.mesh, device=torch.device("cuda")))
    with pytest.raises(ValueError, match="attention_8bit='int8' cannot run: head_dim is 24"):
        on_card.check_8bit()


def test_a_schedule_without_a_step_is_refused_before_weights_are_read(
    engine: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(engine, attention_8bit=EightBitPolicy("int8", first_steps=2, last_steps=2))
    monkeypatch.setattr(built.source.__class__, "load_slices", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="first_steps=2 and last_steps=2 leave none of 4 steps"):
        built.stream("a cat", **call(9, 4))
