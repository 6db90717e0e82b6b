"""The command line as its users meet it: whole runs in real processes, real signals, and a table of mistakes.

Starting a process costs seconds of imports, so that runs are few and asked many things, and mistakes are made
inside this process by the same entry point.
"""

from __future__ import annotations

import gzip
import inspect
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cli_runs import Outcome, Run, decode
from dualparal import __version__
from dualparal.cli import main as cli
from dualparal.config.blocks import BlockConfig
from dualparal.config.eight_bit import EightBitPolicy
from dualparal.engine.engine import Engine
from dualparal.launch import supervisor
from dualparal.models.files import ModelFiles
from dualparal.models.wan.tiny import build_tiny_pipeline
from dualparal.sampling.noise import BlockNoise
from dualparal.schedule.layout import Layout
from dualparal.schedule.replay import bubble
from dualparal.schedule.schedule import Schedule
from dualparal.trace.timeline import STAGE, place
from timeline_checks import check_order, spans

SMALL = ["--prompt", "a cat", "--device", "cpu", "--height", "32", "--width", "32", "--steps", "2"]
SHORT = [*SMALL, "--frames-per-block", "4", "--context-frames", "2", "--num-frames", "33"]  # blocks of 13, 16, 4
LONG = [*SMALL, "--num-frames", "8001", "--out", "a.mp4", "--threads", "1"]  # ended by a signal: 251 blocks
LATENTS = [1, 16, 9, 4, 4]  # of SHORT
SHORT_CALL = {"prompt": "a cat", "height": 32, "width": 32, "num_frames": 33, "num_inference_steps": 2}
EIGHT_BIT = ["--attention-8bit", "int8", "--dtype", "bfloat16"]
CLOSING = re.compile(
    r"(\d+) frames in (\d+) blocks?, [\d.]+ s \([\d.]+ frames/s\), first frames after [\d.]+ s, bubble [\d.]+ %"
    r"(?: \(schedule [\d.]+ %\))?, peak memory per rank ([\d., ]+) GiB"
)


class Closing(NamedTuple):
    """What the last line says."""

    frames: int
    blocks: int
    memory: list[float]


def closing(text: str) -> Closing:
    found = CLOSING.findall(text)
    assert len(found) == 1, text
    frames, blocks, memory = found[0]
    return Closing(int(frames), int(blocks), [float(part) for part in memory.split(",")])


def _has_transformers(process: psutil.Process) -> bool:
    """True when a process has loaded transformers, by the library of its tokenizers."""
    return any(Path(part.path).name == "tokenizers.abi3.so" for part in process.memory_maps())


def test_two_processes_make_a_long_video_that_plays_while_it_grows(
    start: Callable[..., Run], dualparal: Callable[..., Outcome], wan21: Path, tmp_path: Path
) -> None:
    video_flags = [*SMALL, "--model", wan21, "--num-frames", "513"]
    run = start(*video_flags, "--stages", "2", "--out", "new/folder/a.mp4", "--latents-out", "latents.safetensors")
    video = run.folder / "new" / "folder" / "a.mp4"
    run.segments = lambda: sorted(video.with_name("a.mp4.blocks").glob("block-*.mp4"))  # type: ignore[method-assign]
    first = run.wait_for_segments(1)[0]
    assert decode(first) == 29  # 8 latents, the first of which is one frame
    assert not video.exists() and run.process.poll() is None
    assert sorted(run.ranks) == [0, 1]
    assert [_has_transformers(run.ranks[rank]) for rank in range(2)] == [True, False], "who encodes the prompt pays"

    assert run.end() == 0, run.stderr
    assert decode(video) == 513
    assert [p.name for p in video.parent.iterdir()] == ["a.mp4"]  # the blocks are in it now
    told = closing(run.stderr)
    assert (told.frames, told.blocks, len(told.memory)) == (513, 17, 2)
    assert all(0.05 < gigabytes < 8 for gigabytes in told.memory)
    assert "error" not in run.stderr and "WARNING" not in run.stderr

    alone = dualparal("generate", *video_flags, "--stages", 1, "--latents-out", "alone.safetensors")
    assert alone.code == 0 and (closing(alone.stderr).frames, len(closing(alone.stderr).memory)) == (513, 1)
    assert not (tmp_path / "video.mp4").exists()  # only latents were asked for
    assert (tmp_path / "alone.safetensors").read_bytes() == (run.folder / "latents.safetensors").read_bytes()


def test_three_processes_and_torchrun_give_the_same_bytes(
    start: Callable[..., Run], dualparal: Callable[..., Outcome], wan21: Path, tmp_path: Path
) -> None:
    short = [*SHORT, "--model", wan21]
    assert dualparal("generate", *short, "--out", "a.mp4", "--latents-out", "one.safetensors").code == 0
    outputs = ["--out", "a.mp4", "--latents-out", "latents.safetensors", "--timeline", "run.json.gz"]
    torchrun = start(
        *short, *outputs, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    )
    three = start(*short, *outputs, "--stages", "3")
    for run, ranks in ((torchrun, 2), (three, 3)):
        assert run.end() == 0, run.stderr
        assert len(closing(run.stderr).memory) == ranks
        for ours, theirs in (("a.mp4", "a.mp4"), ("one.safetensors", "latents.safetensors")):
            assert (tmp_path / ours).read_bytes() == (run.folder / theirs).read_bytes()
        _check_timeline(run, Schedule(ranks, 2, 3, "cached", 2))


