"""The commands that train the model in the box (tools/), at a tiny setting: they run, learn, go on and export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import scenes

TOOLS = Path(scenes.__file__).parent
pytestmark = pytest.mark.timeout(900)  # processes that import diffusers, on what may be one busy core


def run(script: str, *arguments: object, ranks: int = 1) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(TOOLS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train")
    run("train_vae.py", "--out", out, "--schedule", "30:1x4,40:5x1")
    run("make_latents.py", "--out", out, "--clips", 16)
    for steps, minutes in (
        ("30:2x16", 0),
        ("30:2x16", 9),
        ("30:2x16,60:4x8", 9),
    ):  # one step, which is an untrained model
        run("train_transformer.py", "--out", out, "--schedule", steps, "--minutes", minutes)
    run("train_vae.py", "--out", out, "--schedule", "42:29x1", "--decoder-only")
    return out


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns(trained: Path) -> None:
    of_vae = {row["step"]: row["l1"] for row in rows(trained / "vae.jsonl")}
    assert of_vae[39] < 0.9 * of_vae[0] and 41 in of_vae  # the decoder alone went on from there
    untrained, *_, learnt = (row["loss"] for row in rows(trained / "transformer.jsonl"))
    assert learnt < 0.95 * untrained


def test_a_stopped_run_goes_on_where_it_was_and_ranks_share_a_batch(trained: Path, tmp_path: Path) -> None:
    states = []
    for name, stops, ranks in (("straight", [1e9], 1), ("stopped", [0, 0, 1e9], 1), ("ranks", [1e9], 2)):
        out = tmp_path / name
        out.mkdir()
        (out / "latents").symlink_to(trained / "latents")
        for minutes in stops:  # 0 minutes: one step at a time
            run("train_transformer.py", "--out", out, "--schedule", "4:2x4", "--minutes", minutes, ranks=ranks)
        states.append(load_file(out / "transformer.safetensors"))
    straight, stopped, shared = states
    assert straight.keys() == stopped.keys() == shared.keys() and int(stopped["step"]) == int(shared["step"]) == 4
    assert all(straight[name].equal(stopped[name]) for name in straight)
    learnt = "trained/transformer.blocks.0.ffn.net.0.proj.weight"
    # Another order of sums in bfloat16; had both ranks taken the same half, it were ten times as much.
    assert (shared[learnt] - straight[learnt]).abs().max() < 2e-3 * straight[learnt].abs().max()


def test_the_export_is_a_pipeline(trained: Path, tmp_path: Path) -> None:
    import dualparal

    run("export_model.py", "--out", trained, "--model", tmp_path / "model")
    engine = dualparal.Engine.from_pretrained(tmp_path / "model", frames_per_block=2, context_frames=1, device="cpu")
    frames = engine(
        "a red circle on a dark background", height=64, width=64, num_frames=17, num_inference_steps=2
    ).frames
    assert np.asarray(frames).shape[-4:] == (17, 64, 64, 3)


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
