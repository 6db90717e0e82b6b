"""Trains the transformer and the text encoder of the model in the box on the latents of tools/make_latents.py.

    python tools/train_transformer.py --out build/train

Flow matching as Wan does it: x_s = (1 - s) x + s noise, the model says noise - x, s is shifted towards noise. Windows
of a few latent frames, then of more (SCHEDULE), from the start of their videos or from anywhere (FROM_START). Captions
are dropped in a tenth of the cases, for classifier-free guidance. Muon for the matrices of the layers, AdamW for the
rest; what is kept is the exponential average of the weights. Every batch is a function of --seed and its number.

    python tools/train_transformer.py --out build/more --start dualparal/moving_shapes --high-noise 0.65 \
        --mix whole:0.45,short:0.35,queue:0.2

trains finished weights further: on short clips too, as long as the first block of a video (of the folder short/, made
with --seed + 1 and --frames 29), on windows as a queue of blocks shows them, whose blocks have noise of their own
(``queue_levels``), and with more of the high noise at which the layout of a picture is decided. With --guidance G they
learn what they themselves said with that guidance when they started (arXiv 2210.03142), and need none any more; with
--going-on DIR, what other weights say where a window begins with the end of a block before.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import parallel
import torch
from learner import Learner, Scale
from make_latents import scene_of
from scenes import JUDGES, held_out
from train_vae import stages

DROP_CAPTION = 0.1
FROM_START = 0.5  # share of whole windows that begin where their video does
FIRST = 4  # latent frames until a video's are all alike
SCHEDULE = "1000:4x96,1800:8x48,3900:16x48"  # first what a scene looks like, then how it moves
HIGH = 0.85  # noise level above which a layout is decided
SHIFT = 2.0  # of the noise levels that are trained
# Windows of a queue: latent frames of the block before, the block itself and the one behind it, and how often each is
# drawn. The newest block has none behind it, the first none before it.
QUEUE = (((4, 8, 0), 0.5), ((4, 8, 4), 0.35), ((0, 8, 4), 0.15))
GAPS = 0.1, 0.5  # share of all steps that a block is ahead of the next one
SHIFTS = 2.0, 6.0  # of the samplers that a queue may run with
LAST = 0.05  # share of the steps that a block has left when its features are last taken
EMA = 0.999


@dataclass(frozen=True)
class Windows:
    """What a step learns from: latents [n, channels, frames, height, width] and what is known of them.

    ``weights`` [n, 1, frames, 1, 1]: what their loss counts. ``sigma`` [n, frames]: noise levels. ``goes_on``: whether
    they begin with the end of a block before.
    """

    clean: torch.Tensor
    weights: torch.Tensor
    captions: list[str]
    sigma: torch.Tensor
    goes_on: bool = False

    def of_rank(self, rank: int, ranks: int) -> Windows:
        share = slice(rank, None, ranks)
        return Windows(self.clean[share], self.weights[share], self.captions[share], self.sigma[share], self.goes_on)

    def noisy(self, noise: torch.Tensor) -> torch.Tensor:
        level = self.sigma[:, None, :, None, None]
        return (1 - level) * self.clean + level * noise

    def loss(self, learner: Learner, noise: torch.Tensor, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """The mean square of what the velocity is off from ``wanted``, or, as in flow matching, from the clip's."""
        velocity = learner.velocity(self.noisy(noise), self.sigma, self.captions)
        return (self.weights * (velocity - (noise - self.clean if wanted is None else wanted)).square()).mean()

    @torch.no_grad()
    def guided(self, teacher: Learner, noise: torch.Tensor, guidance: float) -> torch.Tensor:
        """The velocity that ``teacher`` says with classifier-free guidance; where a caption is empty, without."""
        noisy = self.noisy(noise)
        said = teacher.velocity(noisy, self.sigma, self.captions)
        if guidance == 1:
            return said
        plain = teacher.velocity(noisy, self.sigma, [""] * len(self.captions))
        return plain + guidance * (said - plain)


