"""Files that appear whole: who may read them, and the words when their folder goes away under the run."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dualparal.checkpoint import given, snapshot
from dualparal.io.files import whole_file
from dualparal.io.output import remove_unfinished


@pytest.fixture
def open_to_all() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_snapshots_are_for_this_user_alone(tmp_path: Path, open_to_all: None) -> None:
    """They hold embeddings, from which a prompt may be guessed."""
    folder = tmp_path / "runs" / "kept"
    snapshot.prepare(folder)
    snapshot.write_block(folder, "run", 0, 0, torch.zeros(1, 1, 1, 1, 1))
    given.write_noise(folder, torch.zeros(1, 1, 1, 1, 1))
    snapshot.Snapshot(1, {"id": "run"}, [{0: torch.zeros(1, 1, 1)}], [{}]).write(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600] * 3


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_folder_that_was_removed_is_named(tmp_path: Path, when: str) -> None:
    folder = tmp_path / "a.mp4.blocks"
    folder.mkdir()
    if when == "before":
        folder.rmdir()
    words = "the folder was removed while the run wrote to it"
    with pytest.raises(FileNotFoundError, match=words) as error, whole_file(folder / "block-000000.mp4") as file:
        file.write(b"x")
        shutil.rmtree(folder)
    assert error.value.filename == str(folder)


def test_what_an_ended_run_had_begun_is_removed_and_nothing_else(tmp_path: Path) -> None:
    blocks, pictures = tmp_path / "a.mp4.blocks", tmp_path / "pictures"
    keep = [blocks / "block-000001.mp4", blocks / "notes.tmp", pictures / "frame-00000001.png", tmp_path / "b.mp4.tmp"]
    drop = [blocks / "block-000002.mp4.tmp", blocks / "playlist.m3u.tmp", pictures / "frame-00000002.png.tmp"]
    drop.append(tmp_path / "a.mp4.tmp")
    for path in keep + drop:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for out in (tmp_path / "a.mp4", pictures, tmp_path / "never.mp4"):
        remove_unfinished(out)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(keep)
