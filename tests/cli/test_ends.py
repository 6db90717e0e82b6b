"""The edges of a command's life: its end, a second run to the same place, foreign material, the same command again."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cli_runs import Run, generate_here
from dualparal.cli.results import Results
from dualparal.io.files import whole_file
from dualparal.io.locks import Locks
from dualparal.io.video import SegmentWriter

VIDEO = ["--prompt", "a cat", "--height", 32, "--width", 32, "--steps", 2, "--frames-per-block", 2, "--num-frames", 41]
VIDEO += ["--context-frames", 1, "--context", "paper", "--device", "cpu", "--threads", 1]
KEPT = ["--checkpoint", "kept", "--checkpoint-every", 1]


class Died(OSError):
    """As good as a kill: nothing is tidied but what every error tidies."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def runs(wan21: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs: whole ones by what they write, the same broken before the fourth block, and a foreign one."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = {
        "a": ["--out", "a.mp4", "--latents-out", "a.safetensors"],
        "pictures": ["--out", "pictures"],
        "foreign": ["--out", "a.mp4", "--latents-out", "a.safetensors", "--seed", 7],
    }
    take = Results.take
    with pytest.MonkeyPatch.context() as patch:
        for name, job in jobs.items():
            if name != "foreign":
                assert generate_here(folder / name, *VIDEO, *job, "--model", wan21).code == 0

            def broken(self: Results, chunk: Any, tell: Any) -> None:
                time.sleep(0.05)  # the thread that writes keeps up
                if chunk.block == 3:
                    raise Died(5, "the test's")
                take(self, chunk, tell)

            patch.setattr(Results, "take", broken)
            started = generate_here(folder / f"broken-{name}", *VIDEO, *job, *KEPT, "--model", wan21)
            assert started.code == 5 and "resume with: dualparal generate --resume kept" in started.stderr
            patch.setattr(Results, "take", take)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def broken(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a broken run's folder."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(runs[f"broken-{name}"], tmp_path / "run"))

    return copy


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run but the report of its failure."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".error.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


# Material that is not what the run wrote ------------------------------------------------------------------------------


def _fewer_frames(run: Path, foreign: Path) -> None:
    import av

    path = run / "a.mp4.blocks" / "block-000001.mp4"
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]

    written = SegmentWriter(run / "other", 16).write(1, np.stack(frames[:-1]))
    shutil.move(written, path)
    shutil.rmtree(run / "other")


def _of_another_run(run: Path, foreign: Path) -> None:
    for path in (foreign / "a.mp4.blocks").glob("block-*.mp4"):
        shutil.copy(path, run / "a.mp4.blocks")
    shutil.copy(run / "a.mp4.blocks" / "block-000000.mp4", run / "a.mp4.blocks" / "block-000099.mp4")


MADE_AGAIN: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "a flipped bit": ("a", lambda run, _: flip(run / "a.mp4.blocks" / "block-000001.mp4")),
    "fewer frames": ("a", _fewer_frames),
    "of another run": ("a", _of_another_run),
    "missing": ("a", lambda run, _: shutil.rmtree(run / "a.mp4.blocks")),
    "a picture": ("pictures", lambda run, _: flip(run / "pictures" / "frame-00000003.png")),
    "no picture": ("pictures", lambda run, _: (run / "pictures" / "frame-00000010.png").unlink()),
}


@pytest.mark.parametrize("name", MADE_AGAIN)
def test_a_segment_that_is_not_what_was_written_is_made_again(
    broken: Callable[[str], Path], runs: dict[str, Path], name: str
) -> None:
    kind, harm = MADE_AGAIN[name]
    run = broken(kind)
    (run / "a.mp4").unlink(missing_ok=True)  # joined after the failure
    harm(run, runs["broken-foreign"])
    again = generate_here(run, "--resume", "kept")
    assert again.code == 0, again.stderr
    assert contents(run) == contents(runs[kind])


def _swap(run: Path, foreign: Path) -> None:
    first, second = (only(run / "kept", f"video-000-block-00000{block}-*") for block in (0, 1))
    names = first.name.replace("block-000000", "block-000001"), second.name.replace("block-000001", "block-000000")
    for path, name in zip((first, second), names, strict=True):
        path.rename(path.with_name(name))


def _foreign_snapshot(run: Path, foreign: Path) -> None:
    shutil.copy(max((foreign / "kept").glob("snapshot-*")), run / "kept")