def _check_timeline(run: Run, schedule: Schedule) -> None:
    with gzip.open(run.folder / "run.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    check_order(events, schedule)
    names = {place(e)[0]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {rank: f"stage {rank} (rank {rank})" for rank in range(schedule.num_stages)}
    assert not [e for e in events if e["name"] == "clock_offset"]  # one machine, one clock
    assert [e["args"]["block"] for e in spans(events, "decode")] == [0, 1, 2]
    for wait in spans(events, "wait"):  # within a transfer
        assert any(
            e["pid"] == wait["pid"] and e["ts"] == wait["ts"] and e["dur"] >= wait["dur"]
            for e in (*spans(events, "receive"), *spans(events, "send"))
        )
    assert {place(e)[0] for e in spans(events, "wait")} == set(names)
    told = re.search(r"([\d.]+) s \([\d.]+ frames/s\).* bubble ([\d.]+) % \(schedule ([\d.]+) %\)", run.stderr)
    assert told is not None, run.stderr
    seconds, measured, expected = map(float, told.groups())
    busy = sum(e["dur"] for e in spans(events, "compute")) / 1e6
    lowest, highest = (100 * (1 - busy / ((seconds + off) * schedule.num_stages)) for off in (-0.06, 0.06))
    assert lowest - 0.1 <= measured <= highest + 0.1
    assert expected == round(100 * bubble(schedule), 1)
    assert np.asarray(Image.open(run.folder / "run.png").convert("RGB")).std() > 10
    assert "run.json.gz: open it at ui.perfetto.dev; run.png is its picture" in run.stderr
    assert not list(run.folder.glob("*.parts"))


@pytest.mark.parametrize("num_frames", [1, 5, 81])
def test_a_video_has_exactly_the_frames_asked_for(
    dualparal: Callable[..., Outcome], wan21: Path, tmp_path: Path, num_frames: int
) -> None:
    run = dualparal("generate", *SMALL, "--model", wan21, "--num-frames", num_frames, "--out", "a.mp4")
    assert run.code == 0 and run.stdout == ""
    assert decode(tmp_path / "a.mp4") == closing(run.stderr).frames == num_frames


def test_latents_are_float32_and_noise_goes_in_as_it_would_be_drawn(
    dualparal: Callable[..., Outcome], wan21: Path, tmp_path: Path
) -> None:
    short = ["generate", *SHORT, "--model", wan21, "--threads", 1]
    assert dualparal(*short, "--seed", 5, "--latents-out", "drawn.safetensors").code == 0
    with safe_open(tmp_path / "drawn.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["latents"]
        latents = file.get_tensor("latents")
    assert latents.dtype == torch.float32 and list(latents.shape) == LATENTS
    assert torch.isfinite(latents).all()

    layout = Layout(BlockConfig(4, 2, "cached"), LATENTS[2])
    noise = BlockNoise(layout, (16, 4, 4), seed=5, latents=None)
    drawn = torch.cat([noise(block) for block in range(3)], dim=2)
    save_file({"latents": drawn}, tmp_path / "noise.safetensors")
    given = dualparal(*short, "--latents-in", "noise.safetensors", "--latents-out", "given.safetensors")
    assert given.code == 0, given.stderr
    assert (tmp_path / "given.safetensors").read_bytes() == (tmp_path / "drawn.safetensors").read_bytes()

    # What comes out goes in again: the same file format.
    again = dualparal(*short, "--latents-in", "given.safetensors", "--latents-out", "again.safetensors")
    assert again.code == 0, again.stderr
    assert not torch.equal(load_file(tmp_path / "again.safetensors")["latents"], latents)


def test_block_and_split_flags_reach_the_engine(dualparal: Callable[..., Outcome], wan21: Path, tmp_path: Path) -> None:
    flags = ["--max-blocks-in-flight", 1, "--context-version", "newest", "--layers-per-stage", "1,3"]
    run = dualparal("generate", *SHORT, *flags, "--model", wan21, "--threads", 1, "--latents-out", "a.safetensors")
    assert run.code == 0, run.stderr
    assert len(closing(run.stderr).memory) == 2, "a split into two is two stages"
    made = load_file(tmp_path / "a.safetensors")["latents"]
    options: dict[str, Any] = {"device": "cpu", "frames_per_block": 4, "context_frames": 2}
    limited = Engine.from_pretrained(wan21, max_blocks_in_flight=1, context_version="newest", **options)
    assert torch.equal(made, limited(**SHORT_CALL, output_type="latent").frames)
    assert not torch.equal(made, Engine.from_pretrained(wan21, **options)(**SHORT_CALL, output_type="latent").frames)


def test_two_prompts_are_two_videos(dualparal: Callable[..., Outcome], wan21: Path, tmp_path: Path) -> None:
    flags = ["--prompt", "a dog", "--model", wan21, "--threads", 1, "--seed", 4]
    run = dualparal("generate", *SHORT, *flags, "--out", "a.mp4", "--latents-out", "a.safetensors")
    assert run.code == 0, run.stderr
    assert closing(run.stderr).frames == 66 and "a-0.mp4 and a-1.mp4 and a.safetensors" in run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-0.mp4", "a-1.mp4", "a.safetensors"]
    assert decode(tmp_path / "a-0.mp4") == decode(tmp_path / "a-1.mp4") == 33
    engine = Engine.from_pretrained(wan21, device="cpu", frames_per_block=4, context_frames=2)
    wanted = [
        engine(**{**SHORT_CALL, "prompt": prompt}, seed=seed, output_type="latent").frames
        for prompt, seed in (("a cat", 4), ("a dog", 5))
    ]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["latents"], torch.cat(wanted))

    again = dualparal("generate", *SHORT, *flags, "--out", "a.mp4")
    assert again.code == 2 and "a-0.mp4 exists" in again.stderr


def test_8_bit_flags_reach_the_engine(dualparal: Callable[..., Outcome], wan21: Path, tmp_path: Path) -> None:
    keep = ["--attention-8bit-keep-layers", "0,2", "--attention-8bit-keep-last-steps", 1]
    run = dualparal(
        "generate", *SHORT, *EIGHT_BIT, *keep, "--model", wan21, "--threads", 1, "--latents-out", "a.safetensors"
    )
    assert run.code == 0, run.stderr
    made = load_file(tmp_path / "a.safetensors")["latents"]
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "frames_per_block": 4, "context_frames": 2}
    schedule = EightBitPolicy("int8", keep_layers=(0, 2), last_steps=1)
    wanted = []
    for attention_8bit in (schedule, "off"):
        engine = Engine.from_pretrained(wan21, attention_8bit=attention_8bit, **options)
        wanted.append(engine(**SHORT_CALL, output_type="latent").frames)
    assert torch.equal(made, wanted[0]) and not torch.equal(made, wanted[1])


def test_pictures_blocks_and_the_model_of_the_package(dualparal: Callable[..., Outcome], tmp_path: Path) -> None:
    quick = ["generate", "--prompt", "a red circle", "--device", "cpu", "--steps", "1", "--num-frames", "5"]
    run = dualparal(*quick, "--out", "new/pictures", "--latents-out", "more/a.safetensors")
    assert run.code == 0
    pictures = sorted((tmp_path / "new" / "pictures").iterdir())
    assert [p.name for p in pictures] == [f"frame-{n:08d}.png" for n in range(1, 6)]
    assert all(np.asarray(Image.open(p)).shape == (64, 64, 3) for p in pictures)
    assert load_file(tmp_path / "more" / "a.safetensors")["latents"].shape[2] == 2

    refused = dualparal(*quick, "--out", "new/pictures")
    assert refused.code == 2 and "not empty" in refused.stderr and "--overwrite" in refused.stderr
    (tmp_path / "new" / "pictures" / "frame-00000009.png").touch()
    assert dualparal(*quick, "--out", "new/pictures", "--num-frames", "1", "--overwrite").code == 0
    assert [p.name for p in (tmp_path / "new" / "pictures").iterdir()] == ["frame-00000001.png"]

    assert dualparal(*quick, "--out", "a.mp4", "--keep-blocks").code == 0
    assert decode(tmp_path / "a.mp4") == 5
    assert sorted(p.name for p in (tmp_path / "a.mp4.blocks").iterdir()) == ["block-000000.mp4", "playlist.m3u"]
    (tmp_path / "a.mp4").unlink()
    refused = dualparal(*quick, "--out", "a.mp4")
    assert refused.code == 2 and "run that did not end" in refused.stderr and "playlist.m3u" in refused.stderr
    assert dualparal(*quick, "--out", "a.mp4", "--overwrite").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "more", "new"]


