"""Trains finished weights on clips of their own, towards those that show what their captions ask for.

    torchrun --nproc-per-node=2 -- tools/train_reward.py --out build/reward --data build/last --threads 1 \
        --start build/learnt --teacher build/guided --guidance 3

DiffusionNFT (arXiv 2509.16117) with beta = 1. In every round the average of the weights makes clips of new captions, a
group of each and without guidance: of one block or two at once, or of four as in a queue. The tracker of bench/meter
says in what share of its frames the objects are as many as asked for, and a block's advantage a is twice by how much
it is better than those of its group, in -1 to 1. In a queue only blocks are compared that come after one which ended
right: what they are judged by is whether they hold it. Then, of the noisy block, the velocity learns

    old + a (noise - clip - old),        old: what the average says,

which is flow matching where a = 1, as far away from the clip where a = -1, and nothing where a = 0. In terms of the
paper, whose r is (1 + a) / 2, this is its loss without what does not depend on the weights. Groups whose blocks are
all alike teach nothing and are left out. So that motion, shapes and what a queue shows stay, of true clips (--data,
the folder that tools/train_transformer.py reads) the velocity learns beside what --teacher says with --guidance. Flow
matching of these clips would teach what weights say without guidance, which holds little.

Every rank makes and learns clips of its own. A round is a function of --seed, its number and the rank. The captions of
``scenes.held_out`` are not among those made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parallel
import torch
from diffusers import AutoencoderKLWan
from learner import Learner
from sampler import BLOCK, CONTEXT, at_once, queue
from scenes import JUDGES, Scene, held_out, sample_scene
from train_transformer import Data, Windows, draw, queue_levels

from dualparal.decoding.frames import to_uint8
from dualparal.models.wan.cpu_ops import CpuOps

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from meter.scene_metrics import counts_right, track

WHOLE = 2 * BLOCK  # latent frames of the longest clip that is made at once
BATCH = 192  # latent frames that are made, judged or learnt at once
ALONE = 0.35  # share of the scenes of one object that are made: they are right early
ENDED_RIGHT = 0.75  # share of the frames of a block's last CONTEXT latents
LAYOUT = 0.85, 0.6  # noise levels: three in four are above the one, the others above the other
LATE, EARLY = 0.3, 0.4  # of a block in a queue: share of the steps left at the end, share of batches without a next
KEPT = 0.5  # what the teacher's windows weigh that are learnt beside clips, half as many
OTHERS = ("queue", "queue", "queue", "queue", "whole", "whole")  # steps of a round on the teacher's windows alone
EMA = 0.85
HIGH_NOISE = 0.65  # of the teacher's windows, as in the training before
WARM = 2  # rounds until the rate is full


@dataclass(frozen=True)
class Clips:
    """What a round makes and learns from.

    Attributes:
        share: of the rounds.
        made: latent frames that a rank makes in a round.
        group: clips of a caption.
        passes: over a round's blocks, with other noise.
    """

    share: float
    made: int
    group: int
    passes: int


# By latent frames of a clip. A queue has few blocks that teach.
CLIPS = {
    BLOCK: Clips(0.3, made=768, group=6, passes=4),
    WHOLE: Clips(0.3, made=768, group=6, passes=4),
    4 * BLOCK: Clips(0.4, made=512, group=4, passes=8),
}


def new_scenes(rng: np.random.Generator, number: int) -> list[Scene]:
    """Scenes at random, none of those that judge, few of one object."""
    judges = {held_out(prompt).caption() for prompt in range(JUDGES)}
    found: list[Scene] = []
    while len(found) < number:
        scene = sample_scene(rng)
        if scene.caption() not in judges and (len(scene.things) > 1 or rng.random() < ALONE):
            found.append(scene)
    return found


def advantages(rewards: np.ndarray, compared: np.ndarray) -> np.ndarray:
    """Of the blocks of clips [groups, clips, blocks] with rewards in 0 to 1: 0 for those that are not compared."""
    number = compared.sum(axis=1, keepdims=True)
    mean = (rewards * compared).sum(axis=1, keepdims=True) / np.maximum(number, 1)
    return np.where(compared, np.clip(2 * (rewards - mean), -1, 1), 0.0)


def target(old: torch.Tensor, true: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """The velocity that is learnt: ``old``'s, moved towards ``true``, the clip's, by its advantage, or away."""
    return old + advantage * (true - old)


def noise_of(clips: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """As large as ``clips``."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 40)))
    return torch.randn(clips.shape, generator=generator).to(clips.device)


