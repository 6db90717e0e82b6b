"""How good are long videos? Makes many of the same captions with several methods and measures them against the truth.

    python bench/quality.py --preset full --workers 2 --figures build/figures --record
    python bench/quality.py --model DIR --variants cached prior "paper C8" --latents 80 --prompts 4 --seeds 2

What is measured is defined in meter/: scene_metrics.py (one video), scene_classifier.py (features), quality_report.py
(many videos); docs/quality.md has it in words. Captions are of ``scenes.held_out``. Each video that was made
and measured is kept under --cache, so a command that was stopped goes on, and presets share what they have in common.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from harness.record import record
from meter import fifo, persistence, quality_report, scene_classifier, scene_metrics
from rich.console import Console
from rich.progress import track as progress
from scenes import HELD_OUT, SIZE, Scene, held_out, video

import dualparal
from dualparal.config.blocks import BlockConfig
from dualparal.models.defaults import model_defaults
from dualparal.schedule.layout import Layout

MODEL = str(Path(dualparal.__file__).with_name("moving_shapes"))
TRAINED = 16  # latent frames of a training clip
BEFORE = ", before"  # behind the name of a variant that other weights made
POLICIES = ("paper", "cached", "prior")


@dataclass(frozen=True)
class Variant:
    """A way to make a video. ``method``: engine, fifo, truth (rendered) or vae (the truth encoded and decoded)."""

    name: str
    method: str = "engine"
    context: str = "cached"
    frames_per_block: int | None = 8  # B; None: the whole video is one block
    context_frames: int = 4  # C
    steps: int = 20  # T
    noise: str = "pool"  # of the paper; or "independent" from frame to frame, or "shared": every block's the same
    sampler: str | None = None  # None: the model's own; unipc, euler or lcm, which takes fresh noise at every step
    flow_shift: float = 2.0  # of another sampler; 5: more steps at high noise, where a layout is decided
    guidance_scale: float | None = None  # None: the model's own
    max_blocks_in_flight: int | None = None  # K
    context_version: str = "matching"
    refresh_every: int | None = None  # R
    anchor_frames: int = 0  # of block 0, that all others see
    reuse: str = "off"  # a preset, or fields
    forced: bool = False  # the first block is the truth, encoded: what the others do once the layout is right

    def layout(self, latents: int) -> Layout:
        context = self.context_frames if self.method == "engine" else 0
        assert self.frames_per_block is not None
        return Layout(BlockConfig(self.frames_per_block, context, self.context), latents)  # type: ignore[arg-type]

    def starts(self, latents: int) -> list[int]:
        """Latent frames at which a block begins, without the first. The truth has none: what if it had, every 8?"""
        if self.frames_per_block is None or self.method == "fifo":
            return []
        layout = self.layout(latents)
        assert layout.num_blocks is not None
        return [layout.start(block) for block in range(1, layout.num_blocks)]


# Fresh noise at every step with guidance, as weights need it that have not learnt it, with less (1: none), and UniPC.
SAMPLERS = {
    "lcm": {"sampler": "lcm", "flow_shift": 5.0, "guidance_scale": 3.0},
    "lcm g1": {"sampler": "lcm", "flow_shift": 5.0, "guidance_scale": 1.0},
    "lcm g1.5": {"sampler": "lcm", "flow_shift": 5.0, "guidance_scale": 1.5},
    "unipc": {"sampler": "unipc", "guidance_scale": 4.0},
    "shift 5": {"sampler": "unipc", "flow_shift": 5.0, "guidance_scale": 3.0},
}
CHANGED = {
    "C2": {"context_frames": 2},
    "C8": {"context_frames": 8},
    "A4": {"anchor_frames": 4},
    "A4 C8": {"anchor_frames": 4, "context_frames": 8},
}
VARIANTS = {
    variant.name: variant
    for variant in [
        Variant("truth", method="truth"),
        Variant("vae", method="vae"),
        Variant("whole", frames_per_block=None, context_frames=0),
        Variant("independent", context_frames=0),
        Variant("fifo", method="fifo", steps=24),
        *(Variant(policy, context=policy) for policy in POLICIES),
        *(Variant(f"{p} forced", context=p, forced=True) for p in POLICIES),
        *(Variant(f"{p} C{c}", context=p, context_frames=c) for p in POLICIES for c in (2, 8)),
        *(Variant(f"{p} B4", context=p, frames_per_block=4) for p in POLICIES),
        *(Variant(f"{p} B12", context=p, frames_per_block=12) for p in POLICIES),
        *(Variant(f"{p} T{t}", context=p, steps=t) for p in POLICIES for t in (4, 8, 50)),
        *(Variant(f"{p} own noise", context=p, noise="independent") for p in POLICIES),
        *(Variant(f"{p} same noise", context=p, noise="shared") for p in POLICIES),
        *(Variant(f"{p} euler", context=p, sampler="euler") for p in POLICIES),
        *(Variant(f"{p} K{k}", context=p, max_blocks_in_flight=k) for p in POLICIES for k in (5, 10)),
        *(Variant(f"cached K{k} newest", max_blocks_in_flight=k, context_version="newest") for k in (5, 10)),
        *(
            Variant(f"cached K5 newest {name}", max_blocks_in_flight=5, context_version="newest", **more)  # type: ignore[arg-type]
            for name, more in CHANGED.items()
        ),
        *(  # K blocks under way: neighbours are 20 / K steps apart
            Variant(f"cached K{k} newest A4", max_blocks_in_flight=k, context_version="newest", anchor_frames=4)
            for k in (2, 3, 4, 10)
        ),
        *(Variant(f"{p} R{r}", context=p, refresh_every=r) for p in ("cached", "prior") for r in (2, 5, 10)),
        *(Variant(f"whole T{t}", frames_per_block=None, context_frames=0, steps=t) for t in (4, 8, 50)),
        *(Variant(f"cached {name}", reuse=name) for name in ("mild", "strong")),
        *(Variant(f"cached T50 {name}", steps=50, reuse=name) for name in ("mild", "strong")),
        *(Variant(f"{p} {name}", context=p, **kind) for p in POLICIES for name, kind in SAMPLERS.items()),  # type: ignore[arg-type]
        *(Variant(f"whole {name}", frames_per_block=None, context_frames=0, **kind) for name, kind in SAMPLERS.items()),  # type: ignore[arg-type]
        *(
            Variant(f"cached K5 newest {name}", max_blocks_in_flight=5, context_version="newest", **kind)  # type: ignore[arg-type]
            for name, kind in SAMPLERS.items()
        ),
        Variant("whole euler", frames_per_block=None, context_frames=0, sampler="euler"),
    ]
}


@dataclass(frozen=True)
class Part:
    """Variants at one length (in latent frames), and of how many captions and seeds. Part of a preset."""

    latents: int
    names: tuple[str, ...]
    prompts: int
    seeds: int


PRESETS = {
    "smoke": (Part(2 * TRAINED, ("truth", "vae", "independent", "cached T4"), 1, 2),),
    "first": (
        Part(TRAINED, ("truth", "vae", "whole"), 6, 2),
        Part(5 * TRAINED, ("truth", "vae", "independent", "fifo", *POLICIES), 6, 1),
    ),
    # Less than twenty minutes of two cores, so few captions.
    "table": (
        Part(TRAINED, ("truth", "vae", "whole", "whole T8"), 6, 1),
        Part(5 * TRAINED, ("truth", "vae", "independent", "fifo", *POLICIES), 6, 1),
        Part(
            5 * TRAINED,
            ("cached C2", "cached C8", "cached T8", "cached K5 newest", "cached K5 newest A4", "cached own noise"),
            6,
            1,
        ),
        Part(20 * TRAINED, ("truth", "vae", "paper", "cached", "prior", "cached K5 newest A4"), 1, 1),
    ),
    # What a finding takes. Hours of a core.
    "findings": (
        Part(5 * TRAINED, ("vae", *POLICIES, *(f"{policy} forced" for policy in POLICIES)), 20, 2),
        Part(257, ("vae", *POLICIES), 20, 2),
    ),
    # Some 35 minutes of two cores; --prompts N for narrower intervals.
    "full": (
        Part(TRAINED, ("truth", "vae", "whole", "whole T4", "whole T8", "whole T50", "whole euler"), 8, 2),
        Part(5 * TRAINED, ("truth", "vae", "independent", "fifo", *POLICIES), 6, 2),
        Part(257, ("vae",), 6, 1),
        Part(
            5 * TRAINED,
            (
                *(f"{policy} {change}" for policy in ("cached", "prior") for change in ("C2", "C8")),
                *(
                    f"cached {change}"
                    for change in (
                        "B4",
                        "B12",
                        "T4",
                        "T8",
                        "T50",
                        "K10",
                        "K5",
                        "K10 newest",
                        "K5 newest",
                        "own noise",
                        "same noise",
                        "euler",
                    )
                ),
            ),
            4,
            1,
        ),
        Part(20 * TRAINED, ("truth", "vae", "independent", "fifo", *POLICIES), 2, 1),
    ),
}


@dataclass(frozen=True)
class Job:
    """One video to make and measure."""

    variant: Variant
    latents: int
    prompt: int
    seed: int

    def scene(self) -> Scene:
        return held_out(self.prompt)

    def truth(self) -> np.ndarray:
        rng = np.random.default_rng([HELD_OUT, self.prompt, self.seed])
        return video(self.scene(), 4 * self.latents - 3, rng)


# Making --------------------------------------------------------------------------------------------------------


@lru_cache(1)
def load_pipe(model: str) -> Any:
    """The stock pipeline, whose parts every method here uses."""
    from diffusers import WanPipeline
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    return WanPipeline.from_pretrained(model).to(torch.float32)  # transformers takes what it is kept in


def make_latents(model: str, job: Job) -> torch.Tensor:
    """Final latents [1, C, L, h, w] of a method that has any; normalised, as the transformer makes them."""
    variant, caption = job.variant, job.scene().caption()
    pipe = load_pipe(model)
    side = SIZE // pipe.vae_scale_factor_spatial
    if variant.method == "vae":
        return encode(pipe.vae, job.truth())
    own = model_defaults(model).video.guidance_scale
    guidance = own if variant.guidance_scale is None else variant.guidance_scale
    if variant.method == "fifo":
        return fifo.generate(
            pipe, caption, size=(side, side), num_latents=job.latents, steps=variant.steps,
            guidance_scale=guidance, seed=job.seed,
        )  # fmt: skip
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler

    from dualparal import Engine

    block = variant.frames_per_block or job.latents
    engine = Engine.from_pretrained(
        model, frames_per_block=block, context_frames=variant.context_frames, context=variant.context, device="cpu",
        max_blocks_in_flight=variant.max_blocks_in_flight, context_version=variant.context_version,
        refresh_every=variant.refresh_every, reuse=variant.reuse, anchor_frames=variant.anchor_frames,
    )  # fmt: skip
    if variant.sampler == "unipc":
        engine.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=variant.flow_shift
        )
    elif variant.sampler is not None:
        flow_match = {"euler": FlowMatchEulerDiscreteScheduler, "lcm": FlowMatchLCMScheduler}[variant.sampler]
        engine.scheduler = flow_match(shift=variant.flow_shift)
    noise = None
    if variant.noise != "pool":
        drawn = block if variant.noise == "shared" else job.latents
        channels = pipe.transformer.config.in_channels
        noise = torch.randn(1, channels, drawn, side, side, generator=torch.Generator().manual_seed(job.seed))
        noise = noise.repeat(1, 1, -(-job.latents // drawn), 1, 1)[:, :, : job.latents]
    known = variant.layout(job.latents).frames(0) if variant.forced else 0
    clip = encode(pipe.vae, job.truth()[: 4 * known - 3]) if known else None
    made: torch.Tensor = engine(
        caption, height=SIZE, width=SIZE, num_frames=4 * (job.latents - known) - (0 if known else 3),
        num_inference_steps=variant.steps, guidance_scale=guidance, seed=job.seed, latents=noise,
        video=clip, output_type="latent",
    ).frames  # fmt: skip
    return made if clip is None else torch.cat([clip, made], dim=2)


@torch.inference_mode()
def encode(vae: Any, frames: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(values).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.encode(pixels).latent_dist.mean - mean) / std


def decode(vae: Any, latents: torch.Tensor) -> np.ndarray:
    from dualparal.decoding.frames import to_uint8
    from dualparal.models.wan.vae import StreamingDecoder

    return to_uint8(StreamingDecoder(vae).push(latents))


# Keeping -------------------------------------------------------------------------------------------------------


@lru_cache(1)
def fingerprint(model: str) -> str:
    """Of weights and configs: of every file its place, its size, and its first and last megabyte."""
    digest = hashlib.sha256()
    for path in sorted(path for ending in ("safetensors", "json") for path in Path(model).rglob(f"*.{ending}")):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(model)} {path.stat().st_size}".encode() + file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


@lru_cache(1)
def meter() -> str:
    """Of what measures: figures of an older meter are measured again (the videos are kept)."""
    files = [Path(part.__file__) for part in (scene_metrics, persistence, scene_classifier)]
    files.append(scene_classifier.WEIGHTS)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all: a run may be stopped at any time."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    part.rename(path)


def frames_of(model: str, cache: Path, job: Job) -> tuple[np.ndarray, float]:
    """The video, and the seconds of one core that its latents took (decoding is the same for all)."""
    if job.variant.method == "truth":
        return job.truth(), 0.0
    settings = {**asdict(job.variant), "name": ""}  # a new name is not a new video
    path = cache / f"{key(fingerprint(model), settings, job.latents, job.prompt, job.seed)}.latents.npz"
    if path.exists():
        with np.load(path) as kept:
            latents, seconds = torch.from_numpy(kept["latents"]).float(), float(kept["seconds"])
    else:
        began = time.process_time()
        latents = make_latents(model, job)
        seconds = time.process_time() - began
        latents = latents.half().float()  # as it will be read again
        save(path, {"latents": latents.half().numpy(), "seconds": np.array(seconds)})
    return decode(load_pipe(model).vae, latents), seconds


STRIP = 16  # frames of a filmstrip


def run(model: str, cache: Path, job: Job) -> dict[str, np.ndarray]:
    """What is known of one video: figures, curves, features of its clips, and some of its frames."""
    weights = None if job.variant.method == "truth" else fingerprint(model)
    path = cache / f"{key(weights, meter(), asdict(job))}.npz"
    if not path.exists():
        frames, seconds = frames_of(model, cache, job)
        scene = job.scene()
        figures, curves = scene_metrics.measure(frames, scene, job.variant.starts(job.latents))
        features, said = scene_classifier.load().read(frames)
        wanted = scene_classifier.answers(scene)
        agrees = [(said[name] == answer).mean() for name, answer in wanted.items() if name != "motion"]
        figures |= {"caption": float(np.mean(agrees)), "seconds": seconds}
        strip = frames[np.linspace(0, len(frames) - 1, STRIP).round().astype(int)]
        arrays = {f"figure {name}": np.array(value) for name, value in figures.items()}
        arrays |= {f"curve {name}": values for name, values in curves.items()}
        save(path, arrays | {"features": features, "strip": strip})
    with np.load(path) as kept:
        return dict(kept)


def start_worker() -> None:
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other


def run_all(model: str, cache: Path, jobs: list[Job], workers: int) -> Iterator[tuple[Job, dict[str, np.ndarray]]]:
    """Results as they come."""
    cache.mkdir(parents=True, exist_ok=True)
    if workers < 2:
        for job in jobs:
            yield job, run(model, cache, job)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        waiting = {pool.submit(run, model, cache, job): job for job in jobs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def reference(cache: Path, prompts: int) -> list[np.ndarray]:
    """Per caption, features [renderings, clips, features] of the truth, which share no randomness with the videos."""
    scene_classifier.load()
    path = cache / f"{key('reference', meter(), HELD_OUT, prompts)}.npz"
    if not path.exists():
        found = []
        for prompt in range(prompts):
            jobs = [Job(VARIANTS["truth"], TRAINED, prompt, 10_000 + n) for n in range(quality_report.RENDERINGS)]
            found.append(np.stack([scene_classifier.load().read(job.truth())[0] for job in jobs]))
        save(path, {str(prompt): features for prompt, features in enumerate(found)})
    with np.load(path) as kept:
        return [kept[str(prompt)] for prompt in range(prompts)]


def plan(options: argparse.Namespace) -> list[Part]:
    if options.variants:
        unknown = [name for name in options.variants if name not in VARIANTS]
        if unknown:
            raise SystemExit(f"no variant {', '.join(map(repr, unknown))}; use some of: {', '.join(VARIANTS)}")
        parts = [Part(latents, tuple(options.variants), 4, 2) for latents in options.latents]
    else:
        parts = list(PRESETS[options.preset])
    short = [part.latents for part in parts if 4 * part.latents - 3 < scene_classifier.SPAN]
    if short:
        least = (scene_classifier.SPAN + 3 + 3) // 4
        raise SystemExit(f"--latents {short[0]}: the classifier reads {scene_classifier.SPAN} frames; from {least}")
    return [replace(p, prompts=options.prompts or p.prompts, seeds=options.seeds or p.seeds) for p in parts]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="folder in diffusers' format, trained on tools/scenes.py")
    parser.add_argument("--preset", choices=PRESETS, default="first")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=f"instead of a preset: {', '.join(VARIANTS)}")
    parser.add_argument("--latents", nargs="+", type=int, default=[5 * TRAINED], help="lengths, with --variants")
    parser.add_argument("--prompts", type=int, help="number of captions")
    parser.add_argument("--seeds", type=int, help="videos per caption")
    parser.add_argument("--guidance-scale", type=float, help="instead of the variants' own")
    parser.add_argument("--against", metavar="NAME", help="print how the others differ from this one, by caption")
    parser.add_argument(
        "--before", metavar="DIR", help="folder of the weights that make the row of --against, instead of --model"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("build/quality"))
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw curves and filmstrips there, and the table")
    parser.add_argument("--record", action="store_true", help="append rows to bench/results/quality.csv")
    options = parser.parse_args(arguments)
    parts = plan(options)
    if options.before and not options.against:
        parser.error(f"--before {options.before} makes what --against NAME says: give that too")
    known = VARIANTS if options.before else set.intersection(*(set(part.names) for part in parts))
    if options.against and options.against not in known:
        parser.error(f"--against {options.against}: use one of {', '.join(map(repr, sorted(known)))}")
    start_worker()

    def variant(name: str) -> Variant:
        found = VARIANTS[name]
        return found if options.guidance_scale is None else replace(found, guidance_scale=options.guidance_scale)

    def jobs_of(part: Part, names: tuple[str, ...]) -> list[Job]:
        numbers = itertools.product(range(part.prompts), names, range(part.seeds))
        return [Job(variant(name), part.latents, prompt, seed) for prompt, name, seed in numbers]

    def make(model: str, jobs: list[Job], suffix: str = "") -> dict[tuple[int, str], dict[tuple[int, int], Any]]:
        found: dict[tuple[int, str], dict[tuple[int, int], Any]] = {}
        done = run_all(model, options.cache, jobs, options.workers)
        for job, result in progress(done, "videos", len(jobs), console=console):
            found.setdefault((job.latents, job.variant.name + suffix), {})[job.prompt, job.seed] = result
        return found

    console = Console()
    console.width = max(console.width, 220)  # the table; a narrow terminal breaks its lines
    jobs = [job for part in parts for job in jobs_of(part, part.names)]
    videos, base, more = make(options.model, jobs), options.against, ()
    if options.before:
        again = [job for part in parts for job in jobs_of(part, (options.against,))]
        base = options.against + BEFORE
        videos |= make(options.before, again, BEFORE)
        more = (base,)
    truth = reference(options.cache, max(part.prompts for part in parts))
    rows = [
        {"latents": part.latents, "variant": name, "prompts": part.prompts, "seeds": part.seeds}
        | quality_report.summarise(videos[part.latents, name], truth, videos.get((part.latents, "vae")))
        for part in parts
        for name in (*part.names, *more)
    ]
    console.print(quality_report.table(rows))
    for (latents, name), found in videos.items() if options.against else ():
        if name == base:
            continue
        told = quality_report.differences(found, videos[latents, base])
        text = ", ".join(
            f"{figure} {v:.2f}"
            + ("" if math.isnan(low) else f" ({low:.2f} to {high:.2f})")  # all captions agree
            + (" FINDING" if quality_report.is_finding(found, low, high, ratio=figure in quality_report.RATIOS) else "")
            for figure, (v, low, high) in told.items()
        )
        console.print(f"{latents} {name} against {base}: {text}")
    if options.figures:
        quality_report.draw(options.figures, videos, rows, jobs[0].scene().caption())
    if options.record:
        record("quality", rows)
    return rows


if __name__ == "__main__":
    main()
