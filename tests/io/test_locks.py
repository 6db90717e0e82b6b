"""Locks on outputs: one run at a time, and no lock outlives its process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dualparal.io.locks import Locks
from dualparal.io.output import OutputError


def test_the_second_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with Locks() as first, Locks() as second:
        first.hold(tmp_path / "there" / "a.mp4", "--out")
        first.hold(tmp_path / "there" / "a.mp4", "--out")  # has it already
        who = rf"--out .*a\.mp4 is in use by another run \(process {os.getpid()} on .*, begun 20"
        with pytest.raises(OutputError, match=who):
            second.hold(tmp_path / "link" / "a.mp4", "--out")
        second.hold(tmp_path / "there" / "b.mp4", "--out")
        first.release()
        second.hold(tmp_path / "link" / "a.mp4", "--out")
    assert not list((tmp_path / "there").iterdir())


def test_a_killed_run_locks_nobody_out(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        Locks().hold(tmp_path / "kept", "--checkpoint")
        os.write(write, b"x")
        signal.pause()
    os.read(read, 1)
    with Locks() as locks:
        try:
            with pytest.raises(OutputError, match=f"process {child} on"):
                locks.hold(tmp_path / "kept", "--checkpoint")
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert (tmp_path / "kept.lock").exists()
        locks.hold(tmp_path / "kept", "--checkpoint")
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_its_holder_removes_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking it: two would hold the same name otherwise."""
    first, opened = Locks(), os.open
    first.hold(tmp_path / "a.mp4", "--out")

    def opens(path: Path, *args: int) -> int:
        found = opened(path, *args)
        first.release()
        return found

    monkeypatch.setattr(os, "open", opens)
    with Locks() as second:
        second.hold(tmp_path / "a.mp4", "--out")
        monkeypatch.undo()
        with pytest.raises(OutputError, match="in use"):
            first.hold(tmp_path / "a.mp4", "--out")


def test_folders_that_were_made_for_a_lock_go_with_it(tmp_path: Path) -> None:
    with Locks() as locks:
        locks.hold(tmp_path / "new" / "deep" / "a.mp4", "--out")
        locks.hold(tmp_path / "other" / "a.mp4", "--out")
        (tmp_path / "other" / "a.mp4").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_link_or_a_pipe_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.mp4.lock").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "b.mp4.lock")
    with Locks() as locks:
        for name in ("a.mp4", "b.mp4"):
            with pytest.raises(OSError):
                locks.hold(tmp_path / name, "--out")
    assert not (tmp_path / "precious").exists()
