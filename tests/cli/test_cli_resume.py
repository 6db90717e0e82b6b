"""``--checkpoint`` and ``--resume``: what was killed or interrupted goes on, in any number of processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from safetensors.torch import load_file

from cli_runs import Outcome, Run
from dualparal.cli.job import Job, call_arguments
from dualparal.engine.engine import Engine
from dualparal.io.video import SegmentWriter
from engine_calls import embeds

VIDEO = ["--prompt", "a cat", "--height", 32, "--width", 32, "--steps", 4, "--frames-per-block", 2]
VIDEO += ["--context-frames", 1, "--refresh-every", 3, "--device", "cpu", "--threads", 1]
KEPT = ["--checkpoint", "kept", "--checkpoint-every", 1]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("begun", "killed", "resumed"),
    [("--stages 1 --decode-gpus 2", 2, "--stages 2 --decode-in-place"), ("--stages 2", 1, "--stages 3")],
)
def test_a_killed_run_goes_on_with_another_number_of_processes(
    start: Callable[..., Run],
    dualparal: Callable[..., Outcome],
    wan21: Path,
    monkeypatch: pytest.MonkeyPatch,
    begun: str,
    killed: int,
    resumed: str,
) -> None:
    """Ranks with stages, and ranks that decode, which the resumed run may have not at all."""
    video = [*VIDEO, "--model", wan21, "--num-frames", 129]
    outputs = ["--out", "a.mp4", "--latents-out", "a.safetensors"]
    run = start(*video, *outputs, *KEPT, *begun.split())
    assert dualparal("generate", *video, "--out", "b.mp4", "--latents-out", "b.safetensors").code == 0
    here = Path.cwd()
    run.wait_for_segments(3)
    run.ranks[killed].kill()
    assert run.end(20) == 3, run.stderr
    told = json.loads((run.folder / "a.mp4.error.json").read_text())
    assert told["resume_command"] == "dualparal generate --resume kept" and told["last_committed_block"] >= 2
    assert "resume with: dualparal generate --resume kept" in run.stderr
    (run.folder / "a.mp4.error.json").unlink()
    assert any((run.folder / "kept").glob("snapshot-*"))

    monkeypatch.chdir(run.folder)
    again = dualparal("generate", "--resume", "kept", *resumed.split())
    assert again.code == 0, again.stderr
    for name in ("mp4", "safetensors"):
        assert (run.folder / f"a.{name}").read_bytes() == (here / f"b.{name}").read_bytes()
    assert sorted(p.name for p in run.folder.iterdir()) == ["a.mp4", "a.safetensors", "stderr.txt"]


def test_a_killed_run_that_goes_on_from_a_clip_is_resumed_without_it(
    start: Callable[..., Run],
    dualparal: Callable[..., Outcome],
    wan21: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), dtype=np.uint8)
    clip = SegmentWriter(tmp_path / "clip", 16).write(0, frames)
    video = [*VIDEO, "--model", wan21, "--num-frames", 96, "--continue-from", clip]
    run = start(*video, *KEPT, "--out", "a.mp4", "--stages", 2)
    assert dualparal("generate", *video, "--out", "b.mp4").code == 0
    here = Path.cwd()
    run.wait_for_segments(3)
    run.ranks[0].kill()
    assert run.end(20) == 3, run.stderr
    clip.unlink()
    monkeypatch.chdir(run.folder)
    again = dualparal("generate", "--resume", "kept")
    assert again.code == 0, again.stderr
    assert (run.folder / "a.mp4").read_bytes() == (here / "b.mp4").read_bytes()


def test_an_interrupted_run_goes_on_with_its_pictures(
    start: Callable[..., Run], dualparal: Callable[..., Outcome], wan21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = [*VIDEO, "--model", wan21, "--num-frames", 97]
    run = start(*video, *KEPT, "--out", "pictures")
    assert dualparal("generate", *video, "--out", "pictures").code == 0
    whole = {path.name: path.read_bytes() for path in Path("pictures").iterdir()}
    run.segments = lambda: sorted((run.folder / "pictures").glob("*.png"))  # type: ignore[method-assign]
    run.wait_for_segments(20)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(30) == 143, run.stderr
    assert 20 <= len(run.segments()) < 97
    monkeypatch.chdir(run.folder)
    assert dualparal("generate", "--resume", "kept").code == 0
    assert {path.name: path.read_bytes() for path in (run.folder / "pictures").iterdir()} == whole
    assert not (run.folder / "kept").exists()


def test_what_cannot_be_resumed_is_refused(dualparal: Callable[..., Outcome], wan21: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        outcome = dualparal("generate", *arguments)
        assert outcome.code == 2 and outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
        return outcome.stderr

    assert "--resume kept with --prompt, --steps" in refused("--resume", "kept", "--prompt", "a dog", "--steps", 5)
    assert "kept holds no snapshot" in refused("--resume", "kept")
    assert "--checkpoint-every without --checkpoint" in refused(*VIDEO, "--model", wan21, "--checkpoint-every", 5)
    engine = Engine.from_pretrained(wan21, context="paper", device="cpu")
    chunks = engine.stream(**embeds(engine), height=32, width=32, num_inference_steps=2, checkpoint=tmp_path / "kept")
    next(chunks)
    chunks.close()
    assert "was not one of 'dualparal generate'" in refused("--resume", "kept")
    refused_folder = refused(*VIDEO, "--model", wan21, "--checkpoint", "kept")
    assert "checkpoint kept holds snapshots of an earlier run: resume it" in refused_folder


def test_snapshots_bring_refreshes_and_say_so(dualparal: Callable[..., Outcome], wan21: Path, tmp_path: Path) -> None:
    video = ["--prompt", "a cat", "--model", wan21, "--height", 32, "--width", 32, "--steps", 6, "--num-frames", 29]
    video += ["--device", "cpu", "--frames-per-block", 2, "--context-frames", 1]
    plain = dualparal("generate", *video, "--checkpoint", "kept", "--latents-out", "a.safetensors")
    assert (
        plain.code == 0 and "every 3 iterations are refreshes" in plain.stderr and "--refresh-every 3" in plain.stderr
    )
    said = dualparal("generate", *video, "--refresh-every", 3, "--latents-out", "b.safetensors")
    assert said.code == 0 and "refresh" not in said.stderr
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    paper = dualparal(
        "generate", *video, "--context", "paper", "--checkpoint", "kept", "--latents-out", "c.safetensors"
    )
    assert paper.code == 0 and "refresh" not in paper.stderr
    assert not (tmp_path / "kept").exists()


def test_a_list_of_steps_is_the_jobs(
    dualparal: Callable[..., Outcome], wan21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run, of what a snapshot keeps of it, and of the refreshes that snapshots bring."""
    flags = [
        "--prompt",
        "a cat",
        "--model",
        wan21,
        "--height",
        32,
        "--width",
        32,
        "--num-frames",
        29,
        "--device",
        "cpu",
    ]
    flags += ["--frames-per-block", 2, "--context-frames", 1, "--sampler", "lcm", "--sigmas", "1.0,0.75,.5,0.25"]
    made = dualparal("generate", *flags, "--flow-shift", 1, "--seed", 4, "--latents-out", "a.safetensors")
    assert made.code == 0, made.stderr
    engine = Engine.from_pretrained(wan21, frames_per_block=2, context_frames=1, device="cpu")
    engine.scheduler = FlowMatchLCMScheduler()
    call = {"num_frames": 29, "height": 32, "width": 32, "output_type": "latent", "seed": 4}
    expected = engine("a cat", sigmas=[1.0, 0.75, 0.5, 0.25], **call).frames
    assert torch.equal(load_file("a.safetensors")["latents"], expected)
    jobs: list[Job] = []
    monkeypatch.setattr("dualparal.cli.generate._run_job", lambda job, *_: jobs.append(job))
    assert dualparal("generate", *flags, "--checkpoint", "kept").code == 0
    again = Job.of_notes(json.loads(json.dumps(jobs[0].notes())))
    assert again.video == jobs[0].video and again.video.num_inference_steps == 4
    assert call_arguments(again)["sigmas"] == (1.0, 0.75, 0.5, 0.25)
    assert again.engine.blocks.refresh_every == 2
    assert "--resume kept with --sigmas" in dualparal("generate", "--resume", "kept", "--sigmas", "1.0").stderr