def _foreign_snapshots_only(run: Path, foreign: Path) -> None:
    for path in (run / "kept").glob("snapshot-*"):
        path.unlink()
    _foreign_snapshot(run, foreign)


def _foreign_block(run: Path, foreign: Path) -> None:
    only(run / "kept", "video-000-block-000001-*").unlink()
    shutil.copy(only(foreign / "kept", "video-000-block-000001-*"), run / "kept")


def _neither_segment_nor_latents(run: Path, foreign: Path) -> None:
    (run / "a.mp4.blocks" / "block-000000.mp4").unlink()
    only(run / "kept", "video-000-block-000000-*").unlink()


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "swapped latents": (_swap, "is of another block or video"),
    "a foreign snapshot": (_foreign_snapshot, "holds snapshots of several runs"),
    "foreign snapshots only": (_foreign_snapshots_only, "is of another run"),
    "foreign latents": (_foreign_block, "is of another run"),
    "damaged latents": (lambda run, _: flip(only(run / "kept", "video-000-block-000000-*")), "is damaged"),
    "neither segment nor latents": (_neither_segment_nor_latents, "cannot be made again: .*block 0 are missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_foreign_and_damaged_material_is_refused_before_work_begins(
    broken: Callable[[str], Path], runs: dict[str, Path], name: str
) -> None:
    harm, why = REFUSED[name]
    run = broken("a")
    harm(run, runs["broken-foreign"])
    before = contents(run)
    refused = generate_here(run, "--resume", "kept")
    assert refused.code == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert re.search(why, refused.stderr), refused.stderr
    assert contents(run) == before


# The end of a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write_latents", "_join", "_tidy"])
def test_whatever_fails_at_the_end_can_be_gone_on_with(
    runs: dict[str, Path], wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "a.file")

    owner = "dualparal.cli.results." + ("" if step == "write_latents" else "Results.")
    with monkeypatch.context() as patch:
        patch.setattr(owner + step, full)
        run = tmp_path / "run"
        outputs = ["--out", "a.mp4", "--latents-out", "a.safetensors"]
        ended = generate_here(run, *VIDEO, *outputs, *KEPT, "--model", wan21)
        assert ended.code == 5 and "resume with: dualparal generate --resume kept" in ended.stderr
    # All blocks are finished: no engine is needed, but where segments have to be made again.
    monkeypatch.setattr("dualparal.cli.rank.make_engine", full)
    again = generate_here(run, "--resume", "kept")
    assert again.code == 0 and "all blocks were finished already" in again.stderr, again.stderr
    assert contents(run) == contents(runs["a"]) and not (run / "kept").exists()


def test_latents_of_somebody_else_are_not_replaced_at_the_end(
    wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dualparal.cli.results.write_latents", lambda *_, **__: exec("raise OSError(28, 'full')"))
        outputs = ["--out", "a.mp4", "--latents-out", "a.safetensors"]
        assert generate_here(tmp_path / "run", *VIDEO, *outputs, *KEPT, "--model", wan21).code == 5
    (tmp_path / "run" / "a.safetensors").write_bytes(b"mine")
    refused = generate_here(tmp_path / "run", "--resume", "kept")
    assert refused.code == 5 and "another file is there" in refused.stderr
    assert (tmp_path / "run" / "a.safetensors").read_bytes() == b"mine"
    assert generate_here(tmp_path / "run", "--resume", "kept", "--overwrite").code == 0


# Two runs to one place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["a-0.mp4", "a-1.mp4", "kept", "a.safetensors"], ids=["first", "second", "checkpoint", "latents"]
)
@pytest.mark.parametrize("how", ["alone", "supervised", "torchrun"])
def test_a_place_in_use_is_refused_in_every_form(
    wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, how: str
) -> None:
    if how == "torchrun":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
    asked = ["--prompt", "a dog", "--out", "a.mp4", "--latents-out", "a.safetensors", "--model", wan21]
    with Locks() as locks:
        locks.hold(tmp_path / place, "--out")
        stages = ["--stages", 2] if how == "supervised" else []
        refused = generate_here(tmp_path, *VIDEO, *asked, *KEPT, *stages)
    assert refused.code == 2 and f"in use by another run (process {os.getpid()} on" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_two_runs_to_one_video_do_not_mix(start: Callable[..., Run], wan21: Path) -> None:
    first = start(*VIDEO, "--num-frames", 161, "--out", "a.mp4", "--model", wan21, "--stages", 2)
    first.wait_for_segments(1)
    second = generate_here(first.folder, *VIDEO, "--out", "a.mp4", "--model", wan21, "--overwrite")
    assert second.code == 2 and f"in use by another run (process {first.process.pid} on" in second.stderr
    assert first.end() == 0 and first.playable_frames() == 161
    assert sorted(path.name for path in first.folder.iterdir()) == ["a.mp4", "stderr.txt"]


