"""Trains finished weights on clips of their own, towards those that show what their captions ask for.

    torchrun --nproc-per-node=2 -- tools/train_reward.py --out build/reward --data build/more --threads 1 \
        --start dualparal/moving_shapes

DiffusionNFT (arXiv 2509.16117) with beta = 1. In every round the average of the weights makes clips of new captions,
GROUP of each and without guidance; the tracker of bench/meter says in what share of their frames the objects are as
many as asked for, and a clip's advantage a is twice by how much it is better than its group, in -1 to 1. Then, of the
noisy clip, the velocity learns

    old + a (noise - clip - old),        old: what the average says,

which is flow matching where a = 1, as far away from the clip where a = -1, and nothing where a = 0. In terms of the
paper, whose r is (1 + a) / 2, this is its loss without what does not depend on the weights. Groups whose clips are all
alike teach nothing and are left out. Beside the clips windows of the truth are learnt (--data, the folder that
tools/train_transformer.py reads), so that motion, shapes and what a queue shows stay.

Every rank makes and learns clips of its own. A round is a function of --seed, its number and the rank. The captions of
``scenes.held_out`` are not among those made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import parallel
import torch
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler
from learner import Learner
from scenes import JUDGES, Scene, held_out, sample_scene
from train_transformer import Data, Windows, draw

from dualparal.decoding.frames import to_uint8

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from meter.scene_metrics import counts_right, track

LENGTHS = ((8, 0.7), (16, 0.3))  # latent frames of a round's clips, and how often: a first block, and two
FRAMES = 768  # latent frames that a rank makes in a round
GROUP = 6  # clips of a caption
BATCH = 192  # latent frames that are made, judged or learnt at once
ALONE = 0.35  # share of the scenes of one object that are made: they are right early
STEPS, FLOW_SHIFT = 16, 5.0  # of the sampler with fresh noise at every step
LOOKED_AT = 6  # latent frames of a clip that are decoded: past its start, in its middle
PASSES = 4  # over a round's clips, with other noise
LAYOUT = 0.85, 0.6  # noise levels: three in four are above the one, the others above the other
TRUTH = 0.5  # what the windows of truth weigh that are learnt beside clips, half as many
OTHERS = ("queue", "queue", "queue", "whole", "whole")  # steps of a round on the truth alone
EMA = 0.85
HIGH_NOISE = 0.65  # of the truth, as in the training before
WARM = 2  # rounds until the rate is full


def new_scenes(rng: np.random.Generator, number: int) -> list[Scene]:
    """Scenes at random, none of those that judge, few of one object."""
    judges = {held_out(prompt).caption() for prompt in range(JUDGES)}
    found: list[Scene] = []
    while len(found) < number:
        scene = sample_scene(rng)
        if scene.caption() not in judges and (len(scene.things) > 1 or rng.random() < ALONE):
            found.append(scene)
    return found


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Of groups of clips [groups, GROUP] with rewards in 0 to 1."""
    return np.clip(2 * (rewards - rewards.mean(axis=1, keepdims=True)), -1, 1)


