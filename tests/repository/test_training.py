"""The commands that train the model in the box (tools/), at a tiny setting: they run, learn, go on and export."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import export_model
import learner
import make_latents
import numpy as np
import pytest
import sampler
import scenes
import torch
import train_decoder
import train_lora
import train_reward
import train_transformer
import train_vae
from diffusers import FlowMatchLCMScheduler
from safetensors.torch import load_file, save_file

import dualparal

FOUR_STEPS = ("--schedule", "4:2x4")


@pytest.fixture(scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    """Models and clips a fraction of their size."""
    with pytest.MonkeyPatch.context() as patch:
        for config, changes in (
            (train_vae.CONFIG, {"base_dim": 8, "decoder_base_dim": 8}),
            (learner.TRANSFORMER, {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 128}),
        ):
            for name, value in changes.items():
                patch.setitem(config, name, value)
        patch.setattr(make_latents, "FRAMES", 33)
        yield patch


def run(module: ModuleType, *arguments: object) -> None:
    """What ``python tools/<module>.py`` does, in this process: a new one imports for many seconds."""
    if module is not export_model:
        arguments += ("--float32",)  # many processors take a hundred times as long in bfloat16
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        torch.manual_seed(os.getpid())  # as little to build on as in a new process
        module.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> Path:
    out = tmp_path_factory.mktemp("train")
    run(train_vae, "--out", out, "--schedule", "26:1x4,34:5x1")
    run(make_latents, "--out", out, "--clips", 16)
    for steps, minutes in (
        ("30:2x16", 0),
        ("30:2x16", 9),
        ("30:2x16,90:4x8", 9),
    ):  # one step, which is an untrained model
        run(train_transformer, "--out", out, "--schedule", steps, "--minutes", minutes)
    return out


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns(trained: Path) -> None:
    of_vae = {row["step"]: row["l1"] for row in rows(trained / "vae.jsonl")}
    assert of_vae[33] < 0.9 * of_vae[0]
    untrained, *_, learnt = (row["whole"] for row in rows(trained / "transformer.jsonl"))
    assert learnt < 0.95 * untrained


def start(out: Path, trained: Path) -> Path:
    out.mkdir()
    (out / "latents").symlink_to(trained / "latents")
    return out


def test_a_stopped_run_goes_on_where_it_was(trained: Path, tmp_path: Path) -> None:
    states = []
    for name, stops in (("straight", [9]), ("stopped", [0, 0, 9])):  # 0 minutes: one step at a time
        out = start(tmp_path / name, trained)
        for minutes in stops:
            run(train_transformer, "--out", out, *FOUR_STEPS, "--minutes", minutes)
        states.append(load_file(out / "transformer.safetensors"))
    straight, stopped = states
    assert straight.keys() == stopped.keys() and int(stopped["step"]) == 4
    assert all(straight[name].equal(stopped[name]) for name in straight)


def test_the_export_is_a_pipeline(trained: Path, tmp_path: Path) -> None:
    run(export_model, "--out", trained, "--model", tmp_path / "model", "--guidance-scale", 1)
    engine = dualparal.Engine.from_pretrained(tmp_path / "model", frames_per_block=2, context_frames=1, device="cpu")
    shipped = dualparal.Engine.from_pretrained("moving-shapes", device="cpu")
    assert engine.source.defaults == shipped.source.defaults and engine.source.defaults.guidance_scale == 1
    assert engine.scheduler.config == shipped.scheduler.config
    frames = engine("a red circle on a dark background", num_frames=17, num_inference_steps=2).frames
    assert np.asarray(frames).shape[-4:] == (17, 64, 64, 3)


@pytest.mark.parametrize(("parts", "_share"), train_transformer.QUEUE)
def test_blocks_of_a_queue_are_a_gap_apart(parts: tuple[int, int, int], _share: float) -> None:
    levels = train_transformer.queue_levels(np.random.default_rng(0), 500, parts)
    assert levels.shape == (500, sum(parts)) and levels.min() > 0 and levels.max() <= 1
    before, own, behind = np.split(levels, np.cumsum(parts)[:-1], axis=1)
    for block in (before, own, behind):
        assert not block.size or (block == block[:, :1]).all()
    assert not before.size or (before[:, 0] < own[:, 0]).all()
    if behind.size:
        assert (own[:, 0] < behind[:, 0]).all()
    else:  # the newest block: the next one enters when it has got to where that begins
        assert own.min() > train_transformer.shifted(0.5, train_transformer.SHIFTS[0])


def test_windows_of_equal_noise_are_mostly_high() -> None:
    levels = train_transformer.equal_levels(np.random.default_rng(0), 2000, 3, 0.6)
    assert (levels == levels[:, :1]).all() and levels.min() >= 0 and levels.max() <= 1
    assert 0.6 < (levels[:, 0] > train_transformer.HIGH).mean() < 0.75


def test_a_mixture_has_kinds_that_exist() -> None:
    assert train_transformer.mixture("whole:1,queue:3") == {"whole": 0.25, "queue": 0.75}
    with pytest.raises(argparse.ArgumentTypeError, match="long:1: kinds are whole, short and queue"):
        train_transformer.mixture("long:1")


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with model/, and with latents/ and short/."""
    out = start(tmp_path_factory.mktemp("exported") / "all", trained)
    run(export_model, "--out", trained, "--model", out / "model")
    vae = out / "model/vae"
    run(make_latents, "--out", out, "--vae", vae, "--latents", "short", "--frames", 29, "--clips", 16, "--seed", 1)
    return out


