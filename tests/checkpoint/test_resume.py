"""Snapshots and resume: after a crash at any point the run goes on bit for bit, on any number of stages."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from dualparal.checkpoint import sealed, snapshot
from dualparal.checkpoint.checkpointer import Checkpoint, blocks_to_restore
from dualparal.checkpoint.snapshot import Snapshot, SnapshotError
from dualparal.config.blocks import BlockConfig
from dualparal.decoding.chunks import Chunk
from dualparal.engine.engine import Engine
from dualparal.io.video import SegmentWriter
from dualparal.sampling.sampler import Sampler
from dualparal.sampling.state import BlockState
from dualparal.schedule.layout import Layout
from engine_calls import embeds

SIZE = {"height": 32, "width": 32}
Build = Callable[..., Engine]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk does, not when: a tiny run would be over before its first file is synced."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def call(**others: Any) -> dict[str, Any]:
    return {"num_frames": 49, "num_inference_steps": 4, "seed": 3, **SIZE, **others}


# Every crash point ------------------------------------------------------------------------------------------------


class Disk:
    """Copies of a folder before every change of a name in it: what a kill at that moment would leave."""

    def __init__(self, folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.copies, self.count = folder, copies, 0
        self._lock = threading.Lock()
        for module, name in ((os, "replace"), (Path, "unlink")):
            self._watch(module, name, monkeypatch)

    def _watch(self, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        do = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                if any(str(self.folder) in str(arg) for arg in args):
                    self.keep()
                return do(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def keep(self) -> None:
        shutil.copytree(self.folder, self.copies / str(self.count))
        self.count += 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("policy, reuse", [("cached", "off"), ("prior", "off"), ("paper", "off"),
                                           ("cached", "steps=2,uncond=2,order=1")])  # fmt: skip
def test_every_crash_point(
    engine: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, reuse: str, exhaustive: bool
) -> None:
    """The disk as a kill would leave it before each rename and removal, of latents, segments and snapshots: a run that
    goes on from there, with another number of stages, has the same latents and the same video files."""
    options = {"frames_per_block": 2, "context_frames": 1, "context": policy, "refresh_every": 3, "reuse": reuse}
    built = engine(stages=2, **options)
    folder = tmp_path / "run"

    def make(chunks: Any, segments: Path, resume: bool) -> dict[int, torch.Tensor]:
        writer = SegmentWriter(segments, 16, resume=resume)
        made = {}
        for chunk in chunks:
            writer.write(chunk.block, chunk.frames)
            made[chunk.block] = chunk.latents
        return made

    disk = Disk(folder, tmp_path / "copies", monkeypatch)
    chunks = built.stream(
        **embeds(built), output_type="uint8", checkpoint=Checkpoint(folder / "kept", every=1), **call(num_frames=97)
    )
    folder.mkdir(exist_ok=True)
    whole = make(slowly(chunks), folder / "segments", resume=False)
    disk.keep()
    monkeypatch.undo()
    files = {path.name: path.read_bytes() for path in (folder / "segments").iterdir()}
    assert disk.count > 20 and len(whole) > 5
    print(f"{policy}: {disk.count} crash points")
    resumed_from = set()
    for point in range(disk.count) if exhaustive else range(1, disk.count, 11):
        left = tmp_path / "copies" / str(point)
        if not snapshot._snapshots(left / "kept"):
            continue  # the run had not begun
        again = engine(stages=1 + point % 4, **options)
        rest = make(again.resume(left / "kept"), left / "segments", resume=True)
        resumed_from.add(min(rest, default=None))  # nothing is left at the last point
        for block, latents in rest.items():
            assert torch.equal(latents, whole[block]), f"crash point {point}, block {block}"
        assert {path.name: path.read_bytes() for path in (left / "segments").iterdir()} == files
    assert len(resumed_from) > 2, "different snapshots were used"


def slowly(chunks: Any) -> Any:
    """Lets the thread that writes keep up with a tiny run."""
    for chunk in chunks:
        yield chunk
        threading.Event().wait(0.02)


# All kinds of runs --------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "gap": {"max_blocks_in_flight": 2, "refresh_every": 5},
    "newest": {"max_blocks_in_flight": 2, "refresh_every": 5, "context_version": "newest"},
    "prior with a gap": {"context": "prior", "max_blocks_in_flight": 2, "refresh_every": 5},
    "no context": {"context_frames": 0, "refresh_every": None},
    "paper, any iteration": {"context": "paper", "refresh_every": None},
    "8 bits, paper": {"attention_8bit": "int8", "dtype": "bfloat16", "context": "paper"},
    "euler": {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)},
    "lcm": {"scheduler": FlowMatchLCMScheduler(shift=3.0)},
    "dpm++": {
        "scheduler": DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    },
    "anchor": {"anchor_frames": 2, "anchor_weight": 0.5},
    "two experts": {"model": "wan22"},
    "reuse": {"reuse": "steps=2,uncond=2,order=2,first=2"},
    "reuse, two experts, paper": {"reuse": "uncond=3,order=1", "model": "wan22", "context": "paper"},
    "reuse, 8 bits": {"reuse": "steps=2,uncond=2,order=1", "attention_8bit": "int8", "dtype": "bfloat16"},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_resume(engine: Build, wan21: Path, wan22: Path, tmp_path: Path, kind: str) -> None:
    options = {"frames_per_block": 2, "context_frames": 1, "refresh_every": 3, **KINDS[kind]}
    model, scheduler = options.pop("model", None), options.pop("scheduler", None)

    def build(stages: int) -> Engine:
        built = engine(wan22 if model else wan21, stages=stages, **options)
        built.scheduler = scheduler or built.scheduler
        return built

    whole, made = run_twice(build, tmp_path, embeds(build(1)), call(num_inference_steps=6, output_type="np"), after=4)
    assert 0 < made[0].block < 5, "not from the beginning"
    for chunk in made:
        same = whole[chunk.block]
        assert torch.equal(chunk.latents, same.latents) and np.array_equal(chunk.frames, same.frames)
        assert chunk.start_frame == same.start_frame
    assert made[-1].block == whole[-1].block


def run_twice(
    build: Callable[[int], Engine], folder: Path, prompt: Any, asked: dict[str, Any], after: int
) -> tuple[list[Chunk], list[Chunk]]:
    """The chunks of an unbroken run with two stages, and those of one with three that goes on with the last snapshot
    of one that ended ``after`` so many chunks."""
    whole = list(build(2).stream(**prompt, **asked))
    chunks = slowly(build(2).stream(**prompt, **asked, checkpoint=Checkpoint(folder / "kept", every=1)))
    for _ in range(after):
        next(chunks)
    chunks.close()
    return whole, list(build(3).resume(folder / "kept"))


def test_several_videos_and_changing_prompts_go_on(engine: Build, tmp_path: Path) -> None:
    def build(stages: int) -> Engine:
        return engine(stages=stages, frames_per_block=2, context_frames=1, refresh_every=4)

    prompts = [{0: "a cat", 20: "a dog"}, "a horse"]
    whole, made = run_twice(build, tmp_path, {"prompt": prompts}, call(output_type="latent", seed=[5, 9]), after=6)
    expected = {(chunk.video, chunk.block): chunk.latents for chunk in whole}
    assert {chunk.video for chunk in made} == {0, 1} and len(made) < len(whole)
    for chunk in made:
        assert torch.equal(chunk.latents, expected[chunk.video, chunk.block])


def test_noise_that_was_given_and_a_resume_of_a_resume(engine: Build, tmp_path: Path) -> None:
    def build(stages: int) -> Engine:
        return engine(stages=stages, frames_per_block=2, context_frames=1, refresh_every=3)

    noise = torch.randn(1, 16, 33, 4, 4, generator=torch.Generator().manual_seed(2))
    asked = call(output_type="latent", num_frames=129, latents=noise)
    prompt = embeds(build(1))
    whole = list(build(1).stream(**prompt, **asked))
    checkpoint = Checkpoint(tmp_path / "kept", every=1)
    chunks = slowly(build(2).stream(**prompt, **asked, checkpoint=checkpoint))
    starts = []
    while True:
        made = []
        for chunk in chunks:
            made.append(chunk)
            assert torch.equal(chunk.latents, whole[chunk.block].latents)
            if len(made) == 5 and len(starts) < 4:
                break
        else:
            break
        chunks.close()
        starts.append(made[0].block)
        chunks = slowly(build(5 - len(starts)).resume(checkpoint))
    assert starts == sorted(starts) and starts[-1] > 0 and made[-1].block == whole[-1].block


def test_a_finished_run_has_nothing_left_to_do_and_decodes_again_what_is_wanted(engine: Build, tmp_path: Path) -> None:
    built = engine(frames_per_block=2, context_frames=1, context="paper")
    checkpoint = Checkpoint(tmp_path / "kept", keep_latents=True)
    whole = list(built.stream(**embeds(built), **call(output_type="uint8"), checkpoint=checkpoint))
    found = snapshot.newest(tmp_path / "kept").snapshot
    assert found.end == snapshot.FINISHED and found.blocks == [{}]
    other = engine(frames_per_block=2, context_frames=1, context="paper", stages=2)
    assert list(other.resume(tmp_path / "kept")) == []
    for block, frames in other.decode_again(tmp_path / "kept", [0, 2, 3, 5]):
        assert np.array_equal(frames, whole[block].frames)
    snapshot.close(tmp_path / "kept", keep=True)
    assert [path.name[:8] for path in (tmp_path / "kept").iterdir()] == ["snapshot"]
    snapshot.close(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


# What is kept is what is needed -------------------------------------------------------------------------------------


@pytest.fixture
def kept(engine: Build, tmp_path: Path) -> tuple[Path, list[Chunk], Callable[[int], Engine]]:
    """A folder of an interrupted run, the chunks of the unbroken one, and how to build its engine."""

    def build(stages: int) -> Engine:
        return engine(stages=stages, frames_per_block=2, context_frames=1, context="paper")

    asked = call(num_inference_steps=6, output_type="pt", num_frames=77)  # long: a run may be ahead of its chunks
    prompt = embeds(build(1))
    whole = list(build(1).stream(**prompt, **asked))
    chunks = slowly(build(1).stream(**prompt, **asked, checkpoint=Checkpoint(tmp_path / "kept", every=1)))
    for given, _ in enumerate(chunks, 1):
        # On a busy machine snapshots lag behind: wait for one in which two blocks of six steps are finished.
        if given >= 4 and snapshot.newest(tmp_path / "kept").snapshot.iteration >= 8:
            break
    chunks.close()
    return tmp_path / "kept", whole, build


@pytest.mark.parametrize("field", ["model_outputs", "timestep_list", "last_sample", "lower_order_nums", "this_order"])
def test_without_a_field_of_the_sampler_the_video_is_another(kept: Any, field: str) -> None:
    """As if the sampler had not begun; so the equality above can fail."""
    folder, whole, build = kept
    resumed = snapshot.newest(folder)
    found, name = resumed.snapshot, resumed.name
    (folder / name).unlink()
    (folder / f"{name}.tmp").touch()  # of a kill
    forgotten = {k: v for k, v in build(1).scheduler.__dict__.items() if k == field}

    def without(sampler: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in {**sampler, **forgotten}.items() if k != field or k in forgotten}

    blocks = [{b: BlockState(s.latents, without(s.sampler)) for b, s in video.items()} for video in found.blocks]
    replace(found, blocks=blocks).write(folder)
    try:
        made = list(build(1).resume(folder))
    except (TypeError, AttributeError, IndexError):
        return
    assert not list(folder.glob("*.tmp"))
    same = all(torch.equal(c.latents, whole[c.block].latents) for c in made)
    assert same == (field == "timestep_list"), "time steps can be derived"


def test_the_decoder_needs_its_history(kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, whole, build = kept
    monkeypatch.setattr("dualparal.decoding.delivery.Delivery.history", 1)
    made = list(build(1).resume(folder))
    assert all(torch.equal(c.latents, whole[c.block].latents) for c in made)
    assert not all(torch.equal(c.frames, whole[c.block].frames) for c in made)


@pytest.mark.parametrize("sampler", [
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchLCMScheduler(),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
], ids=lambda scheduler: type(scheduler).__name__)  # fmt: skip
def test_nothing_else_of_a_sampler_changes(sampler: Any) -> None:
    """What its state leaves out is the same at all steps."""
    state = Sampler(sampler, 5).start(0)
    latents = torch.randn(1, 4, 2, 4, 4)
    before = {name: repr(value) for name, value in vars(state.scheduler).items()}
    changed = set()
    for step in range(5):
        latents = state.step(torch.randn_like(latents), step, latents)
        after = {name: repr(value) for name, value in vars(state.scheduler).items()}
        changed |= {name for name in after if after[name] != before.get(name)}
    # The size of latents is noted for scales, which are refused.
    assert changed - {"_init_size"} <= set(state.state())


@pytest.mark.parametrize(("frames", "first", "history", "blocks"), [
    (2, 0, 38, range(0, 0)), (2, 5, 0, range(4, 5)), (2, 5, 4, range(3, 5)), (2, 5, 5, range(2, 5)),
    (8, 7, 38, range(2, 7)), (8, 3, 38, range(0, 3)),
])  # fmt: skip
def test_blocks_that_a_resume_needs(frames: int, first: int, history: int, blocks: range) -> None:
    assert blocks_to_restore(Layout(BlockConfig(frames, 1), None), first, history) == blocks


# Snapshots that cannot be used --------------------------------------------------------------------------------------


def test_a_snapshot_without_a_velocity_is_refused(engine: Build, tmp_path: Path) -> None:
    """Those that later ones are extrapolated from: as many as the steps behind a block say, shaped as its latents."""
    options = {"frames_per_block": 2, "context_frames": 1, "context": "paper", "reuse": "steps=2,uncond=2,order=1"}
    built = engine(**options)
    chunks = slowly(
        built.stream(**embeds(built), **call(output_type="latent"), checkpoint=Checkpoint(tmp_path / "kept", every=1))
    )
    next(chunks)
    next(chunks)
    chunks.close()
    folder = tmp_path / "kept"
    resumed = snapshot.newest(folder)
    (folder / resumed.name).unlink()
    for old in snapshot._snapshots(folder):
        old.unlink()
    for wrong in (lambda v: (), lambda v: [v[0][:-1], v[1]], lambda v: [v[0], [x[:, :1] for x in v[1]]]):
        blocks = [
            {b: BlockState(s.latents, s.sampler, wrong(s.velocities)) for b, s in video.items()}
            for video in resumed.snapshot.blocks
        ]
        assert blocks[0], "blocks are in flight"
        path = replace(resumed.snapshot, blocks=blocks).write(folder)
        with pytest.raises(SnapshotError, match="a snapshot without the velocities that block"):
            engine(**options).resume(folder)
        path.unlink()
    with pytest.raises(SnapshotError, match=r"another run: reuse: .*'steps': 2.* there, .*'steps': 1.* here"):
        resumed.snapshot.write(folder)
        engine(**{**options, "reuse": "off"}).resume(folder)


def test_a_damaged_snapshot_is_passed_over(kept: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder, whole, build = kept
    newest = snapshot._snapshots(folder)[0]
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    made = list(build(2).resume(folder))
    assert f"{newest.name} is damaged" in caplog.text and not newest.exists()
    assert all(torch.equal(c.latents, whole[c.block].latents) for c in made)
    for path in snapshot._snapshots(folder):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match=r"no snapshot in .* can be used: .*damaged.*damaged"):
        build(1).resume(folder)


def test_missing_latents_and_foreign_engines_are_refused(kept: Any, engine: Build) -> None:
    folder, _, build = kept
    with pytest.raises(SnapshotError, match=r"another run: blocks: .*'context_frames': 1.* there, .*2.* here"):
        engine(frames_per_block=2, context_frames=2, context="paper").resume(folder)
    with pytest.raises(SnapshotError, match=r"another run: dtype: 'torch.float32' there, 'torch.bfloat16' here"):
        engine(frames_per_block=2, context_frames=1, context="paper", dtype="bfloat16").resume(folder)
    last = max(snapshot._blocks(folder))
    for number in range(last[1] + 1):
        for path in snapshot._blocks(folder).get((0, number), []):
            path.unlink()
    with pytest.raises(SnapshotError, match=r"the latents of block . are missing"):
        list(build(1).resume(folder))
    with pytest.raises(SnapshotError, match="holds no snapshot"):
        build(1).resume(folder / "elsewhere")


def test_bytes_of_a_snapshot(tmp_path: Path) -> None:
    """No cut and no flipped bit is ever loaded."""
    state = BlockState(torch.randn(1, 2, 2, 2, 2), {"model_outputs": [None, torch.randn(1, 2, 2, 2, 2)], "n": 2})
    path = Snapshot(7, {"a": 1}, [{0: torch.randn(2, 3, 4)}], [{5: state}]).write(tmp_path)
    found = snapshot.read(path)
    assert found.iteration == 7 and found.run == {"a": 1} and found.blocks[0][5].sampler["n"] == 2
    assert torch.equal(found.blocks[0][5].sampler["model_outputs"][1], state.sampler["model_outputs"][1])
    data = path.read_bytes()
    damaged = [data[:size] for size in range(len(data))]
    damaged += [data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :] for at in range(len(data))]
    for wrong in damaged:
        path.write_bytes(wrong)
        with pytest.raises(SnapshotError, match="is damaged"):
            snapshot.read(path)


def test_the_same_latents_are_the_same_file_and_of_one_block(tmp_path: Path) -> None:
    """A block that is made again with the same bits gives no warning; its file says whose it is."""
    latents = torch.randn(1, 2, 2, 2, 2)
    assert len({snapshot.write_block(tmp_path, "run", 0, 3, latents) for _ in range(20)}) == 1
    assert torch.equal(snapshot.read_blocks(tmp_path, "run", 0, range(3, 4))[0], latents)
    with pytest.raises(SnapshotError, match="is of another run"):
        snapshot.read_blocks(tmp_path, "other", 0, range(3, 4))
    only = next(tmp_path.iterdir())
    only.rename(tmp_path / only.name.replace("video-000", "video-001"))
    with pytest.raises(SnapshotError, match="is of another block or video"):
        snapshot.read_blocks(tmp_path, "run", 1, range(3, 4))


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    def forged(metadata: dict[str, str], tensors: dict[str, torch.Tensor] | None = None) -> Path:
        return sealed.write(tmp_path, "snapshot-0000000001", tensors or {"a": torch.zeros(1)}, metadata)

    ours = {"format": snapshot.FORMAT, "version": "2"}
    for metadata, why in [
        ({}, "is not a snapshot of dualparal"),
        ({"format": snapshot.FORMAT, "version": "1"}, "version '1' of the format, and this dualparal reads 2"),
        ({**ours, "run": "{}", "state": "{}"}, "not a snapshot's contents"),
        ({**ours, "run": "[", "state": "{}"}, "not a snapshot's contents"),
        ({**ours, "run": "{}", "state": '{"iteration": -1, "prompts": [{}], "blocks": [{}]}'}, "not a snapshot's"),
        ({**ours, "run": "{}", "state": '{"iteration": 1, "prompts": [{"0": "tensor:b"}], "blocks": [{}]}'}, "not a"),
        ({**ours, "run": "[" * 10**5, "state": "{}"}, "not a snapshot's contents"),
    ]:
        with pytest.raises(SnapshotError, match=why):
            snapshot.read(forged(metadata))
    real = forged(ours)
    link = tmp_path / ("snapshot-0000000002" + real.name[19:])
    link.symlink_to(real)
    with pytest.raises(SnapshotError, match="cannot be read"):
        snapshot.read(link)
    fifo = tmp_path / f"snapshot-0000000003-{'0' * 32}.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(SnapshotError, match="is not a file"):
        snapshot.read(fifo)


def test_nobody_goes_on_from_nan(tmp_path: Path) -> None:
    state = BlockState(torch.full((1, 2, 2, 2, 2), torch.nan), {})
    with pytest.raises(SnapshotError, match="NaN or infinity"):
        Snapshot(7, {}, [{0: torch.zeros(2, 3, 4)}], [{5: state}]).write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_needs_a_policy_and_an_empty_folder(engine: Build, tmp_path: Path) -> None:
    built = engine(frames_per_block=2, context_frames=1)
    with pytest.raises(ValueError, match="context='cached' and no refresh_every"):
        built.stream(**embeds(built), **call(), checkpoint=tmp_path / "kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    paper = engine(frames_per_block=2, context_frames=1, context="paper")
    with pytest.raises(SnapshotError, match="holds something else"):
        paper.stream(**embeds(paper), **call(), checkpoint=tmp_path / "full")
    with pytest.raises(ValueError, match="checkpoint_every=0"):
        Checkpoint(tmp_path, every=0)


def test_a_full_disk_ends_the_run_and_leaves_the_last_snapshot(
    engine: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = engine(frames_per_block=2, context_frames=1, context="paper")
    chunks = slowly(
        built.stream(**embeds(built), **call(output_type="latent"), checkpoint=Checkpoint(tmp_path / "kept", every=1))
    )
    next(chunks)
    next(chunks)
    wrote = sealed.whole_file

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealed, "whole_file", full)
    with pytest.raises(OSError, match="No space left"):
        for _ in chunks:
            pass
    monkeypatch.setattr(sealed, "whole_file", wrote)
    assert [c.block for c in built.resume(tmp_path / "kept")][-1] == 5