def target(old: torch.Tensor, true: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """The velocity that is learnt: ``old``'s, moved towards ``true``, the clip's, by its advantage, or away."""
    return old + advantage * (true - old)


def noise_of(clips: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """As large as ``clips``."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 40)))
    return torch.randn(clips.shape, generator=generator).to(clips.device)


@torch.no_grad()
def make(learner: Learner, captions: list[str], shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Clips [captions, *shape] of the average of the weights."""
    scheduler: Any = FlowMatchLCMScheduler(shift=FLOW_SHIFT)
    scheduler.set_timesteps(STEPS)
    clips = torch.randn(len(captions), *shape, generator=generator, device=learner.device)
    for now, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        levels = sigma.to(clips.device).expand(len(clips), shape[1])
        velocity = learner.velocity(clips, levels, captions, average=True)
        clips = scheduler.step(velocity, now, clips, generator=generator, return_dict=False)[0]
    return clips


class Judge:
    """Says in what share of a clip's frames the objects are as many as its scene has, by colour."""

    def __init__(self, folder: Path, device: torch.device, *, bfloat16: bool = True) -> None:
        self.vae: Any = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval()
        scale = self.vae.config.latents_mean, self.vae.config.latents_std
        self.mean, self.std = (torch.tensor(numbers, device=device).view(1, -1, 1, 1, 1) for numbers in scale)
        self.bfloat16 = bfloat16

    @torch.no_grad()
    def __call__(self, clips: torch.Tensor, scenes: list[Scene]) -> np.ndarray:
        first = max(0, clips.shape[2] // 2 - LOOKED_AT // 3)
        clips = clips[:, :, first : first + LOOKED_AT]
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=self.bfloat16):
            pixels = self.vae.decode(clips * self.std + self.mean, return_dict=False)[0].float()
        videos = (to_uint8(clip.transpose(0, 1)) for clip in pixels)
        return np.array([counts_right(track(video), scene).mean() for video, scene in zip(videos, scenes, strict=True)])


class Round:
    """Clips of a round, their captions and their advantages.

    Args:
        data: whose latents are as large as the clips.
        frames: latent frames of a clip.
    """

    def __init__(self, learner: Learner, judge: Judge, data: Data, rng: np.random.Generator, frames: int) -> None:
        self.frames = frames
        groups = FRAMES // (GROUP * frames)
        scenes = [scene for scene in new_scenes(rng, groups) for _ in range(GROUP)]
        self.captions = [scene.caption(rng) for scene in scenes]
        generator = torch.Generator(learner.device).manual_seed(int(rng.integers(1 << 40)))
        channels, _, *size = data.latents.shape[2], frames, *data.latents.shape[3:]
        batch = BATCH // frames
        parts = [slice(first, first + batch) for first in range(0, len(self.captions), batch)]
        made = [make(learner, self.captions[part], (channels, frames, *size), generator) for part in parts]
        self.clips = torch.cat(made)
        rewards = [judge(clips, scenes[part]) for clips, part in zip(made, parts, strict=True)]
        self.rewards = np.concatenate(rewards).reshape(groups, GROUP)
        self.advantages = torch.from_numpy(advantages(self.rewards).ravel()).float().to(learner.device)

    def batches(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Numbers of clips that teach, two thirds of BATCH at a time, PASSES over them all; as many on every rank."""
        size = 2 * BATCH // (3 * self.frames)
        teach = np.flatnonzero(self.advantages.abs().cpu().numpy() > 0.02)
        number = parallel.fewest(len(teach) // size)
        return [part for _ in range(PASSES) for part in rng.permutation(teach)[: number * size].reshape(number, size)]

    def loss(self, learner: Learner, rng: np.random.Generator, index: np.ndarray) -> torch.Tensor:
        """Of the clips of these numbers."""
        u = rng.random((len(index), 1))
        low = np.where(rng.random((len(index), 1)) < 0.75, *LAYOUT)
        sigma = torch.from_numpy(low + (1 - low) * u).float().to(self.clips.device).expand(-1, self.frames)
        clean, captions = self.clips[index], [self.captions[number] for number in index]
        noise = noise_of(clean, rng)
        noisy = Windows(clean, torch.ones(()), captions, sigma).noisy(noise)
        with torch.no_grad():
            old = learner.velocity(noisy, sigma, captions, average=True)
        advantage = self.advantages[index].view(-1, 1, 1, 1, 1)
        wanted = target(old, noise - clean, advantage)
        return (learner.velocity(noisy, sigma, captions) - wanted).square().mean()


def truth(data: dict[str, Data], kind: str, rng: np.random.Generator, total: int, learner: Learner) -> torch.Tensor:
    """Loss of windows of the truth, ``total`` latent frames in all."""
    windows = draw(kind, data[kind], rng, LENGTHS[-1][0], total, HIGH_NOISE)
    return windows.loss(learner, noise_of(windows.clean, rng))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="folder of finished weights, in diffusers' layout")
    parser.add_argument("--data", type=Path, required=True, help="folder with latents/ and short/")
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.25, help="factor of all learning rates")
    parser.add_argument("--cool", type=float, default=0.3, help="share of the rounds in which the rate falls to 0")
    parser.add_argument("--float32", action="store_true", help="for processors that have no bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on another time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rank, _ = parallel.start()
    device = torch.device(options.device)
    learner = Learner(options.start, device, bfloat16=not options.float32)
    judge = Judge(options.start / "vae", device, bfloat16=not options.float32)
    data = {
        "whole": Data(options.data / "latents", options.seed, device, learner.scale),
        "short": Data(options.data / "short", options.seed + 1, device, learner.scale),
    }
    data["queue"] = data["whole"]
    options.out.mkdir(parents=True, exist_ok=True)
    path, log = options.out / "transformer.safetensors", (options.out / "reward.jsonl").open("a")
    began = time.perf_counter()
    start = learner.load(path)
    for number in range(start, options.rounds):
        shared = np.random.default_rng([options.seed, 3, number])
        rng = np.random.default_rng([options.seed, 4, number, rank])
        frames = int(shared.choice([length for length, _ in LENGTHS], p=[share for _, share in LENGTHS]))
        round_began = time.perf_counter()
        clips = Round(learner, judge, data["short"], rng, frames)
        making = time.perf_counter() - round_began
        plan: list[Any] = [*clips.batches(rng), *OTHERS]
        rate = options.rate * min(1.0, (number + 1) / WARM, (1 - number / options.rounds) / options.cool)
        losses: dict[str, list[float]] = {"clips": [], "truth": []}
        for place in shared.permutation(len(plan)):
            now = plan[place]
            if isinstance(now, str):
                loss = of_truth = truth(data, now, rng, BATCH, learner)
            else:
                of_clips = clips.loss(learner, rng, now)
                of_truth = truth(data, "short" if frames == LENGTHS[0][0] else "whole", rng, BATCH // 3, learner)
                loss = of_clips + TRUTH * of_truth
                losses["clips"].append(of_clips.item())
            losses["truth"].append(of_truth.item())
            learner.learn(loss, rate, EMA)
        seconds = time.perf_counter() - began
        last = number + 1 == options.rounds or parallel.any_rank(seconds > 60 * options.minutes)
        if rank == 0:
            row = {"round": number + 1, "frames": frames, "reward": float(clips.rewards.mean()), "steps": len(plan)}
            row |= {name: float(np.mean(seen)) for name, seen in losses.items() if seen}
            print(json.dumps(row | {"making": round(making, 1), "seconds": round(seconds, 1)}), file=log, flush=True)
        if rank == 0 and ((number + 1) % 5 == 0 or last):
            learner.save(path, number + 1)
        if last:
            break


if __name__ == "__main__":
    main()