@pytest.fixture
def short_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """All videos here have nine latent frames."""
    monkeypatch.setattr(train_transformer, "QUEUE", (((2, 4, 0), 0.5), ((2, 4, 2), 0.25), ((0, 4, 2), 0.25)))


@pytest.fixture
def short_rounds(short_queue: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips of a block of four latents, of two blocks, and a queue of three."""
    sizes = {"BLOCK": 4, "CONTEXT": 2}
    kinds = {4: (0.3, 48, 4, 4), 8: (0.2, 64, 4, 4), 12: (0.5, 48, 2, 6)}
    rounds = {"WHOLE": 8, "BATCH": 48, "CLIPS": {frames: train_reward.Clips(*kind) for frames, kind in kinds.items()}}
    for module, values in (
        (train_reward, sizes | rounds),
        (sampler, sizes | {"STEPS": 3, "QUEUE_STEPS": 3, "QUEUE_GAP": 1}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def reward(exported: Path, out: Path, *arguments: object) -> dict[str, torch.Tensor]:
    """What a run from finished weights leaves."""
    run(train_reward, "--out", out, "--start", exported / "model", "--data", exported, *arguments)
    return load_file(out / "transformer.safetensors")


def test_finished_weights_learn_on(trained: Path, exported: Path, tmp_path: Path, short_queue: None) -> None:
    out, model = tmp_path / "more", tmp_path / "model"
    shutil.copytree(exported / "model", model)
    out.mkdir()
    for kind in ("latents", "short"):
        (out / kind).symlink_to(exported / kind)
    more = ("--start", model, "--mix", "whole:1,short:1,queue:2", "--high-noise", 0.7)
    run(train_transformer, "--out", out, "--schedule", "16:4x8", *more)
    first, new = load_file(trained / "transformer.safetensors"), load_file(out / "transformer.safetensors")
    name = "trained/transformer.blocks.0.ffn.net.2.weight"
    change = (first[name.replace("trained", "average", 1)] - new[name]).norm() / new[name].norm()
    assert 0 < change < 0.2  # sixteen steps away from what was exported
    run(export_model, "--out", out, "--model", model, "--vae", model / "vae")  # in the place of what it began with
    weights = load_file(model / "transformer/diffusion_pytorch_model.safetensors")
    assert weights["blocks.0.ffn.net.2.weight"].equal(new[name.replace("trained", "average", 1)].half())
    assert (model / "vae/config.json").read_text() == (exported / "model/vae/config.json").read_text()
    (row,) = rows(out / "transformer.jsonl")
    assert row["step"] == 16 and all(0 < row[kind] < 3 for kind in ("whole", "short", "queue"))


def test_guidance_is_learnt(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, cpu = start(tmp_path / "guided", exported), torch.device("cpu")
    with pytest.raises(SystemExit):
        run(train_transformer, "--out", out, "--guidance", 3)
    assert "--guidance 3 needs --start" in capsys.readouterr().err
    run(train_transformer, "--out", out, "--start", exported / "model", "--guidance", 3, "--schedule", "60:4x8")
    teacher, learnt = (learner.Learner(exported / "model", cpu, bfloat16=False) for _ in range(2))
    learnt.load(out / "transformer.safetensors")
    data = train_transformer.Data(exported / "latents", 0, cpu, teacher.scale)
    windows = train_transformer.draw("whole", data, np.random.default_rng(3), 4, 64, 0.7)
    windows.captions[:2] = ["", ""]
    noise = torch.randn(windows.clean.shape, generator=torch.Generator().manual_seed(3))
    noisy, named = windows.noisy(noise), [bool(caption) for caption in windows.captions]
    guided, plain = windows.guided(teacher, noise, 3.0), windows.guided(teacher, noise, 0.0)
    said = teacher.velocity(noisy, windows.sigma, windows.captions)
    assert torch.allclose(guided[named], (3 * said - 2 * plain)[named], atol=1e-5)
    assert torch.allclose(guided[[not name for name in named]], said[[not name for name in named]], atol=1e-5)
    with torch.no_grad():
        before, after = windows.loss(teacher, noise, guided), windows.loss(learnt, noise, guided)
    assert after < 0.8 * before


def test_where_a_block_goes_on_other_weights_may_teach(
    exported: Path, tmp_path: Path, short_queue: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = start(tmp_path / "two", exported), tmp_path / "other"
    with pytest.raises(SystemExit):
        run(train_transformer, "--out", out, "--start", exported / "model", "--going-on", other)
    shutil.copytree(exported / "model", other)
    path = other / "transformer/diffusion_pytorch_model.safetensors"
    save_file(
        load_file(path) | {"proj_out.bias": torch.full_like(load_file(path)["proj_out.bias"], 7.0)},
        path,
        {"format": "pt"},
    )
    guided, seen = train_transformer.Windows.guided, set()

    def watched(
        windows: train_transformer.Windows, teacher: learner.Learner, noise: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        said = guided(windows, teacher, noise, guidance)
        again = teacher.velocity(windows.noisy(noise), windows.sigma, windows.captions)
        assert torch.allclose(said, again, atol=1e-4)  # guidance 1
        frames = windows.sigma[0].tolist()
        seen.add((frames[0] < frames[2], bool((teacher.weights["transformer"].proj_out.bias == 7).all())))
        return said

    monkeypatch.setattr(train_transformer.Windows, "guided", watched)
    flags = ("--guidance", 1, "--mix", "queue:2,whole:1", "--schedule", "12:4x8")
    run(train_transformer, "--out", out, "--start", exported / "model", "--going-on", other, *flags)
    assert seen == {(True, True), (False, False)}


def test_a_lora_learns_a_queue(
    exported: Path, tmp_path: Path, short_queue: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_lora, "WHOLE", 4)
    monkeypatch.setattr(train_lora, "TOTAL", 48)
    model, out, cpu = exported / "model", tmp_path / "lora", torch.device("cpu")
    for minutes in (0, 9):  # one step, and the rest
        flags = ("--rank", 4, "--steps", 40, "--minutes", minutes)
        run(train_lora, "--out", out, "--model", model, "--data", exported, *flags)
    assert [row["step"] for row in rows(out / "lora.jsonl")] == [1, 40]
    before, after = (learner.Learner(folder, cpu, bfloat16=False) for folder in (model, out / "merged"))
    data = train_transformer.Data(exported / "latents", 0, cpu, before.scale)
    windows = train_transformer.draw("queue", data, np.random.default_rng(3), 4, 96, 0.7)
    noise = torch.randn(windows.clean.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        losses = [windows.loss(each, noise).item() for each in (before, after)]
    assert losses[1] < 0.98 * losses[0], losses

    def latents(folder: Path, *loras: Path) -> torch.Tensor:
        engine = dualparal.Engine.from_pretrained(
            folder, loras=loras, frames_per_block=2, context_frames=1, device="cpu"
        )
        made: torch.Tensor = engine("a red circle", num_frames=17, num_inference_steps=2, output_type="latent").frames
        return made

    plain, merged, added = latents(model), latents(out / "merged"), latents(model, out / "lora.safetensors")
    assert (added - merged).norm() < 0.05 * (added - plain).norm()  # merged weights are rounded to 16 bits


def test_what_is_rewarded_becomes_more(
    exported: Path, tmp_path: Path, short_rounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_reward, "KEPT", 0.0)
    monkeypatch.setattr(train_reward, "OTHERS", ())
    levels = {}
    for name, sign in (("bright", 1), ("dark", -1)):
        seen = []

        def judge(_: train_reward.Judge, clips: torch.Tensor, of: list[scenes.Scene]) -> np.ndarray:
            assert len(clips) == len(of)
            level = clips[:, 0].mean((2, 3))
            seen.append(level.mean().item())  # noqa: B023
            return (0.5 + 5 * sign * (level - 0.2)).clamp(0, 1).double().numpy()  # noqa: B023

        monkeypatch.setattr(train_reward.Judge, "__call__", judge)
        reward(exported, tmp_path / name, "--rounds", 4, "--rate", 1.0)
        levels[name] = seen
    first, last = (levels["bright"][place] - levels["dark"][place] for place in (0, -1))
    assert first == 0 and last > 0.05, levels


def test_rounds_keep_what_a_teacher_says(
    exported: Path, tmp_path: Path, short_rounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        train_reward.Judge, "__call__", lambda _, clips, of: np.ones((len(clips), clips.shape[2]))
    )  # all alike: no clip teaches
    teacher, out, cpu = shutil.copytree(exported / "model", tmp_path / "teacher"), tmp_path / "out", torch.device("cpu")
    path = teacher / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"proj_out.bias": weights["proj_out.bias"] + 0.1}, path, {"format": "pt"})
    flags = ("--rounds", 6, "--rate", 1.0, "--teacher", teacher, "--guidance", 2)
    reward(exported, out, *flags)
    assert all("clips" not in row and row["kept"] > 0 for row in rows(out / "reward.jsonl"))
    before, after, said = (learner.Learner(folder, cpu, bfloat16=False) for folder in
                           (exported / "model", exported / "model", teacher))  # fmt: skip
    after.load(out / "transformer.safetensors")
    data = train_transformer.Data(exported / "latents", 0, cpu, said.scale)
    windows = train_transformer.draw("queue", data, np.random.default_rng(3), 4, 96, 0.7)
    noise = torch.randn(windows.clean.shape, generator=torch.Generator().manual_seed(3))
    wanted = windows.guided(said, noise, 2.0)
    with torch.no_grad():
        losses = [windows.loss(each, noise, wanted).item() for each in (before, after)]
    assert losses[1] < 0.7 * losses[0], losses


def test_rewarded_training_goes_on_where_it_was(exported: Path, tmp_path: Path, short_rounds: None) -> None:
    straight, stopped = (
        [reward(exported, tmp_path / name, "--rounds", 2, "--minutes", minutes) for minutes in stops][-1]
        for name, stops in (("straight", [9]), ("stopped", [0, 0]))
    )
    assert [row["round"] for row in rows(tmp_path / "stopped/reward.jsonl")] == [1, 2]
    assert int(stopped["step"]) == 2 and all(straight[name].equal(stopped[name]) for name in straight)


class Watched:
    """A model that says something of what it sees, and remembers it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def velocity(self, noisy: torch.Tensor, sigma: torch.Tensor, captions: list[str], *, average: bool) -> torch.Tensor:
        assert average and len(captions) == len(noisy) and sigma.shape == noisy[:, 0, :, 0, 0].shape
        self.seen.append((noisy, sigma))
        return 0.3 * noisy + noisy.mean(dim=2, keepdim=True)


def test_clips_at_once_are_made_as_by_diffusers() -> None:
    found = sampler.at_once(Watched(), ["a"] * 2, (3, 8, 4, 4), torch.Generator().manual_seed(1))
    scheduler = FlowMatchLCMScheduler(shift=sampler.FLOW_SHIFT)
    scheduler.set_timesteps(sampler.STEPS)
    generator, model = torch.Generator().manual_seed(1), Watched()
    clips = torch.randn(2, 3, 8, 4, 4, generator=generator)
    for now in scheduler.timesteps:
        velocity = model.velocity(clips, (now / 1000).expand(2, 8), ["a"] * 2, average=True)
        clips = scheduler.step(velocity, now, clips, generator=generator, return_dict=False)[0]
    assert torch.allclose(found, clips, atol=1e-5)


def test_blocks_of_a_made_queue_see_neighbours_a_gap_apart() -> None:
    model, gap, steps, context = Watched(), sampler.QUEUE_GAP, sampler.QUEUE_STEPS, sampler.CONTEXT
    clips = sampler.queue(model, ["a"], (3, 3 * sampler.BLOCK, 4, 4), torch.Generator().manual_seed(1))
    assert clips.shape[2] == 3 * sampler.BLOCK and len(model.seen) == 3 * steps
    levels = sampler.noise_levels(steps).tolist()
    shown = iter(model.seen)
    own: dict[tuple[int, int], torch.Tensor] = {}
    for iteration in range(steps + 2 * gap):
        for block in (2, 1, 0):
            step = iteration - gap * block
            if not 0 <= step < steps:
                continue
            window, sigma = next(shown)
            before, behind = context * (block > 0), context * (block < 2 and step >= gap)
            if before:
                seen = min(step + gap - 1, steps - 1)
                assert sigma[0, 0] == pytest.approx(levels[seen])
                assert window[:, :, :before].equal(own[block - 1, seen][:, :, -context:])
            if behind:
                assert sigma[0, -1] == pytest.approx(levels[step - gap])
                assert window[:, :, -behind:].equal(own[block + 1, step - gap][:, :, :context])
            assert sigma[0, before] == pytest.approx(levels[step])
            own[block, step] = window[:, :, before : before + sampler.BLOCK]
            assert window.shape[2] == before + sampler.BLOCK + behind


def test_what_a_velocity_learns_is_the_papers_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    old, true, *tried = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    for advantage in torch.tensor([-1.0, -0.3, 0.0, 0.6, 1.0]):
        share = (1 + advantage) / 2
        wanted = train_reward.target(old, true, advantage)
        apart = [
            (velocity - wanted).square().sum()
            - share * (velocity - true).square().sum()
            - (1 - share) * (2 * old - velocity - true).square().sum()
            for velocity in tried
        ]
        assert all(torch.isclose(one, apart[0]) for one in apart)  # the same but for a constant


def test_advantages_are_within_a_caption() -> None:
    rewards = np.array([[1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 0.2]])[..., None]
    found = train_reward.advantages(rewards, np.ones((3, 4, 1), bool))
    assert np.allclose(found[..., 0], [[1, 1, -1, -1], [0, 0, 0, 0], [0.4, 0.4, 0.4, -1]])
    some = np.array([[True, False, True, False], [False] * 4, [True] * 4])[..., None]
    found = train_reward.advantages(rewards, some)
    assert np.allclose(found[..., 0], [[1, 0, -1, 0], [0, 0, 0, 0], [0.4, 0.4, 0.4, -1]])


def test_a_judge_counts_what_is_there() -> None:
    shipped = Path(dualparal.__file__).with_name("moving_shapes")
    judge = train_reward.Judge(shipped / "vae", torch.device("cpu"), bfloat16=False)
    shown = [make_latents.scene_of(7, index) for index in range(4)]
    pixels = np.stack([scenes.video(scene, 29, rng) for scene, rng in shown]).transpose(0, 4, 1, 2, 3)
    with torch.no_grad():
        latents = judge.vae.encode(torch.from_numpy(pixels).float() / 127.5 - 1).latent_dist.mean
    latents = (latents - judge.mean) / judge.std
    told = [scene for scene, _ in shown]
    assert judge(latents, told).shape == (4, 8) and judge(latents, told).mean(axis=1).min() > 0.9
    assert len({tuple(scene.groups()) for scene in told}) == 4
    assert judge(latents, told[1:] + told[:1]).mean(axis=1).max() < 0.1
    turned = torch.cat([latents[:, :, :4], latents[[1, 2, 3, 0]][:, :, 4:]], dim=2)  # other objects from then on
    right = judge(turned, told)
    assert right[:, :4].mean() > 0.9 and right[:, 5:].mean() < 0.1


def test_a_slimmer_decoder_learns_what_latents_show(trained: Path, tmp_path: Path) -> None:
    run(export_model, "--out", trained, "--model", tmp_path / "model")
    out = start(tmp_path / "slim", trained)
    slim = ("--vae", tmp_path / "model/vae", "--base-dim", 4)
    for schedule in ("60:1x8", "100:1x8,104:3x2"):
        run(train_decoder, "--out", out, "--schedule", schedule, *slim)
    psnr = {row["step"]: row["psnr"] for row in rows(out / "decoder.jsonl")}
    assert psnr.keys() == {50, 60, 100, 104} and psnr[100] > psnr[50] + 0.5
    old, new = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (slim[1], out / "decoder"))
    assert old["decoder.conv_out.weight"].shape[1] == 8 and new["decoder.conv_out.weight"].shape[1] == 4
    assert all(new[name].equal(old[name]) for name in old if not name.startswith("decoder."))