# Endings ----------------------------------------------------------------------------------------------------------


def _check_interrupted(run: Run, number: signal.Signals, ranks: int, everybody: bool = False) -> None:
    before = len(run.segments())
    for process in [*(run.ranks.values() if everybody else ()), run.process]:
        process.send_signal(number)
    assert run.end() == 128 + number, run.stderr
    told = closing(run.stderr)
    assert told.blocks >= before and len(told.memory) == ranks
    assert told.frames == 32 * told.blocks - 3  # whole blocks, and not all 251 of them
    assert told.blocks < 251
    assert decode(run.folder / "a.mp4") == told.frames
    assert not (run.folder / "a.mp4.blocks").exists()
    assert "error" not in run.stderr and "Traceback" not in run.stderr
    _check_what_is_left_of_a_timeline(run, ranks)


def _check_what_is_left_of_a_timeline(run: Run, ranks: int) -> None:
    events = json.loads((run.folder / "run.json").read_text())["traceEvents"]
    for rank in range(ranks):
        whole = map(str, Schedule(ranks, 2, 251, "cached", 4).actions(rank))
        done = [
            e
            for e in spans(events, row=STAGE)
            if place(e)[0] == rank and e["cat"] != "wait" and "error" not in e["args"]
        ]
        assert len(done) > 20 and [e["name"] for e in done] == list(itertools.islice(whole, len(done)))
    assert (run.folder / "run.png").exists() and not list(run.folder.glob("*.parts"))


