"""A small network that reads a clip of tools/scenes.py as its caption would: the eyes of the Frechet distance.

    python bench/meter/scene_classifier.py  # a quarter of an hour on one core; writes scene_classifier.safetensors

It sees 17 frames, every second of 33, and says motion, background, checkered, and number and shape of each
colour's objects. Its last hidden layer is the feature of a clip. Blur and noise are drawn in training, so that a
picture that is a little soft is not another world.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from scenes import BACKGROUNDS, COLOURS, MAX_OBJECTS, MOTIONS, SHAPES, Scene, render, sample_scene, trajectories

WEIGHTS = Path(__file__).with_suffix(".safetensors")
FRAMES, STRIDE = 17, 2  # of a clip
SPAN = (FRAMES - 1) * STRIDE + 1
HOP = 14  # frames from the start of one clip of a video to the next
FEATURES = 32
HEADS = {
    "motion": len(MOTIONS),
    "background": len(BACKGROUNDS),
    "checkered": 2,
    **{f"number {colour}": MAX_OBJECTS + 1 for colour in COLOURS},
    **{f"shape {colour}": len(SHAPES) for colour in COLOURS},  # learned and read only where there is one
}


class Classifier(nn.Module):
    """Clips [N, 3, 17, 64, 64] in [0, 1] to features [N, FEATURES] and logits by question.

    Buffers ``mean`` and ``std`` are of the features of the truth: ``features`` gives them standardised.
    """

    def __init__(self) -> None:
        super().__init__()
        sizes = [(5, 16, (2, 2, 2)), (16, 32, (2, 2, 2)), (32, 48, (1, 2, 2)), (48, 48, (2, 1, 1))]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in sizes:
            layers += [nn.Conv3d(inputs, outputs, 3, stride, 1), nn.BatchNorm3d(outputs), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.neck = nn.Linear(48 + 3 * FRAMES, FEATURES)
        self.head = nn.Linear(FEATURES, sum(HEADS.values()))
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        line = torch.linspace(-1, 1, clips.shape[-1], device=clips.device)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij"))  # circling is about the middle
        around = places[None, :, None].expand(len(clips), -1, clips.shape[2], -1, -1)
        hidden = self.body(torch.cat([clips * 2 - 1, around], dim=1)).mean((2, 3, 4))
        small = F.avg_pool3d(clips, (1, 2, 2))
        moves = flow(small, F.avg_pool2d(places, 2))
        features = F.silu(self.neck(torch.cat([hidden, moves], dim=1)))
        return features, dict(zip(HEADS, self.head(features).split(list(HEADS.values()), dim=1)))

    @torch.inference_mode()
    def read(self, frames: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """uint8 frames [F, 64, 64, 3], at least SPAN, to features [clips, FEATURES] and answers [clips] by question."""
        clips = cut(frames)
        parts = [self(torch.from_numpy(part).permute(0, 4, 1, 2, 3).float() / 255) for part in _batches(clips, 16)]
        features = (torch.cat([f for f, _ in parts]) - self.mean) / self.std
        return features.numpy(), {name: torch.cat([a[name] for _, a in parts]).argmax(1).numpy() for name in HEADS}


def flow(clips: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """How the picture as a whole moves and turns from frame to frame, [N, 3 F]: optical flow, one for all pixels.

    The least-squares answer of change = - velocity * slope, along y, along x, and round the middle. Given to the
    network because it would learn it last.
    """
    change = torch.diff(clips, dim=2, append=clips[:, :, -1:])
    mid = clips + change / 2
    slope_y, slope_x = ((mid.roll(-1, axis) - mid.roll(1, axis)) / 2 for axis in (3, 4))
    slopes = [slope_y, slope_x, places[1] * slope_y - places[0] * slope_x]
    found = [-(change * slope).sum((1, 3, 4)) / (slope.square().sum((1, 3, 4)) + 0.1) for slope in slopes]
    return torch.cat(found, dim=1)


def cut(frames: np.ndarray) -> np.ndarray:
    """Clips [clips, 17, 64, 64, 3] of a video, a new one every HOP frames."""
    assert len(frames) >= SPAN, f"{len(frames)} frames; a clip spans {SPAN}"
    return np.stack([frames[s : s + SPAN : STRIDE] for s in range(0, len(frames) - SPAN + 1, HOP)])


def _batches(array: np.ndarray, size: int) -> list[np.ndarray]:
    return [array[i : i + size] for i in range(0, len(array), size)]


def answers(scene: Scene) -> dict[str, int]:
    """What a perfect reader says; no entry for the shape of a colour that is not there."""
    found = {
        "motion": MOTIONS.index(scene.motion),
        "background": list(BACKGROUNDS).index(scene.background),
        "checkered": int(scene.checkered),
        **{f"number {colour}": 0 for colour in COLOURS},
    }
    for number, colour, shape in scene.groups():
        found |= {f"number {colour}": number, f"shape {colour}": SHAPES.index(shape)}
    return found


@lru_cache(1)
def load() -> Classifier:
    model = Classifier()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return model.eval().requires_grad_(False)


# Training ------------------------------------------------------------------------------------------------------


def batch(seed: int, step: int, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clips and answers (-100: not asked); a function of seed and step."""
    rng = np.random.default_rng([seed, 3, step])
    clips, said = [], []
    for _ in range(size):
        scene = sample_scene(rng)
        positions, angles = trajectories(scene, SPAN, rng)
        clips.append(render(scene, positions[::STRIDE], angles[::STRIDE]))
        said.append(answers(scene))
    truth = {name: torch.tensor([a.get(name, -100) for a in said]) for name in HEADS}
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3), truth


def soften(clips: torch.Tensor, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    blur, noise = torch.rand(2, len(clips), 1, 1, 1, 1, generator=generator)
    soft = clips
    for axis in (3, 4):
        soft = (soft + soft.roll(1, axis) + soft.roll(-1, axis)) / 3
    return clips.lerp(soft, blur) + 0.04 * noise * torch.randn(clips.shape, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.steps, pct_start=0.1)
    began = time.perf_counter()
    for step in range(options.steps):
        clips, truth = batch(options.seed, step, options.batch)
        with torch.autocast("cpu", torch.bfloat16):
            _, logits = model(soften(clips, step))
        losses = {
            name: F.cross_entropy(logits[name].float(), truth[name]) for name in HEADS if (truth[name] >= 0).any()
        }
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            shown = {name: round(losses[name].item(), 2) for name in ("motion", "background", "number red")}
            rest = sum(v.item() for k, v in losses.items() if k.startswith("shape")) / len(COLOURS)
            print(step, f"{time.perf_counter() - began:.0f} s", shown, f"shape {rest:.2f}", flush=True)
    model.eval()
    with torch.inference_mode():
        asked: dict[str, list[torch.Tensor]] = {name: [] for name in HEADS}
        features = []
        for step in range(32):
            clips, truth = batch(options.seed + 1, step, 16)
            found, logits = model(clips)
            features.append(found)
            for name in HEADS:
                there = truth[name] >= 0
                asked[name].append((logits[name].argmax(1) == truth[name])[there])
        model.mean.copy_(torch.cat(features).mean(0))
        model.std.copy_(torch.cat(features).std(0).clamp_min(1e-3))
    print({name: round(torch.cat(right).float().mean().item(), 3) for name, right in asked.items()})
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, options.out)


if __name__ == "__main__":
    main()
