"""The quality meter: the truth is ideal in every figure, and a flaw moves the figure that is its own, and no other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality
import torch
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler
from meter import fifo, persistence, quality_report, scene_classifier, scene_metrics
from scenes import COLOURS, Scene, Thing, render, sample_scene, trajectories, video

from dualparal.models.wan.tiny import build_tiny_pipeline

FRAMES = 125  # 32 latents
STARTS = [8, 16, 24]
JUMP = 4 * 16 - 3  # first frame of a block in the middle
SCENE = Scene(
    (Thing("circle", "red", 8.0), Thing("circle", "red", 9.0), Thing("square", "blue", 9.0)),
    "drifting left", "gray", checkered=False, spinning=False,
)  # fmt: skip
# What the truth may be off by: it is made of pixels, and its speed is not in the caption.
IDEAL = {
    "seam": (0.8, 1.25), "right": (1, 1), "many": (0, 0), "few": (0, 0), "colour": (0, 0), "held": (1, 1),
    "kept": (1, 1), "lost": (0, 0), "gained": (0, 0), "split": (0, 0), "recoloured": (0, 0), "inside": (0, 0),
    "at_seam": (0, 0), "motion": (1, 1), "ground": (0, 0.002), "contrast": (0.98, 1.02), "ground_right": (1, 1),
}  # fmt: skip


def off(frames: np.ndarray, scene: Scene) -> set[str]:
    """The figures that are not ideal."""
    figures, _ = scene_metrics.measure(frames, scene, STARTS)
    assert figures.keys() == IDEAL.keys()
    return {name for name, (low, high) in IDEAL.items() if not low <= figures[name] <= high}


def truth(scene: Scene = SCENE, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    return trajectories(scene, FRAMES, np.random.default_rng(seed))


def draw(scene: Scene, positions: np.ndarray, angles: np.ndarray) -> np.ndarray:
    return np.rint(render(scene, positions, angles) * 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_truth_is_ideal(seed: int) -> None:
    rng = np.random.default_rng([5, seed])
    scene = sample_scene(rng)
    found = off(video(scene, FRAMES, rng), scene)
    # Where a thing turns round or bounces is chance: three seams are few.
    assert found <= ({"seam"} if scene.motion in ("bouncing", "swinging") else set()), scene.caption()


def vanishing() -> np.ndarray:
    positions, angles = truth()
    frames = draw(SCENE, positions, angles)
    frames[70:] = draw(replace(SCENE, things=SCENE.things[1:]), positions[70:, 1:], angles[70:, 1:])
    return frames


def recoloured() -> np.ndarray:
    positions, angles = truth()
    things = (*SCENE.things[:2], replace(SCENE.things[2], colour="green"))
    return np.concatenate(
        [draw(SCENE, positions[:70], angles[:70]), draw(replace(SCENE, things=things), positions[70:], angles[70:])]
    )


def jumping() -> np.ndarray:
    positions, angles = truth()
    positions[JUMP:] += (0, 5)
    return draw(SCENE, positions, angles)


def brightening() -> np.ndarray:
    light = np.linspace(0, 0.08, FRAMES)[:, None, None, None]
    return np.rint((render(SCENE, *truth()) + light).clip(0, 1) * 255).astype(np.uint8)


def fading() -> np.ndarray:
    """Objects turn gray, the background stays."""
    frames, ground = render(SCENE, *truth()), np.array([0.45, 0.45, 0.47])
    share = np.linspace(1, 0.7, FRAMES)[:, None, None, None]
    return np.rint((ground + share * (frames - ground)) * 255).astype(np.uint8)


def too_many() -> np.ndarray:
    scene = replace(SCENE, things=(*SCENE.things, Thing("square", "blue", 7.0)))
    return draw(scene, *truth(scene, 3))


def frozen() -> np.ndarray:
    positions, angles = truth()
    return draw(SCENE, np.broadcast_to(positions[:1], positions.shape), angles)


def turned_back() -> np.ndarray:
    """Smooth, and right in everything but the way it goes."""
    positions, angles = truth()
    return draw(SCENE, positions[::-1], angles[::-1])


def other_ground() -> np.ndarray:
    return draw(replace(SCENE, background="dark"), *truth())


FLAWS: list[tuple[Callable[[], np.ndarray], set[str]]] = [
    (vanishing, {"right", "few", "held", "kept", "lost", "inside"}),
    (recoloured, {"right", "colour", "held", "kept", "recoloured", "inside"}),
    (jumping, {"seam"}),
    (brightening, {"ground"}),
    (fading, {"contrast"}),
    (too_many, {"right", "many"}),
    (frozen, {"motion"}),
    (turned_back, {"motion"}),
    (other_ground, {"ground_right"}),
]


@pytest.mark.parametrize(("flawed", "figures"), FLAWS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_flaw_moves_its_own_figure(flawed: Callable[[], np.ndarray], figures: set[str]) -> None:
    assert off(flawed(), SCENE) == figures


def test_held_is_where_it_broke() -> None:
    share = (70 - persistence.STARTUP) / (FRAMES - persistence.STARTUP)
    assert persistence.held(scene_metrics.track(vanishing())) == pytest.approx(share)


def test_a_flicker_is_forgiven_by_held_and_not_by_right() -> None:
    positions, angles = truth()
    frames = draw(SCENE, positions, angles)
    frames[0], frames[60:63], frames[-1] = 115, 115, 115
    seen = scene_metrics.track(frames)
    assert persistence.held(seen) == 1
    assert scene_metrics.counts_right(seen, SCENE).sum() == FRAMES - 5


def faults(seed: int) -> tuple[np.ndarray, list[persistence.Event]]:
    """A true clip in which an object is lost and comes back, is doubled and not, is recoloured and not."""
    rng = np.random.default_rng([8, seed])
    scene = sample_scene(rng)
    length, first = 12, 30
    positions, angles = trajectories(scene, first + 6 * length, rng)
    thing, things = scene.things[0], scene.things
    here = [slice(first + n * length, first + (n + 1) * length) for n in range(6)]
    frames = draw(scene, positions, angles)
    frames[here[0]] = draw(replace(scene, things=things[1:]), positions[here[0], 1:], angles[here[0], 1:])
    grid = np.stack(np.meshgrid(np.arange(0, 64, 4), np.arange(0, 64, 4)), -1).reshape(-1, 2)
    step = (grid[:, None, None] - positions[None, here[2]] + 32) % 64 - 32
    free = (np.linalg.norm(step, axis=-1) - [t.radius for t in things]).min((1, 2))
    place = np.broadcast_to(grid[free.argmax()], (length, 1, 2))
    copied = np.concatenate([positions[here[2]], place], 1), np.pad(angles[here[2]], ((0, 0), (0, 1)))
    frames[here[2]] = draw(replace(scene, things=(*things, replace(thing, radius=8.0))), *copied)
    colour = str(rng.choice([name for name in COLOURS if name != thing.colour]))
    other = replace(scene, things=(replace(thing, colour=colour), *things[1:]))
    frames[here[4]] = draw(other, positions[here[4]], angles[here[4]])
    kinds = ("lost", "gained", "gained", "lost", "recoloured", "recoloured")
    return frames, [persistence.Event(part.start, kind) for part, kind in zip(here, kinds)]


def test_injected_faults_are_found() -> None:
    found = dict.fromkeys(persistence.KINDS, 0)
    asked, more = dict(found), 0
    for seed in range(20):
        frames, expected = faults(seed)
        seen = persistence.events(scene_metrics.track(frames))
        for event in expected:
            asked[event.kind] += 1
            match = [e for e in seen if e.kind == event.kind and abs(e.frame - event.frame) <= 1]
            found[event.kind] += bool(match)
        more += len(seen) - len(expected)
    assert all(found[kind] >= 0.95 * asked[kind] for kind in ("lost", "gained", "recoloured")), found
    assert abs(more) <= 0.05 * 6 * 20


def test_one_that_divides_is_split() -> None:
    """Two circles overlap, then part: the area hardly grows, so nothing was gained."""
    scene = replace(SCENE, things=(Thing("circle", "red", 8.0), Thing("circle", "red", 8.0)))
    apart = np.concatenate([np.zeros(30), np.linspace(0, 24, 30), np.full(20, 24.0)])
    positions = np.stack([np.stack([20 + side * apart, np.full(80, 30.0)], -1) for side in (0, 1)], 1)
    seen = persistence.events(scene_metrics.track(draw(scene, positions, np.zeros((80, 2)))))
    assert [event.kind for event in seen] == ["split"]


def test_touching_objects_of_one_colour_are_two_also_across_the_edge() -> None:
    scene = replace(SCENE, things=(Thing("circle", "red", 9.0), Thing("circle", "red", 9.0)))
    for x in (20.0, 60.0):
        positions = np.array([[[x, 30.0], [x + 18.3, 30.0]]])
        seen = scene_metrics.track(draw(scene, positions, np.zeros((1, 2))))
        assert seen.counts[0, list(COLOURS).index("red")] == 2
        assert np.allclose(np.sort(seen.blobs.centre[:, 0]), np.sort(positions[0, :, 0] % 64), atol=0.3)


def test_blur_and_noise_are_no_objects() -> None:
    frames = torch.from_numpy(draw(SCENE, *truth())).permute(0, 3, 1, 2).float()
    soft = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(frames, (1, 1, 1, 1), mode="circular"), 3, 1)
    soft += 6 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    found = off(soft.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy(), SCENE)
    assert not found


def test_an_empty_video_has_nothing_right() -> None:
    figures, _ = scene_metrics.measure(np.full((61, 64, 64, 3), 115, np.uint8), SCENE, [8])
    assert figures["right"] == figures["held"] == figures["kept"] == 0
    assert all(math.isnan(figures[name]) for name in ("motion", "contrast"))


def test_frechet_distance_of_normal_distributions() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((20000, 4))
    second = 2 * rng.standard_normal((20000, 4)) + [1, 0, 0, 0]
    assert quality_report.frechet(first, second) == pytest.approx(1 + 4 * (1 - 2) ** 2, rel=0.05)
    assert quality_report.frechet(first, first) == pytest.approx(0, abs=1e-3)


def test_the_classifier_reads_the_truth() -> None:
    scored: dict[str, list[bool]] = {}
    for seed in range(24):
        rng = np.random.default_rng([6, seed])
        scene = sample_scene(rng)
        features, said = scene_classifier.load().read(video(scene, scene_classifier.SPAN, rng))
        assert features.shape == (1, scene_classifier.FEATURES)
        for name, answer in scene_classifier.answers(scene).items():
            scored.setdefault(name.split()[0], []).extend(said[name] == answer)
    chance = {
        "motion": 1 / 8,
        "background": 1 / 4,
        "checkered": 1 / 2,
        "spinning": 1 / 2,
        "number": 0.7,
        "shape": 1 / 3,
    }
    for name, right in scored.items():
        assert np.mean(right) > chance[name] + 0.3 * (1 - chance[name]), name
    assert scene_classifier.WEIGHTS.stat().st_size <= 400_000


def test_starts_of_blocks_are_the_engines() -> None:
    assert quality.VARIANTS["cached"].starts(24) == [8, 16]
    assert quality.VARIANTS["paper"].starts(24) == [12, 20]  # its first block has C more
    assert quality.VARIANTS["whole"].starts(16) == quality.VARIANTS["fifo"].starts(80) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny", layers=2, vae_dim=2))


@pytest.mark.parametrize(
    "scheduler, guidance",
    [(UniPCMultistepScheduler(flow_shift=2.0), 2.0), (FlowMatchLCMScheduler(shift=5.0), 1.0)],  # the package's last
)
def test_fifo_takes_every_frame_through_all_levels(
    model: str, monkeypatch: pytest.MonkeyPatch, scheduler: Any, guidance: float
) -> None:
    """A model that knows the clean frame, and believes the level it is told, ends on it only if levels are right."""
    pipe = quality.load_pipe(model)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    clean = torch.linspace(-1, 1, 16).view(1, 16, 1, 1, 1)  # one value per channel
    calls = []

    def velocity(
        hidden: torch.Tensor, times: torch.Tensor, text: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        level = times.view(len(hidden), -1, 16)[:, :, 0].view(len(hidden), 1, -1, 1, 1) / 1000
        assert level.shape[2] == fifo.WINDOW
        calls.append(level)
        return ((hidden - clean) / level.clamp_min(1e-9),)

    monkeypatch.setattr(pipe.transformer, "forward", velocity)
    made = fifo.generate(pipe, "a", size=(8, 8), num_latents=6, steps=16, guidance_scale=guidance, seed=0)
    assert made.shape == (1, 16, 6, 8, 8)
    assert len(calls) == (1 + (guidance > 1)) * (16 + 6)  # the clip's steps, then one for each frame
    assert (made - clean).abs().max() < 1e-3
    with pytest.raises(ValueError, match="half windows"):
        fifo.generate(pipe, "a", size=(8, 8), num_latents=6, steps=20, guidance_scale=2.0, seed=0)


@torch.inference_mode()
def test_a_timestep_per_token_is_the_timestep_where_all_are_equal(model: str) -> None:
    """What fifo.py builds on: diffusers' model, with times as a matrix."""
    transformer = quality.load_pipe(model).transformer
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, transformer.config.text_dim, generator=torch.Generator().manual_seed(1))
    one = transformer(latents, torch.tensor([700.0]), text, return_dict=False)[0]
    each = transformer(latents, torch.full((1, 3 * 16), 700.0), text, return_dict=False)[0]
    assert (one - each).abs().max() < 1e-4
    each = transformer(latents, torch.tensor([[700.0] * 32 + [100.0] * 16]), text, return_dict=False)[0]
    assert (one - each)[:, :, 2].abs().max() > 1e-2