def test_an_interrupted_run_joins_what_is_finished(start: Callable[..., Run], wan21: Path) -> None:
    long = [*LONG, "--model", wan21, "--timeline", "run.json"]
    alone, pair = (start(*long, "--stages", stages) for stages in (1, 2))
    alone.wait_for_segments(2)
    _check_interrupted(alone, signal.SIGHUP, ranks=1)
    pair.wait_for_segments(2)
    _check_interrupted(pair, signal.SIGTERM, ranks=2, everybody=True)  # as schedulers do
    assert "interrupted by SIGTERM" in pair.stderr


def test_a_killed_rank_is_named_and_finished_blocks_play(start: Callable[..., Run], wan21: Path) -> None:
    """The rank that leads: test_faults.py."""
    victim, run = 1, start(*LONG, "--model", wan21, "--stages", "2", "--timeline", "run.json")
    before = len(run.wait_for_segments(2))
    for name in ("block-000999.mp4.tmp", "playlist.m3u.tmp"):  # of a writer that is ended in the middle
        (run.folder / "a.mp4.blocks" / name).touch()
    run.ranks[victim].kill()
    assert run.end() == 3, run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and f"rank {victim} (stage {victim}) failed" in errors[0] and "SIGKILL" in errors[0]
    assert "Traceback" not in run.stderr
    assert not list(run.folder.rglob("*.tmp"))
    frames = run.playable_frames()
    assert frames >= 32 * before - 3 and (frames + 3) % 32 == 0
    last = run.stderr.splitlines()[-1]
    assert ("a.mp4.blocks: " in last and "playlist.m3u" in last) or "a.mp4 has the finished frames" in last
    _check_what_is_left_of_a_timeline(run, 2)


def test_a_signal_before_the_work_ends_it_at_once(start: Callable[..., Run], wan21: Path) -> None:
    run = start(*LONG, "--model", wan21)
    deadline = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{run.process.pid}/maps").read_text():  # the flags are read, torch begins
        assert time.monotonic() < deadline and run.process.poll() is None, run.stderr
        time.sleep(0.01)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 143
    assert "Traceback" not in run.stderr
    assert [p.name for p in run.folder.iterdir()] == ["stderr.txt"]


# Mistakes ---------------------------------------------------------------------------------------------------------


def _edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def _forget(component: str, key: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / component / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return change


def _weights(model: Path, component: str = "transformer") -> Path:
    return next((model / component).glob("*.safetensors"))


def _truncate(model: Path) -> None:
    path = _weights(model)
    path.write_bytes(path.read_bytes()[:-1000])


def _garbage(model: Path) -> None:
    path = _weights(model)
    path.write_bytes(os.urandom(64) + path.read_bytes()[64:])


def _rewrite(model: Path, component: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = _weights(model, component)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _drop(component: str, name: str) -> Callable[[Path], None]:
    return lambda model: _rewrite(model, component, lambda tensors: tensors.__delitem__(name))


def _put(component: str, name: str, *shape: int) -> Callable[[Path], None]:
    return lambda model: _rewrite(model, component, lambda tensors: tensors.update({name: torch.zeros(shape)}))


def _pointer(model: Path) -> None:
    _weights(model).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n")


def _lose_shard(model: Path) -> None:
    shutil.rmtree(model)
    build_tiny_pipeline(model, max_shard_size="100KB")
    sorted((model / "transformer").glob("*-of-*.safetensors"))[1].unlink()


def _two_variants(model: Path) -> None:
    path = _weights(model)
    shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))


def _wan22(**changes: Any) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        shutil.rmtree(model)
        build_tiny_pipeline(model, wan22=True)
        _edit(model / "model_index.json", **changes)

    return make


def _part(component: str, **changes: Any) -> Callable[[Path], None]:
    return lambda model: _edit(model / component / "config.json", **changes)


def _index(**changes: Any) -> Callable[[Path], None]:
    return lambda model: _edit(model / "model_index.json", **changes)