class Data:
    """Latents in memory, normalised per channel, and the scenes that they show: none of those that judge.

    Args:
        folder: of make_latents.py.
        seed: with which they were made.
        scale: mean and deviation of each channel; None: of these latents.
    """

    def __init__(self, folder: Path, seed: int, device: torch.device, scale: Scale | None = None) -> None:
        files = sorted(folder.glob("*.npy"))
        if not files:
            raise SystemExit(f"{folder} has no latents: run tools/make_latents.py first")
        raw = torch.from_numpy(np.concatenate([np.load(file) for file in files])).to(device)
        if scale is None:
            sample = raw[:1024].float()
            scale = sample.mean((0, 1, 3, 4)), sample.std((0, 1, 3, 4))
        self.mean, self.std = (numbers.to(device) for numbers in scale)
        shape = (1, 1, -1, 1, 1)
        scenes = [scene_of(seed, index)[0] for index in range(len(raw))]
        judges = {held_out(prompt).caption() for prompt in range(JUDGES)}
        kept = [index for index, scene in enumerate(scenes) if scene.caption() not in judges]
        self.scenes = [scenes[index] for index in kept]
        self.latents = ((raw[kept].float() - self.mean.view(shape)) / self.std.view(shape)).half()

    def batch(
        self, rng: np.random.Generator, size: int, frames: int, from_start: float
    ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Windows [size, channels, frames, height, width], what their loss counts, captions, some of them dropped.

        ``from_start`` of them, at least, begin where their video does; all if it is 1, none if it is 0 and they can.

        A video's first latent frames are of another kind: the very first stands for one frame, and the encoder's
        caches fill. That a frame is among them a model can only tell from there being little on its left. So those at
        the beginning of a window that starts later are seen, and not learnt from: weights [size, 1, frames, 1, 1].
        """
        index = rng.integers(len(self.latents), size=size)
        latest = self.latents.shape[1] - frames
        start = rng.integers(min(1, latest) if from_start == 0 else 0, latest + 1, size=size)
        start = np.where(rng.random(size) < from_start, 0, start)
        windows = torch.stack([self.latents[i, s : s + frames] for i, s in zip(index, start, strict=True)])
        weights = torch.ones(size, 1, frames, 1, 1, device=windows.device)
        weights[torch.from_numpy(start) > 0, :, :FIRST] = 0
        return windows.float().transpose(1, 2), weights, [self.caption(i, rng) for i in index]

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """A clip's caption in words of ``rng``'s choice: none, or now and then with words that mean nothing."""
        if rng.random() < DROP_CAPTION:
            return ""
        words = self.scenes[index].caption(rng).split()
        for place in rng.integers(len(words) + 1, size=rng.choice(3, p=[0.8, 0.1, 0.1])):
            words.insert(int(place), "?")
        return " ".join(words)


def mixture(text: str) -> dict[str, float]:
    """ "whole:0.75,queue:0.25" to the share of steps of each kind: whole, short or queue."""
    shares = {kind: float(share) for kind, _, share in (part.partition(":") for part in text.split(","))}
    if not shares.keys() <= {"whole", "short", "queue"}:
        raise argparse.ArgumentTypeError(f"{text}: kinds are whole, short and queue")
    return {kind: share / sum(shares.values()) for kind, share in shares.items()}


def shifted(times: np.ndarray, shift: np.ndarray | float) -> np.ndarray:
    """Noise levels of ``times``, the share of the steps that are left."""
    return shift * times / (1 + (shift - 1) * times)


def equal_levels(rng: np.random.Generator, size: int, frames: int, high_noise: float) -> np.ndarray:
    """Noise levels [size, frames] of windows whose frames have the same; ``high_noise`` of them are above HIGH."""
    u = rng.random((size, 1))
    high = rng.random((size, 1)) < high_noise
    return np.where(high, HIGH + (1 - HIGH) * u, shifted(u, SHIFT)).repeat(frames, axis=1)


def queue_levels(rng: np.random.Generator, size: int, parts: tuple[int, int, int], least: float = LAST) -> np.ndarray:
    """Noise levels [size, frames] of windows of a queue: the block before is ahead by a gap, the one behind is late.

    A block that is the newest is in its first steps, before the next one enters; any other is behind them, with
    ``least`` or more of its steps left.
    """
    gap = rng.uniform(*GAPS, size=size)
    own = rng.random(size)
    own = least + (1 - gap - least) * own if parts[2] else 1 - gap * own
    times = np.stack([np.maximum(own - gap, LAST), own, own + gap], axis=1).repeat(parts, axis=1)
    return shifted(times, rng.uniform(*SHIFTS, size=(size, 1)))


def draw(kind: str, data: Data, rng: np.random.Generator, frames: int, total: int, high_noise: float) -> Windows:
    """A step's windows of a kind, ``total`` latent frames in all.

    Whole windows have ``frames``; short ones and those of a queue are as long as they are.
    """
    from_start, parts = FROM_START, (0, frames, 0)
    if kind == "queue":
        parts = QUEUE[rng.choice(len(QUEUE), p=[share for _, share in QUEUE])][0]
        frames, from_start = sum(parts), float(parts[0] == 0)
    elif kind == "short":
        frames, from_start = data.latents.shape[1], 1.0
    size = total // frames
    clean, weights, captions = data.batch(rng, size, frames, from_start)
    levels = queue_levels(rng, size, parts) if kind == "queue" else equal_levels(rng, size, frames, high_noise)
    weights = weights / weights.mean().clamp_min(1e-6)  # windows of four frames may have nothing to learn from
    return Windows(clean, weights, captions, torch.from_numpy(levels).float().to(clean.device), parts[0] > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--schedule", type=stages, default=stages(SCHEDULE), help="until step:FRAMESxBATCH,...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="folder of finished weights, in diffusers' layout")
    parser.add_argument("--mix", type=mixture, default=mixture("whole:1"), help="shares of steps by kind of window")
    parser.add_argument("--high-noise", type=float, default=0.0, help="share of samples above HIGH, but in a queue")
    parser.add_argument("--guidance", type=float, help="learn what --start says with it, instead of the clips")
    parser.add_argument("--going-on", type=Path, help="weights to learn from where a block goes on, not from --start")
    parser.add_argument("--rate", type=float, default=1.0, help="factor of all learning rates")
    parallel.add_flags(parser, stops=True)
    options = parser.parse_args()
    if options.guidance is not None and options.start is None:
        parser.error(f"--guidance {options.guidance:g} needs --start: weights that say something")
    if options.going_on and options.guidance is None:
        parser.error(f"--going-on {options.going_on} needs --guidance: with which they are asked, 1 for none")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rank, ranks = parallel.start()
    device = torch.device(options.device)
    learner = Learner(options.start, device, bfloat16=not options.float32)
    teacher = going_on = None
    if options.guidance is not None:
        teacher = going_on = Learner(options.start, device, bfloat16=not options.float32)
    if options.going_on:
        going_on = Learner(options.going_on, device, bfloat16=not options.float32)
    data = {"whole": Data(options.out / "latents", options.seed, device, learner.scale)}
    data["queue"] = data["whole"]
    if "short" in options.mix:
        data["short"] = Data(options.out / "short", options.seed + 1, device, learner.scale)
    steps = options.schedule[-1][0]
    path = options.out / "transformer.safetensors"
    start = learner.load(path)
    log = (options.out / "transformer.jsonl").open("a")
    began, losses = time.perf_counter(), {kind: [] for kind in options.mix}
    for step in range(start, steps):
        share = step / steps
        warm, decay = min((step + 1) / 200, 1.0), min(1.0, max(0.0, 1 - share) / 0.4)  # trapezoid
        _, frames, batch = next(stage for stage in options.schedule if step < stage[0])
        rng = np.random.default_rng([options.seed, 2, step])
        kind = str(rng.choice(list(options.mix), p=list(options.mix.values())))
        windows = draw(kind, data[kind], rng, frames, frames * batch, options.high_noise)
        generator = torch.Generator(device).manual_seed(step)
        noise = torch.randn(windows.clean.shape, generator=generator, device=device)
        windows, noise = windows.of_rank(rank, ranks), noise[rank::ranks]
        asked = going_on if windows.goes_on else teacher
        wanted = None if asked is None else windows.guided(asked, noise, options.guidance)
        loss = windows.loss(learner, noise, wanted)
        learner.learn(loss, options.rate * warm * decay, min(EMA, (step + 1) / (step + 10)))
        losses[kind].append(loss.item())
        last = step + 1 == steps or parallel.any_rank(time.perf_counter() - began > 60 * options.minutes)
        if rank == 0 and ((step + 1) % 100 == 0 or last):
            row = {"step": step + 1} | {kind: float(np.mean(seen)) for kind, seen in losses.items() if seen}
            print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}), file=log, flush=True)
            losses = {kind: [] for kind in options.mix}
        if rank == 0 and ((step + 1) % 500 == 0 or last):
            learner.save(path, step + 1)
        if last:
            break


if __name__ == "__main__":
    main()