def test_a_decoders_truth_are_the_frames_that_its_latents_stand_for(trained: Path) -> None:
    clips = train_decoder.Clips(trained / "latents", 0)
    seen = set()
    for number in range(20):
        rng = np.random.default_rng(number)
        latents, pixels = clips.window(rng, 3)
        assert latents.shape[0] == 3 and pixels.shape == (9, 3, scenes.SIZE, scenes.SIZE)
        index, start = next(
            (i, s) for i in range(16) for s in range(7) if (clips.latents[i, s : s + 3] == latents).all()
        )
        scene, of_scene = make_latents.scene_of(0, index)
        video = scenes.video(scene, make_latents.FRAMES, of_scene)[4 * start : 4 * start + 9]
        assert abs(255 * pixels.transpose(0, 2, 3, 1) - video).max() <= 0.51
        seen.add(start)
    assert 0 in seen and len(seen) > 2  # from the beginning, and from anywhere


def test_scenes_never_overlap_and_keep_their_truth() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        scene = scenes.sample_scene(rng)
        positions, _ = scenes.trajectories(scene, 40, rng)
        offset = positions[:, :, None] - positions[:, None]
        offset = (offset + scenes.SIZE / 2) % scenes.SIZE - scenes.SIZE / 2
        radii = np.array([thing.radius for thing in scene.things])
        gap = np.hypot(*np.moveaxis(offset, -1, 0)) - radii[:, None] - radii + 1e9 * np.eye(len(radii))
        assert gap.min() > 0, scene
        if not scene.motion.startswith("drifting"):
            assert (positions - radii[:, None]).min() > -1 and (positions + radii[:, None]).max() < scenes.SIZE + 1
        words = set(scene.caption(rng).split()) | set(scene.caption().split())
        assert words <= set(scenes.vocabulary()), words