BLOCK = "blocks.2.attn1.to_q.weight"
BAD_MODELS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "pipeline class": (_index(_class_name="FluxPipeline"), ["FluxPipeline", "WanPipeline"]),
    "transformer class": (
        _index(transformer=["diffusers", "WanVACETransformer3DModel"]),
        ["WanVACETransformer3DModel", "WanTransformer3DModel"],
    ),
    "unknown option": (_part("transformer", window=3), ["transformer", "window=3", "WanTransformer3DModel"]),
    "missing option": (_forget("transformer", "ffn_dim"), ["config.json", "ffn_dim", "missing or malformed"]),
    "class of remote code": (_index(text_encoder=["evil", "Evil"]), ["Evil", "UMT5EncoderModel"]),
    "sampler class": (_index(scheduler=["diffusers", "DDPMScheduler"]), ["DDPMScheduler", "UniPC"]),
    "no model_index.json": (lambda m: (m / "model_index.json").unlink(), ["model_index.json", "diffusers format"]),
    "model_index.json is no JSON": (lambda m: (m / "model_index.json").write_text("{"), ["model_index.json", "JSON"]),
    "no config.json": (lambda m: (m / "transformer" / "config.json").unlink(), ["config.json", "missing"]),
    "no sampler config": (
        lambda m: (m / "scheduler" / "scheduler_config.json").unlink(),
        ["r_config.json", "missing"],
    ),
    "no weights": (lambda m: _weights(m).unlink(), ["transformer", "no weight file", "safetensors"]),
    "no weights of the VAE": (lambda m: _weights(m, "vae").unlink(), ["vae", "no weight file"]),
    "cut file": (_truncate, ["diffusion_pytorch_model.safetensors", "download it again"]),
    "garbage": (_garbage, ["diffusion_pytorch_model.safetensors", "download it again"]),
    "shard missing": (_lose_shard, ["-of-", "missing", "download"]),
    "two variants": (_two_variants, ["fp16.safetensors", "index"]),
    "LFS pointer": (_pointer, ["Git LFS pointer", "git lfs pull"]),
    "tensor missing": (_drop("transformer", BLOCK), ["1 missing", BLOCK, "download"]),
    "tensor unknown": (_put("transformer", "blocks.9.extra", 3), ["1 unknown", "blocks.9.extra"]),
    "tensor shape": (_put("transformer", BLOCK, 3, 3), [BLOCK, "(3, 3)", "(48, 48)"]),
    "VAE tensor missing": (_drop("vae", "post_quant_conv.weight"), ["vae", "1 missing", "post_quant_conv.weight"]),
    "VAE tensor shape": (_put("vae", "post_quant_conv.bias", 3), ["vae", "post_quant_conv.bias", "(3,)"]),
    "text encoder tensor missing": (
        _drop("text_encoder", "encoder.final_layer_norm.weight"),
        ["text_encoder", "encoder.final_layer_norm.weight"],
    ),
    "VAE of another model": (_part("vae", z_dim=48), ["z_dim=48", "in_channels=16"]),
    "text encoder of another model": (_part("text_encoder", d_model=64), ["d_model=64", "text_dim=32"]),
    "VAE config": (_part("vae", dim_mult="wide"), ["vae", "config.json"]),
    "image-to-video": (_part("transformer", image_dim=1280), ["image_dim=1280", "no image encoder"]),
    "Wan2.2 without boundary": (_wan22(boundary_ratio=None), ["boundary_ratio"]),
}


def _latents(*shape: int, name: str = "latents", value: float = 0.0) -> Callable[[Path], None]:
    return lambda path: save_file({name: torch.full(shape, value)}, path)


BAD_LATENTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing": (lambda path: None, ["noise.safetensors", "no such file"]),
    "a folder": (lambda path: path.mkdir(), ["noise.safetensors", "not a safetensors file"]),
    "not safetensors": (lambda path: path.write_bytes(b"\x80\x04K\x01."), ["noise.safetensors", "not a safetensors"]),
    "shape": (_latents(1, 16, 3, 4, 4), ["[1, 16, 3, 4, 4]", str(LATENTS)]),
    "NaN": (_latents(*LATENTS, value=float("nan")), ["NaN", "finite"]),
    "name": (_latents(*LATENTS, name="noise"), ["['noise']", "'latents'"]),
}