# The same command again -----------------------------------------------------------------------------------------------

AGAIN = ["--resume-or-start", "kept", "--checkpoint-every", 1]


def test_the_same_command_begins_goes_on_and_knows_that_it_is_done(
    runs: dict[str, Path], wan21: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, take, taken = tmp_path / "run", Results.take, []

    def dies(self: Results, chunk: Any, tell: Any) -> None:
        time.sleep(0.05)
        taken.append(chunk.block)
        if taken == [0, 1, 2]:
            raise Died(5, "the test's")
        take(self, chunk, tell)

    monkeypatch.setattr(Results, "take", dies)
    same = [*VIDEO, "--out", "a.mp4", "--latents-out", "a.safetensors", *AGAIN, "--model", wan21]
    codes = [generate_here(run, *same).code for _ in range(3)]
    assert codes == [5, 0, 0] and taken[:4] != [0, 1, 2, 0] and taken[-1] == 4
    made = {name: data for name, data in contents(run).items() if not name.startswith("kept/snapshot-")}
    assert made == contents(runs["a"])
    for more, name in ((["--seed", 3], "seed"), (["--prompt", "a dog"], "--prompt"), (["--fps", 8], "fps")):
        other = generate_here(run, *same, *more)
        assert other.code == 2 and "begun with other values of" in other.stderr and name in other.stderr
    assert generate_here(run, *same, "--threads", 2, "--overwrite").code == 0
    assert generate_here(run, *same, "--checkpoint", "kept").code == 2
    (run / "a.mp4").unlink()
    gone = generate_here(run, *same)
    assert gone.code == 2 and "a.mp4 is finished, and it is gone" in gone.stderr


def test_what_a_kill_before_the_first_snapshot_leaves_is_no_obstacle(wan21: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with whole_file(tmp_path / "kept" / f"noise-{'0' * 32}.safetensors") as file:
        file.write(b"noise")
    (tmp_path / "kept" / f"snapshot-0000000000-{'0' * 32}.safetensors.tmp").touch()
    (tmp_path / "a.mp4.blocks").mkdir()
    for folder in ("kept", "a.mp4"):
        (tmp_path / f"{folder}.lock").touch()
    assert generate_here(tmp_path, *VIDEO, "--out", "a.mp4", *AGAIN, "--model", wan21).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "kept"]


def test_a_restart_may_have_noise_of_its_own_and_another_machine(wan21: Path, tmp_path: Path) -> None:
    """And all of it may lie in the snapshots' folder, as on a volume that is all there is."""
    (tmp_path / "run").mkdir()
    save_file({"latents": torch.zeros(1, 16, 11, 4, 4)}, tmp_path / "run" / "noise.safetensors")
    same = [
        *VIDEO,
        "--latents-in",
        "noise.safetensors",
        "--latents-out",
        "kept/a.safetensors",
        *AGAIN,
        "--model",
        wan21,
    ]
    assert generate_here(tmp_path / "run", *same).code == 0
    again = generate_here(tmp_path / "run", *same, "--sequence-parallel", "2")
    assert again.code == 0 and "finished already" in again.stderr
    other = generate_here(tmp_path / "run", *same, "--steps", "3")
    assert other.code == 2 and "other values of --steps;" in other.stderr


def test_torchrun_restarts_the_ranks_and_the_run_goes_on(
    start: Callable[..., Run], runs: dict[str, Path], wan21: Path
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "3")
    outputs = ["--out", "a.mp4", "--latents-out", "a.safetensors"]
    run = start(*VIDEO, *outputs, *AGAIN, "--model", wan21, launcher=launcher)
    run.wait_for_segments(2)
    run.ranks[1].kill()
    assert run.end(200) == 0, run.stderr
    made = {name: data for name, data in contents(run.folder).items() if name in ("a.mp4", "a.safetensors")}
    assert made == contents(runs["a"])