def test_the_command_goes_on_where_it_stopped(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["truth", "vae", "cached T4", "cached forced"]
    monkeypatch.setattr(quality_report, "RENDERINGS", 3)
    arguments = ["--model", model, "--variants", *names, "--latents", "10", "--prompts", "1", "--seeds", "2"]
    arguments += ["--cache", str(tmp_path / "kept"), "--figures", str(tmp_path / "figures")]
    rows = quality.main(arguments)
    assert [row["variant"] for row in rows] == names
    first = rows[0]
    assert first["right"] == first["kept"] == first["motion"] == 1
    assert rows[1]["of_vae"] == 1 or not rows[1]["held"]
    assert rows[2]["right"] < 1 and rows[2]["frechet"] > first["frechet"], "random weights make no such videos"
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "quality-table.md", "quality-curves-10.png", "quality-strips-10.png",
    }  # fmt: skip
    out = capsys.readouterr().out
    assert all(word in out for word in ("truth", "vae", "T4"))
    monkeypatch.setattr(quality, "make_latents", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(scene_metrics, "measure", lambda *_: pytest.fail("measured again"))
    again = quality.main([*arguments, "--against", "cached T4", "--before", model])
    assert str(again[:4]) == str(rows)
    assert again[4]["variant"] == "cached T4, before" and str(again[4] | {"variant": "cached T4"}) == str(rows[2])
    assert "cached forced against cached T4, before" in capsys.readouterr().out


def test_a_forced_video_begins_with_the_truth(model: str) -> None:
    for name, known in (("cached forced", 8), ("paper forced", 12)):
        job = quality.Job(replace(quality.VARIANTS[name], steps=2), known + 6, 0, 0)
        made = quality.make_latents(model, job)
        truth = quality.encode(quality.load_pipe(model).vae, job.truth()[: 4 * known - 3])
        assert made.shape[2] == known + 6 and torch.equal(made[:, :, :known], truth)


def test_unknown_variants_are_named(model: str) -> None:
    with pytest.raises(SystemExit, match="no variant 'nonsense'"):
        quality.main(["--model", model, "--variants", "nonsense"])
    for wrong in (["--before", model], ["--against", "nonsense", "--before", model], ["--against", "cached T4"]):
        with pytest.raises(SystemExit, match="2"):
            quality.main(["--model", model, "--variants", "cached", *wrong])


def test_differences_are_taken_by_caption() -> None:
    """Captions far apart and a constant difference: the interval is as narrow as that difference is steady."""
    steady = 0.001 * np.array([-1, 1, -1, 1, -1, 1])
    base = {(p, 0): {f"figure {n}": np.array(0.1 + 0.1 * p) for n in quality_report.PAIRED} for p in range(6)}
    other = {
        key: {n: v * 2 if n in ("figure seam", "figure seconds") else v + 0.03 + steady[key[0]] for n, v in x.items()}
        for key, x in base.items()
    }
    for name, (value, low, high) in quality_report.differences(other, base).items():
        if name in quality_report.RATIOS:
            assert value == pytest.approx(2) and math.isnan(low) and math.isnan(high)  # all agree: nothing is said
            continue
        unit = 1 if name in quality_report.EVENTS else 100
        assert (value, (high - low) / 2) == pytest.approx((0.03 * unit, 2.5706 * 0.001 * unit / math.sqrt(5)), rel=1e-3)
    few = {key: video for key, video in other.items() if key[0] < 5}
    assert all(math.isnan(low) for _, low, _ in quality_report.differences(few, base).values())


def test_intervals_cover() -> None:
    """Of 1,000 paired differences of shares, two seeds of a caption, 95 % hold the true one: from six captions on."""
    rng = np.random.default_rng(0)
    for captions in (6, 20):
        hits = 0
        for _ in range(1000):
            level = rng.beta(0.5, 0.5, (captions, 1))
            pairs = list(rng.binomial(20, level, (captions, 2)) / 20 - rng.binomial(20, level**2, (captions, 2)) / 20)
            _, low, high = quality_report.interval(quality_report.mean_of(pairs), captions)
            hits += low <= 0.5 - 0.375 <= high  # the mean of x and of its square
        assert 0.93 <= hits / 1000 <= 0.98, captions


def test_a_finding_takes_twenty_captions_and_two_seeds() -> None:
    videos = {(prompt, seed): {} for prompt in range(20) for seed in range(2)}
    assert quality_report.is_finding(videos, 0.1, 0.2, ratio=False)
    assert not quality_report.is_finding(videos, -0.1, 0.2, ratio=False)
    assert not quality_report.is_finding(videos, 0.9, 1.2, ratio=True)
    one_seed = {key: found for key, found in videos.items() if not key[1]}
    fewer = {key: found for key, found in videos.items() if key[0]}
    assert not any(quality_report.is_finding(few, 0.1, 0.2, ratio=False) for few in (one_seed, fewer))