BAD_FLAGS: dict[str, tuple[list[str], list[str]]] = {
    "C > B": (["--context-frames", "9"], ["--context-frames 9", "4 or fewer"]),
    "C < 0": (["--context-frames", "-1"], ["--context-frames -1", "from 0"]),
    "B = 0": (["--frames-per-block", "0"], ["--frames-per-block 0", "from 1"]),
    "context": (["--context", "telepathy"], ["telepathy", "cached", "prior", "paper"]),
    "a split of other layers": (
        ["--layers-per-stage", "2,3", "--stages", "2"],
        ["--layers-per-stage 2,3", "the model has 4"],
    ),
    "a split into words": (["--layers-per-stage", "2,two"], ["--layers-per-stage '2,two'", "9,11,10"]),
    "a split for other stages": (["--layers-per-stage", "2,2", "--stages", "3"], ["2 numbers with --stages 3"]),
    "steps twice": (["--timesteps", "1000,757,522"], ["--steps 2 with 3 timesteps", "leave --steps out"]),
    "steps in words": (["--timesteps", "1000,x"], ["--timesteps '1000,x'", "1000,757,522"]),
    "steps upward": (["--sigmas", "0.5,1.0"], ["sigmas[1]=1.0", "below the one before"]),
    "both lists": (["--sigmas", "1.0,0.5", "--timesteps", "1000,500"], ["both given", "use one of them"]),
    "a list for another sampler": (
        ["--timesteps", "1000,500"],
        ["UniPCMultistepScheduler", "give sigmas", "--sampler euler, lcm"],
    ),
    "no list at all": (["--sampler", "dpm++", "--sigmas", "1.0,0.5"], ["DPMSolverMultistepScheduler", "unipc"]),
    "a step beyond": (["--sampler", "lcm", "--timesteps", "1001,500"], ["timesteps[0]=1001", "at most 1000"]),
    "no block in flight": (["--max-blocks-in-flight", "0"], ["--max-blocks-in-flight 0", "from 1"]),
    "stages 0": (["--stages", "0"], ["--stages 0", "1 or more"]),
    "stages -2": (["--stages", "-2"], ["--stages -2", "1 or more"]),
    "more stages than layers": (["--stages", "5"], ["--stages 5", "4 layers", "1 to 4"]),
    "no frame": (["--num-frames", "0"], ["--num-frames 0", "from 1"]),
    "negative frames": (["--num-frames", "-3"], ["--num-frames -3", "from 1"]),
    "100 frames": (["--num-frames", "100"], ["--num-frames 100", "97", "101"]),
    "height": (["--height", "40"], ["--height 40", "divisible by 16", "32 or 48"]),
    "width": (["--width", "7"], ["--width 7", "divisible by 16", "use 16"]),
    "huge height": (["--height", "1000000"], ["--height 1000000", "16384"]),
    "cannot fit": (
        ["--height", "16384", "--width", "16384", "--frames-per-block", "4096", "--num-frames", "100001"],
        ["need about", "GiB", " bytes", "smaller"],
    ),
    "NaN guidance": (["--guidance-scale", "nan"], ["--guidance-scale nan", "5.0"]),
    "infinite guidance": (["--guidance-scale", "inf"], ["--guidance-scale inf", "5.0"]),
    "second guidance": (["--guidance-scale-2", "3"], ["--guidance-scale-2 3.0", "single transformer"]),
    "no step": (["--steps", "0"], ["--steps 0", "from 1"]),
    "seed": (["--seed", "-1"], ["--seed -1", "non-negative"]),
    "not a model": (["--model", "nowhere"], ["'nowhere'", "diffusers format", "hub id"]),
    "a file": (["--model", "{file}"], ["file.txt", "diffusers format", "hub id"]),
    "below a file": (["--out", "{file}/a.mp4"], ["file.txt", "not a folder", "choose"]),
    "latents below a file": (["--latents-out", "{file}/a"], ["--latents-out", "file.txt", "not a folder"]),
    "a folder called .mp4": (["--out", "{folder}.mp4"], ["folder.mp4", "is a folder"]),
    "latents to a folder": (["--latents-out", "{folder}.mp4", "--overwrite"], ["folder.mp4", "is a folder"]),
    "PNG folder is a file": (["--out", "{plain}"], ["plain", "is a file", "folder for PNG"]),
    "PNG folder with other files": (["--out", "{full}"], ["full", "not empty", "--overwrite"]),
    "ending": (["--out", "a.avi"], ["a.avi", ".mp4", "PNG"]),
    "exists": (["--out", "{folder}.mp4/there.mp4"], ["there.mp4", "exists", "--overwrite"]),
    "latents exist": (["--latents-out", "{file}"], ["--latents-out", "file.txt", "exists", "--overwrite"]),
    "outputs collide": (["--out", "a.mp4", "--latents-out", "a.mp4"], ["--latents-out a.mp4", "another place"]),
    "name too long": (["--out", "a" * 300 + ".mp4"], ["aaa", "too long", "another name"]),
    "gpus without GPU": (["--device", "cuda"], ["--device cuda", "no GPU", "--device cpu"]),
    "prompt_at of which": (["--prompt", "dog", "--prompt-at", "8:cow"], ["2 times --prompt", "run them apart"]),
    "prompt_at": (["--prompt-at", "soon"], ["--prompt-at, number 1", "FRAME:TEXT"]),
    "prompt_at half": (["--prompt-at", "-4:dog"], ["--prompt-at, number 1", "FRAME:TEXT"]),
    "prompt_at superscript": (["--prompt-at", "²:dog"], ["FRAME:TEXT"]),
    "prompt_at first": (["--prompt-at", "0:dog"], ["--prompt-at 0:...", "--prompt"]),
    "prompt_at beyond": (["--prompt-at", "33:dog"], ["--prompt-at 33:...", "ends at 32"]),
    "prompt_at twice": (["--prompt-at", "9:dog", "--prompt-at", "09:cow"], ["--prompt-at 9:...", "one per frame"]),
    "sampler": (["--sampler", "magic"], ["magic", "unipc", "euler", "dpm++"]),
    "flow shift": (["--flow-shift", "nan"], ["--flow-shift nan", "above 0"]),
    "dtype": (["--dtype", "int8"], ["int8", "float32", "bfloat16"]),
    "fps": (["--fps", "0"], ["--fps 0.0", "1000"]),
    "NaN fps": (["--fps", "nan"], ["--fps nan", "1000"]),
    "slow fps": (["--fps", "0.0001"], ["--fps 0.0001", "1/1001"]),
    "device": (["--device", "tpu"], ["--device tpu", "cuda or cpu"]),
    "depth": (["--depth", "0"], ["--depth 0", "at least one"]),
    "8-bit mode": (["--attention-8bit", "int4"], ["mode='int4'", "int8"]),
    "8 bits beside 32": (["--attention-8bit", "fp8"], ["--attention-8bit fp8", "--dtype float32", "bfloat16"]),
    "8-bit linears": (["--linear-8bit", "fp8", "--dtype", "float16"], ["--linear-8bit fp8", "float16", "bfloat16"]),
    "8-bit linears' layers": (
        ["--linear-8bit", "fp8", "--linear-8bit-keep-layers", "x"],
        ["--linear-8bit-keep-layers 'x'", "0,29"],
    ),
    "8-bit layers": (
        [*EIGHT_BIT, "--attention-8bit-keep-layers", "0,x"],
        ["--attention-8bit-keep-layers '0,x'", "0,29"],
    ),
    "8-bit layers beyond": ([*EIGHT_BIT, "--attention-8bit-keep-layers", "0,4"], ["(0, 4)", "4 layers", "0 to 3"]),
    "8-bit layers, off": (["--attention-8bit-keep-layers", "0"], ["(0,)", "off", "choose a mode"]),
    "no step in 8 bits": ([*EIGHT_BIT, "--attention-8bit-keep-last-steps", "99"], ["last_steps=99", "leave none of"]),
    "timeline ending": (["--timeline", "a.txt"], ["a.txt", ".json.gz"]),
    "timeline exists": (["--timeline", "{folder}.mp4/there.json"], ["--timeline", "there.json", "--overwrite"]),
    "timeline below a file": (["--timeline", "{file}/a.json"], ["--timeline", "file.txt", "not a folder"]),
    "threads": (["--threads", "-1"], ["--threads -1", "from 1"]),
    "too little patience": (["--heartbeat-limit", "0"], ["--heartbeat-limit 0", "use 3 or more"]),
    "patience below 0": (["--grace", "-1"], ["--grace -1", "use 0 or more"]),
}


