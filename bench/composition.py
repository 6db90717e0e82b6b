"""Whether the model in the box shows what its captions ask for, by length, sampler and guidance, apart from any block.

    python bench/composition.py --latents 8 16
    python bench/composition.py --latents 4 --samplers 20:2 20:5 50:5 20:5:3:lcm
    python bench/composition.py --latents 8 16 --model dualparal/moving_shapes build/more
    python bench/composition.py --encoder

Whole clips in one batch by UniPC, or by the sampler that takes fresh noise at every step (lcm), of the captions and
with the measures of bench/quality.py. Each sampler (STEPS:SHIFT, with :GUIDANCE unless it is the model's own, with
:lcm) of each model starts from the same noise; differences from the first row are paired by caption, with 95 %
intervals of Student's t. --encoder: how well a linear probe reads how many objects of a colour are asked for from the
embedding of the colour's word, on captions that it was not fitted to.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler
from learner import Text, make_transformer
from meter.quality_report import student
from meter.scene_metrics import counts_right, counts_wrong, track
from quality import MODEL, load_pipe
from scenes import COLOURS, HELD_OUT, MAX_OBJECTS, SIZE, Scene, held_out, sample_scene, vocabulary

from dualparal.decoding.frames import to_uint8
from dualparal.models.defaults import model_defaults
from dualparal.models.wan.tiny import make_tokenizer
from dualparal.models.wan.vae import StreamingDecoder

COLUMNS = ("right", "many", "few", "colour")  # % of frames; all of them together are 100
FITTED, PROBED = 3000, 1000  # captions


class Model:
    """The model with the attention to captions that training uses: a pipeline's own pads each to 512 tokens."""

    def __init__(self, folder: str) -> None:
        self.pipe: Any = load_pipe(folder)
        self.guidance = model_defaults(folder).video.guidance_scale
        self.transformer, self.processor = make_transformer()
        self.transformer.load_state_dict(self.pipe.transformer.state_dict())
        with tempfile.TemporaryDirectory() as place:
            self.text = Text(make_tokenizer(place, vocabulary()))
        self.text.encoder.load_state_dict(self.pipe.text_encoder.state_dict())

    def velocity(self, latents: torch.Tensor, time: torch.Tensor, said: tuple[torch.Tensor, torch.Tensor]) -> Any:
        self.processor.bias = said[1]
        return self.transformer(latents, time.expand(len(latents)), said[0], return_dict=False)[0]

    @torch.inference_mode()
    def sample(self, captions: list[str], latents: int, sampler: str, seed: int) -> torch.Tensor:
        """Clips [captions, channels, latents, h, w] by ``sampler``: STEPS:SHIFT[:GUIDANCE][:lcm]."""
        numbers, fresh, _ = sampler.partition(":lcm")
        steps, shift, guidance = (*map(float, numbers.split(":")), self.guidance)[:3]
        generator = torch.Generator().manual_seed(seed)
        if fresh:
            scheduler: Any = FlowMatchLCMScheduler(shift=shift)
        else:
            scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            )
        scheduler.set_timesteps(int(steps))
        noise = {"generator": generator} if fresh else {}
        side, channels = SIZE // 8, self.transformer.config.in_channels
        shape = len(captions), channels, latents, side, side
        clips = torch.randn(shape, generator=generator)
        wanted, nothing = self.text(captions), self.text([""] * len(captions)) if guidance != 1 else None
        for now in scheduler.timesteps:
            velocity = self.velocity(clips, now, wanted)
            if nothing is not None:
                plain = self.velocity(clips, now, nothing)
                velocity = plain + guidance * (velocity - plain)
            clips = scheduler.step(velocity, now, clips, **noise, return_dict=False)[0]
        return clips

    @torch.inference_mode()
    def judge(self, clips: torch.Tensor, scenes: list[Scene]) -> np.ndarray:
        """COLUMNS of each clip, in percent: [clips, 4]."""
        rows = []
        for clip, scene in zip(clips, scenes, strict=True):
            seen = track(to_uint8(StreamingDecoder(self.pipe.vae).push(clip[None])))
            rows.append([counts_right(seen, scene).mean(), *counts_wrong(seen, scene).values()])
        return 100 * np.array(rows)

    @torch.inference_mode()
    def words(self, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [words, width] of the colours in captions at random, and how many objects each asks for."""
        rng = np.random.default_rng([HELD_OUT, seed])
        scenes = [sample_scene(rng) for _ in range(number)]
        captions = [scene.caption(rng) for scene in scenes]
        embeds = torch.cat([self.text(captions[i : i + 256])[0] for i in range(0, number, 256)]).numpy()
        found, counts = [], []
        for scene, caption, embed in zip(scenes, captions, embeds, strict=True):
            for place, word in enumerate(caption.split()):
                if word in COLOURS:
                    found.append(embed[place])
                    counts.append(sum(thing.colour == word for thing in scene.things))
        return np.array(found), np.array(counts)

    def probe(self) -> tuple[float, float]:
        """Shares of words whose count a linear probe reads, and of the most common count."""

        def with_one(embeds: np.ndarray) -> np.ndarray:
            return np.hstack([embeds, np.ones((len(embeds), 1))])

        embeds, counts = self.words(1, FITTED)
        probe = np.linalg.lstsq(with_one(embeds), np.eye(MAX_OBJECTS + 1)[counts], rcond=None)[0]
        embeds, counts = self.words(2, PROBED)
        return float(((with_one(embeds) @ probe).argmax(1) == counts).mean()), np.bincount(counts).max() / len(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[MODEL], help="folders of the model in the box or of its kind")
    parser.add_argument("--latents", type=int, nargs="+", default=[4], help="frames of the clips")
    parser.add_argument("--samplers", nargs="+", default=["20:5:lcm"], help="STEPS:SHIFT[:GUIDANCE][:lcm]")
    parser.add_argument("--prompts", type=int, default=120, help="captions, two at least; 40 leave +-12 points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", action="store_true", help="probe the text encoder, make no clip")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {folder: Model(folder) for folder in options.model}
    if options.encoder:
        for model in models.values():
            print("count of a colour read {:.1%}, by always saying the most common {:.1%}".format(*model.probe()))
        return
    scenes = [held_out(prompt) for prompt in range(options.prompts)]
    numbers = np.array([len(scene.things) for scene in scenes])
    for latents in options.latents:
        first = None
        for (folder, model), sampler in product(models.items(), options.samplers):
            began = time.process_time()
            clips = model.sample([scene.caption() for scene in scenes], latents, sampler, options.seed)
            seconds = time.process_time() - began
            rows = model.judge(clips, scenes)
            first = rows if first is None else first
            half = student(len(rows) - 1) * (rows - first).std(0, ddof=1) / len(rows) ** 0.5
            said = [
                f"{name} {mean:.0f} ({change:+.1f} +- {wide:.1f})"
                for name, mean, change, wide in zip(COLUMNS, rows.mean(0), (rows - first).mean(0), half, strict=True)
            ]
            parts = [f"{rows[numbers == k, 0].mean():.0f}" for k in range(1, MAX_OBJECTS + 1) if (numbers == k).any()]
            whose = f"{folder}, " if len(models) > 1 else ""
            print(f"{whose}{latents} latents, {sampler}: {', '.join(said)}", end="; ")
            print(f"right by number {'/'.join(parts)}; {seconds:.0f} core s", flush=True)


if __name__ == "__main__":
    main()
