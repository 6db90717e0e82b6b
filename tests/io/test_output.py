"""Where frames and latents go: what is refused, what an end leaves behind, and what is written whole or not at all."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from dualparal.cli import doctor, progress
from dualparal.cli.progress import Display
from dualparal.io.latents import read_latents, write_latents
from dualparal.io.output import OutputError, check_file, check_out, missing_blocks, open_output, what_is_left
from dualparal.io.video import count_frames

FRAMES = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)


# Checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "new/folder/a.mp4", "pictures", "new/pictures", "empty"])
def test_good_outputs_pass_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    check_out(tmp_path / name, overwrite=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_is_replaced_only_on_request(tmp_path: Path) -> None:
    video, pictures, interrupted = tmp_path / "a.mp4", tmp_path / "pictures", tmp_path / "b.mp4"
    video.touch()
    pictures.mkdir()
    (pictures / "mine.txt").touch()
    (tmp_path / "b.mp4.blocks").mkdir()
    (tmp_path / "b.mp4.blocks" / "block-000000.mp4").touch()
    for path, why in ((video, "exists"), (pictures, "not empty"), (interrupted, r"b\.mp4\.blocks.*playlist\.m3u")):
        with pytest.raises(OutputError, match=f"{why}.*--overwrite"):
            check_out(path, overwrite=False)
        check_out(path, overwrite=True)
    open_output(pictures, 16).close()
    assert (pictures / "mine.txt").exists()  # only pictures of an earlier run go


@pytest.mark.parametrize("name", ["a.avi", "a.MP4", "v1.5", "file.txt/a.mp4", "folder.mp4", "x" * 252 + ".mp4", "loop"])
def test_bad_outputs_are_refused_also_with_overwrite(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError) as error:
        check_out(tmp_path / name / "a.mp4" if name == "loop" else tmp_path / name, overwrite=True)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_file_cannot_be_a_folder_nor_lie_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"--latents-out.*is a folder"):
        check_file(tmp_path, "--latents-out", overwrite=True)
    with pytest.raises(OutputError, match=r"--latents-out.*file is not a folder"):
        check_file(tmp_path / "file" / "deep" / "a", "--latents-out", overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        check_out(tmp_path / "file", overwrite=True)


# Frames -----------------------------------------------------------------------------------------------------------


def test_a_video_grows_by_blocks_and_is_joined_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.mp4"
    began = time.time() - 1
    assert what_is_left(path, began) == ""
    output = open_output(path, 16)
    output.write(0, FRAMES)
    assert "1 finished block;" in what_is_left(path, began) and "playlist.m3u" in what_is_left(path, began)
    output.write(1, FRAMES[:3])
    blocks = tmp_path / "new" / "a.mp4.blocks"
    assert [count_frames(blocks / f"block-{k:06d}.mp4") for k in range(2)] == [4, 3]
    assert "2 finished blocks" in what_is_left(path, began) and not path.exists()
    assert output.close() == count_frames(path) == 7
    assert count_frames(blocks / "block-000000.mp4") == 4  # until they are not wanted any more
    output.remove_blocks()
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
    assert what_is_left(path, began) == f"{path} has the finished frames"
    assert what_is_left(path, time.time() + 60) == ""  # an earlier run's


def test_no_block_no_video_and_old_blocks_make_way(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"an earlier video")
    old = open_output(path, 16)
    for block in range(3):
        old.write(block, FRAMES)
    output = open_output(path, 25)  # other settings would not join with the old blocks
    assert output.close() == 0
    output.remove_blocks()
    assert path.read_bytes() == b"an earlier video" and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_blocks_stay_when_they_cannot_be_joined(tmp_path: Path) -> None:
    output = open_output(tmp_path / "b.mp4", 16)
    output.write(0, FRAMES)
    (tmp_path / "b.mp4.tmp").symlink_to(tmp_path / "elsewhere")  # the join refuses to follow it
    with pytest.raises(OSError):
        output.close()
    assert count_frames(tmp_path / "b.mp4.blocks" / "block-000000.mp4") == 4


def test_pictures_are_numbered_on_and_exact(tmp_path: Path) -> None:
    output = open_output(tmp_path / "pictures", 16)
    output.write(0, FRAMES[:1])
    output.write(1, FRAMES[1:])
    assert output.close() == 4
    for number, frame in enumerate(FRAMES, 1):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / f"frame-{number:08d}.png")), frame)
    open_output(tmp_path / "pictures", 16)
    assert not list((tmp_path / "pictures").iterdir())


def test_a_resumed_video_is_the_one_written_in_one_go(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.mp4", tmp_path / "broken.mp4"
    output = open_output(whole, 16)
    for block in range(3):
        output.write(block, FRAMES[block : block + 2])
    output.close()
    receipts = {0: open_output(broken, 16).write(0, FRAMES[:2])}
    check_out(broken, overwrite=False, resume=True)
    again = open_output(broken, 16, receipts)
    for block in (1, 2):
        receipts[block] = again.write(block, FRAMES[block : block + 2])
    assert again.close() == 6 and broken.read_bytes() == whole.read_bytes()
    again.remove_blocks()
    lost = open_output(broken, 16, receipts)
    assert lost.missing == [0, 1, 2] and lost.close() == 0


@pytest.mark.parametrize("kind", ["mp4", "pictures"])
def test_what_is_not_what_was_written_is_missing_and_can_be_made_again(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.mp4" if kind == "mp4" else "pictures")
    folder = tmp_path / ("a.mp4.blocks" if kind == "mp4" else "pictures")
    output = open_output(path, 16)
    receipts = {block: output.write(block, FRAMES[block : block + 2]) for block in range(3)}
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    first, second, third = sorted(folder.glob("*[0-9].*"))[:: 1 if kind == "mp4" else 2]
    first.unlink()
    first.symlink_to(second)
    data = bytearray(third.read_bytes())
    data[len(data) // 2] ^= 4
    third.write_bytes(data)
    (folder / f"{first.stem[:-1]}9{first.suffix}").write_bytes(data)  # of another run
    again = open_output(path, 16, receipts)
    assert again.missing == [0, 2] == missing_blocks(path, receipts)
    for block in (0, 2):
        assert again.write(block, FRAMES[block : block + 2]) == receipts[block]
    assert not again.missing and again.close() == 6
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_resumed_pictures_go_on_where_they_were(tmp_path: Path) -> None:
    output = open_output(tmp_path / "pictures", 16)
    receipts = {0: output.write(0, FRAMES[:2])}
    output.write(1, FRAMES[2:3])
    again = open_output(tmp_path / "pictures", 16, receipts)
    again.write(1, FRAMES[:2])
    assert again.close() == 4
    names = [f"frame-{number:08d}.png" for number in (1, 2, 3, 4)]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == names


def test_a_folder_of_segments_without_any_is_no_obstacle(tmp_path: Path) -> None:
    blocks = tmp_path / "a.mp4.blocks"
    blocks.mkdir()
    (blocks / "block-000000.mp4.tmp").touch()
    check_out(tmp_path / "a.mp4", overwrite=False)
    (blocks / "letter.txt").touch()
    with pytest.raises(OutputError, match="holds finished blocks"):
        check_out(tmp_path / "a.mp4", overwrite=False)


# Latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latents_come_back_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "new" / "a.safetensors"
    latents = torch.randn(1, 3, 4, 5, 2).to(dtype).transpose(3, 4)  # not contiguous
    write_latents(path, latents)
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["latents"] and file.get_slice("latents").get_dtype() == "F32"
    assert torch.equal(read_latents(path), latents.float())
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_latents_replace_a_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_latents(path, torch.zeros(1, 1, 1, 1, 1))
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_latents(path, torch.ones(1, 1, 1, 1, 1))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04K\x01.", b"\xff" * 64])
def test_what_is_no_latents_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"--latents-in {path} is not a safetensors file"):
        read_latents(path)
    path.unlink()
    with pytest.raises(ValueError, match="no such file"):
        read_latents(path)
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"\['a', 'b'\]; one tensor 'latents' is needed"):
        read_latents(path)
    save_file({"latents": torch.zeros(1, dtype=torch.complex64)}, path)
    with pytest.raises(ValueError, match=r"holds C64; latents are floating-point"):
        read_latents(path)


# Progress and doctor ----------------------------------------------------------------------------------------------

STATE = {"blocks": 1250, "total_blocks": 1250, "frames": 39997, "seconds": 900.0, "first": 12.34, "bubble": 0.051}


@pytest.mark.parametrize("total", [1250, None])
def test_progress_is_one_line_per_block_in_a_file(capfd: pytest.CaptureFixture[str], total: int | None) -> None:
    with Display(None) as display:
        display.update({**STATE, "total_blocks": total})
    text = capfd.readouterr().err
    assert text == f"block 1250/{total or '-'}, 39997 frames, 44.44 frames/s, first 12.3 s, bubble 5 %\n"


def test_progress_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, width=80, record=True, file=io.StringIO())
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with Display(4001) as display:
        display.units(6200, 6300)
        display.update({**STATE, "blocks": 125, "total_blocks": 126, "frames": 3997})
    text = console.export_text().rstrip()
    assert re.search(r"block 125/126, 3997 frames, 4\.44 frames/s, first 12\.3 s, bubble 5 % +[-\d]+:[-\d]+$", text)
    assert "…" not in text  # nothing is cut


def test_the_bar_moves_with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with Display(81) as display:
        assert display._bar is not None
        (task,) = display._bar.tasks
        display.units(30, 300)
        assert task.percentage == 10
        display.update({**STATE, "blocks": 1, "total_blocks": 3, "frames": 29})
        assert task.percentage == 10 and "block 1/3" in task.description
        display.units(299, 300)
        display.update({**STATE, "blocks": 3, "total_blocks": 3, "frames": 81})
        assert task.percentage == 100


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "dualparal._C", None)
    monkeypatch.delattr("dualparal._C", raising=False)
    monkeypatch.setitem(sys.modules, "av", None)
    text = doctor.report()
    assert "extension      missing" in text and "reinstall" in text
    assert "gpus           none" in text and "--device cpu" in text
    assert "av is missing" in text