FOUND_BY_RANKS = (  # the parent has no torch and no model
    "cannot fit", "second guidance", "8 bits beside 32",
    "a list for another sampler", "no list at all", "a step beyond",
)  # fmt: skip


@pytest.fixture
def refuses(
    dualparal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[list[Any], list[str]], None]:
    """Checks that a call ends with one error and code 2, before any rank starts or any weight is read."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(supervisor, "supervise", work)
    monkeypatch.setattr(ModelFiles, "load_slices", work)
    monkeypatch.setattr(ModelFiles, "load_text_encoder", work)

    def check(arguments: list[Any], expected: list[str]) -> None:
        before = sorted(tmp_path.rglob("*"))
        outcome = dualparal("generate", *arguments)
        assert outcome.code == 2, outcome.stderr
        lines = outcome.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and not outcome.stdout, outcome.stderr
        missing = [text for text in expected if text not in lines[0]]
        assert not missing, lines[0]
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_is_refused(refuses: Callable[..., None], wan21: Path, tmp_path: Path, name: str) -> None:
    damage, expected = BAD_MODELS[name]
    model = tmp_path / "model"
    shutil.copytree(wan21, model)
    damage(model)
    refuses([*SHORT, "--model", model, "--out", "a.mp4"], expected)


@pytest.mark.parametrize("name", BAD_LATENTS)
def test_bad_latents_are_refused(refuses: Callable[..., None], wan21: Path, tmp_path: Path, name: str) -> None:
    make, expected = BAD_LATENTS[name]
    make(tmp_path / "noise.safetensors")
    flags = ["--latents-in", "noise.safetensors", "--out", "a.mp4"]
    refuses([*SHORT, "--model", wan21, *flags], expected)


@pytest.mark.parametrize(
    ("name", "stages"), [(name, n) for name in BAD_FLAGS for n in (1, 2) if n == 1 or name not in FOUND_BY_RANKS]
)
def test_a_bad_flag_is_refused(
    refuses: Callable[..., None], wan21: Path, tmp_path: Path, name: str, stages: int
) -> None:
    flags, expected = BAD_FLAGS[name]
    for path in ("folder.mp4", "full"):
        (tmp_path / path).mkdir()
    for path in ("file.txt", "plain", "full/mine.doc", "folder.mp4/there.mp4", "folder.mp4/there.json"):
        (tmp_path / path).touch()
    places = {"file": "file.txt", "folder": "folder", "plain": "plain", "full": "full"}
    base = [*SHORT, "--model", wan21, "--stages", stages, "--out", "a.mp4"]
    refuses([*base, *(flag.format(**places) for flag in flags)], expected)  # the last of two equal flags counts


def test_gpus_and_ranks_are_counted_once(
    refuses: Callable[..., None], wan21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_device = [flag for flag in SHORT if flag not in ("--device", "cpu")] + ["--model", wan21]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses([*without_device, "--gpus", 2], ["--gpus 2", "no GPU", "--device cpu"])
    refuses([*without_device, "--gpus", 0], ["--gpus 0", "1 or more"])
    refuses([*without_device, "--gpus", 2, "--stages", 3], ["--gpus 2", "--stages 3", "one of them"])
    refuses([*SHORT, "--model", wan21, "--gpus", 2], ["--gpus 2", "--device cpu", "--stages"])
    refuses([*SHORT, "--model", wan21, "--decode-gpus", -1], ["--decode-gpus -1", "0 for none"])
    refuses([*without_device, "--gpus", 2, "--decode-gpus", 2], ["--decode-gpus 2 of --gpus 2", "1 at most"])
    refuses([*without_device, "--gpus", 4, "--stages", 4, "--decode-gpus", 2], ["--gpus 4", "leave --stages out"])
    both = ["--decode-gpus", 2, "--decode-in-place"]
    refuses([*SHORT, "--model", wan21, *both], ["--decode-in-place", "--decode-gpus 2", "leave one out"])
    refuses([*SHORT, "--model", wan21, "--decode-gpus", 5], ["5", "rows"])
    refuses([*SHORT, "--model", wan21, "--latents-out", "a", "--decode-gpus", 1], ["--decode-gpus 1 without --out"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuses([*without_device, "--gpus", 2], ["--gpus 2", "torch sees 1"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses([*SHORT, "--model", wan21, "--stages", 3], ["--stages 3", "2 processes", "leave --stages out"])
    refuses([*SHORT, "--model", wan21, "--decode-gpus", 2], ["--decode-gpus 2", "2 processes", "start more"])
    refuses([*SHORT, "--model", wan21, "--stages", 2, "--decode-gpus", 1], ["--stages 2", "start 3 processes"])


def test_a_hub_id_that_cannot_be_had_is_refused(
    refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1, which is read at import
    refuses([*SHORT, "--model", "nobody/nothing"], ["'nobody/nothing'", "no directory here", "hub"])


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


_unpickled: list[str] | None = None  # a hook can not be taken out again: it listens while this is a list


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _unpickled is not None and event == "pickle.find_class":
        _unpickled.append(str(arguments))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_pickle_is_never_read(
    refuses: Callable[..., None], wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str
) -> None:
    model, trap = tmp_path / "model", tmp_path / "touched"
    shutil.copytree(wan21, model)
    weights = _weights(model, component)
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(pickle.dumps(_Touch(trap)))
    (model / component / "other.pt").write_bytes(pickle.dumps(_Touch(trap)))
    if not hasattr(_listen, "installed"):
        sys.addaudithook(_listen)
        _listen.installed = True  # type: ignore[attr-defined]
    monkeypatch.setattr(sys.modules[__name__], "_unpickled", [])
    refuses([*SHORT, "--model", model, "--out", "a.mp4"], [weights.stem, "pickles and never read", "convert"])
    assert _unpickled == [] and not trap.exists()
    pickle.loads(weights.with_suffix(".bin").read_bytes())
    assert _unpickled and trap.exists()  # the trap works


def test_an_unknown_flag_and_a_missing_one_are_named(dualparal: Callable[..., Outcome], tmp_path: Path) -> None:
    for arguments, expected in (
        (["generate", "--prompt", "a cat", "--bogus"], "--bogus"),
        (["generate", "--prompt", "a cat", "--steps", "many"], "--steps"),
        (["generate"], "--prompt"),
        (["paint"], "paint"),
    ):
        outcome = dualparal(*arguments)
        assert outcome.code == 2 and expected in outcome.stderr
        assert "--help" in outcome.stderr or outcome.stderr == "error: --steps many: use a whole number\n"
        assert "Traceback" not in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_two_processes_say_a_mistake_once(start: Callable[..., Run], wan21: Path) -> None:
    run = start(*SHORT, "--model", wan21, "--stages", "2", "--guidance-scale-2", "3", "--out", "a.mp4")
    assert run.end() == 2
    assert run.stderr.startswith("error: --guidance-scale-2 3.0") and run.stderr.count("\n") == 1, run.stderr
    assert [p.name for p in run.folder.iterdir()] == ["stderr.txt"]


# Help -------------------------------------------------------------------------------------------------------------


def test_help_names_every_flag_at_once_and_without_torch() -> None:
    program = (
        "import sys\nfrom dualparal.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'av'} & set(sys.modules)\n"
        "print('imported:', sorted(heavy))\nsys.exit(code)"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = subprocess.run(
        [sys.executable, "-c", program, "generate", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "220", "NO_COLOR": "1", "TERM": "dumb"},
        check=True,
    )
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 3  # of CPU: others may have the rest
    assert "imported: []" in result.stdout
    text = " ".join(result.stdout.split())
    flags = [
        "--" + name.replace("_", "-") for name in inspect.signature(cli.generate_command).parameters if name != "call"
    ]
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", text)]
    for hint in ("Pixels", "latent frames", "Frames per second", "own, or 50", "[default: 81]", "Default: cuda"):
        assert hint in text


def test_version_doctor_and_no_arguments(dualparal: Callable[..., Outcome]) -> None:
    version = dualparal("--version")
    assert version.code == 0 and version.stdout == f"dualparal {__version__}\n"
    doctor = dualparal("doctor")
    assert doctor.code == 0 and "Traceback" not in doctor.stderr
    for word in ("dualparal", "python", "torch", "diffusers", "extension", "gpu", "video"):
        assert re.search(rf"^{word}", doctor.stdout, re.MULTILINE), doctor.stdout
    assert torch.__version__ in doctor.stdout
    bare = dualparal()
    assert "generate" in bare.stdout + bare.stderr and "doctor" in bare.stdout + bare.stderr