class Judge:
    """Says where in a clip the objects are as many as its scene has, by colour."""

    def __init__(self, folder: Path, device: torch.device, *, bfloat16: bool = True) -> None:
        self.vae: Any = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval()
        scale = self.vae.config.latents_mean, self.vae.config.latents_std
        self.mean, self.std = (torch.tensor(numbers, device=device).view(1, -1, 1, 1, 1) for numbers in scale)
        self.bfloat16 = bfloat16

    @torch.no_grad()
    def __call__(self, clips: torch.Tensor, scenes: list[Scene]) -> np.ndarray:
        """[clips, latent frames]: share of the frames, every second one is looked at, that are right."""
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=self.bfloat16), CpuOps():
            pixels = self.vae.decode(clips * self.std + self.mean, return_dict=False)[0].float()
        videos = (to_uint8(clip.transpose(0, 1)[::2]) for clip in pixels)
        right = [counts_right(track(video), scene) for video, scene in zip(videos, scenes, strict=True)]
        return np.array([[frames[0], *frames[1:].reshape(-1, 2).mean(axis=1)] for frames in right])


class Round:
    """Clips of a round, their captions and the advantages of their blocks: of the whole of one that is made at once.

    Args:
        data: whose latents are as large as the clips.
        frames: latent frames of a clip.
    """

    def __init__(self, learner: Learner, judge: Judge, data: Data, rng: np.random.Generator, frames: int) -> None:
        self.block = frames if frames <= WHOLE else BLOCK
        self.kind = CLIPS[frames]
        group = self.kind.group
        groups = self.kind.made // (group * frames)
        scenes = [scene for scene in new_scenes(rng, groups) for _ in range(group)]
        self.captions = [scene.caption(rng) for scene in scenes]
        generator = torch.Generator(learner.device).manual_seed(int(rng.integers(1 << 40)))
        channels, *size = data.latents.shape[2:]
        batch = max(1, BATCH // frames)
        parts = [slice(first, first + batch) for first in range(0, len(self.captions), batch)]
        make = at_once if frames <= WHOLE else queue
        made = [make(learner, self.captions[part], (channels, frames, *size), generator) for part in parts]
        self.clips = torch.cat(made)
        right = np.concatenate([judge(clips, scenes[part]) for clips, part in zip(made, parts, strict=True)])
        right = right.reshape(groups, group, frames // self.block, self.block)
        self.rewards = right.mean(axis=3)
        compared = np.ones(self.rewards.shape, bool)
        compared[:, :, 1:] = right[:, :, :-1, -CONTEXT:].mean(axis=3) >= ENDED_RIGHT
        self.held = float(self.rewards[:, :, 1:][compared[:, :, 1:]].mean()) if compared[:, :, 1:].any() else None
        self.advantages = advantages(self.rewards, compared).reshape(len(self.clips), -1)

    def batches(self, rng: np.random.Generator) -> list[tuple[tuple[int, int, int], np.ndarray]]:
        """Latent frames before a block, of it and behind it, and numbers [n, 2] of clips and blocks that teach.

        Two thirds of BATCH at a time, several passes over them all; as many on every rank.
        """
        teach = np.argwhere(abs(self.advantages) > 0.02)
        place, last = teach[:, 1], self.advantages.shape[1] - 1
        found = []
        for before, behind in itertools.product((0, CONTEXT), (0, CONTEXT)):
            left = teach[((place > 0) == (before > 0)) & ((place < last) == (behind > 0))]
            left = np.concatenate([rng.permutation(left) for _ in range(self.kind.passes)])
            while True:
                parts = before, self.block, 0 if rng.random() < EARLY else behind
                size = 2 * BATCH // (3 * sum(parts))
                if len(left) < size:
                    break
                found.append((parts, left[:size]))
                left = left[size:]
        return [found[number] for number in rng.permutation(len(found))[: parallel.fewest(len(found))]]

    def loss(
        self, learner: Learner, rng: np.random.Generator, parts: tuple[int, int, int], blocks: np.ndarray
    ) -> torch.Tensor:
        """Of some ``batches``."""
        clips, places = blocks.T
        first, frames = places * self.block - parts[0], sum(parts)
        clean = torch.stack([self.clips[clip, :, at : at + frames] for clip, at in zip(clips, first, strict=True)])
        if self.clips.shape[2] > self.block:
            levels = queue_levels(rng, len(blocks), parts, LATE)
        else:
            low = np.where(rng.random((len(blocks), 1)) < 0.75, *LAYOUT)
            levels = (low + (1 - low) * rng.random((len(blocks), 1))).repeat(frames, axis=1)
        sigma = torch.from_numpy(levels).float().to(clean.device)
        captions = [self.captions[clip] for clip in clips]
        noise = noise_of(clean, rng)
        noisy = Windows(clean, torch.ones(()), captions, sigma).noisy(noise)
        with torch.no_grad():
            old = learner.velocity(noisy, sigma, captions, average=True)
        advantage = torch.from_numpy(self.advantages[clips, places]).float().to(clean.device)
        wanted = target(old, noise - clean, advantage.view(-1, 1, 1, 1, 1))
        off = learner.velocity(noisy, sigma, captions) - wanted
        return off[:, :, parts[0] : parts[0] + self.block].square().mean()


class Kept:
    """What is kept of a teacher: its velocity in windows of true clips, with classifier-free guidance."""

    def __init__(self, teacher: Learner, guidance: float, data: dict[str, Data]) -> None:
        self.teacher, self.guidance, self.data = teacher, guidance, data

    def loss(self, learner: Learner, kind: str, rng: np.random.Generator, total: int) -> torch.Tensor:
        """Of windows of a kind, ``total`` latent frames in all."""
        windows = draw(kind, self.data[kind], rng, WHOLE, total, HIGH_NOISE)
        noise = noise_of(windows.clean, rng)
        return windows.loss(learner, noise, windows.guided(self.teacher, noise, self.guidance))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="folder of finished weights, in diffusers' layout")
    parser.add_argument("--data", type=Path, required=True, help="folder with latents/ and short/")
    parser.add_argument("--teacher", type=Path, help="weights of which is kept what they say; default: --start's")
    parser.add_argument("--guidance", type=float, default=1.0, help="with which they are asked; 1: none")
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.25, help="factor of all learning rates")
    parser.add_argument("--cool", type=float, default=0.3, help="share of the rounds in which the rate falls to 0")
    parallel.add_flags(parser, stops=True)
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
    teacher = Learner(options.teacher or options.start, device, bfloat16=not options.float32)
    kept = Kept(teacher, options.guidance, data)
    options.out.mkdir(parents=True, exist_ok=True)
    path, log = options.out / "transformer.safetensors", (options.out / "reward.jsonl").open("a")
    began = time.perf_counter()
    start = learner.load(path)
    for number in range(start, options.rounds):
        shared = np.random.default_rng([options.seed, 3, number])
        rng = np.random.default_rng([options.seed, 4, number, rank])
        frames = int(shared.choice(list(CLIPS), p=[kind.share for kind in CLIPS.values()]))
        round_began = time.perf_counter()
        clips = Round(learner, judge, data["short"], rng, frames)
        making = time.perf_counter() - round_began
        beside = "short" if frames == BLOCK else "whole" if frames == WHOLE else "queue"
        plan: list[Any] = [*clips.batches(rng), *OTHERS]
        rate = options.rate * min(1.0, (number + 1) / WARM, (1 - number / options.rounds) / options.cool)
        losses: dict[str, list[float]] = {"clips": [], "kept": []}
        for place in shared.permutation(len(plan)):
            now = plan[place]
            if isinstance(now, str):
                loss = of_kept = kept.loss(learner, now, rng, BATCH)
            else:
                of_clips = clips.loss(learner, rng, *now)
                of_kept = kept.loss(learner, beside, rng, BATCH // 3)
                loss = of_clips + KEPT * of_kept
                losses["clips"].append(of_clips.item())
            losses["kept"].append(of_kept.item())
            learner.learn(loss, rate, EMA)
        seconds = time.perf_counter() - began
        last = number + 1 == options.rounds or parallel.any_rank(seconds > 60 * options.minutes)
        if rank == 0:
            row = {"round": number + 1, "frames": frames, "reward": float(clips.rewards[:, :, 0].mean())}
            row |= {"held": clips.held, "steps": len(plan)}
            row |= {name: float(np.mean(seen)) for name, seen in losses.items() if seen}
            print(json.dumps(row | {"making": round(making, 1), "seconds": round(seconds, 1)}), file=log, flush=True)
        if rank == 0 and ((number + 1) % 5 == 0 or last):
            learner.save(path, number + 1)
        if last:
            break


if __name__ == "__main__":
    main()
