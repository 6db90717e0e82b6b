"""Writers: what bears its final name is whole, whatever happened, and a join loses nothing."""

import contextlib
import errno
import os
import re
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dualparal.io.files import whole_file
from dualparal.io.pictures import PngWriter
from dualparal.io.video import PLAYLIST, SegmentWriter, VideoInfo, count_frames, join, probe
from frames import Frames, make_frames
from places import TESTS

BT709 = 1
ACCURATE = 4 | 0x40000 | 0x2000  # swscale's fast way darkens by one level


def decode(path: Path) -> tuple[Frames, list[Fraction]]:
    """All frames of a file and their times in seconds; raises if any part of it is damaged."""
    pictures, times = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            picture = frame.reformat(format="rgb24", src_colorspace=BT709, interpolation=ACCURATE)
            pictures.append(picture.to_ndarray())
            times.append(frame.pts * frame.time_base)
    return np.stack(pictures), times


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


LENGTHS = [29, 1, 32, 7]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SegmentWriter:
    writer = SegmentWriter(tmp_path_factory.mktemp("segments"), 16)
    for block, length in enumerate(LENGTHS):
        writer.write(block, make_frames(length, seed=block))
    return writer


# Segments


def test_a_segment_is_the_block(tmp_path: Path) -> None:
    frames = make_frames(29)
    path = SegmentWriter(tmp_path / "new" / "segments", 16).write(12, frames)
    assert path == tmp_path / "new" / "segments" / "block-000012.mp4"
    assert names(path.parent) == ["block-000012.mp4", PLAYLIST]
    assert probe(path) == VideoInfo(frames=29, width=64, height=48, fps=Fraction(16))
    assert probe(path).seconds == Fraction(29, 16)
    assert count_frames(path) == 29
    pictures, times = decode(path)
    assert times == [Fraction(index, 16) for index in range(29)]
    # 4:2:0 and a lossy codec: near, also in the mean of each colour, which a wrong matrix would shift.
    difference = pictures.astype(int) - frames
    assert np.abs(difference).mean() < 6
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 1
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert packets[0].is_keyframe
        assert all(packet.pts == packet.dts for packet in packets)
        assert container.streams.video[0].codec_context.colorspace == BT709


@pytest.mark.parametrize("fps", [16, 24, 30000 / 1001, Fraction(24000, 1001), 0.5], ids=str)
@pytest.mark.parametrize("length", [1, 2, 300])
def test_lengths_and_frame_rates(length: int, fps: float | Fraction, tmp_path: Path) -> None:
    path = SegmentWriter(tmp_path, fps).write(0, make_frames(length, height=16, width=16))
    info = probe(path)
    assert info.frames == length
    assert float(info.fps) == pytest.approx(float(fps), rel=1e-9)
    with av.open(str(path)) as container:
        assert container.duration / 1e6 == pytest.approx(length / fps, abs=1e-5)
    assert decode(path)[1] == [index / info.fps for index in range(length)]


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = make_frames(9)
    first = SegmentWriter(tmp_path / "a", 16).write(0, frames).read_bytes()
    strided = np.asfortranarray(frames)
    # Often: what x264 did otherwise, it did once in hundreds of times.
    writer = SegmentWriter(tmp_path / "b", 16)
    assert all(writer.write(block, strided).read_bytes() == first for block in range(100))


def test_quality_is_a_choice(tmp_path: Path) -> None:
    frames = make_frames(8)
    sizes = [SegmentWriter(tmp_path / str(crf), 16, crf=crf).write(0, frames).stat().st_size for crf in (0, 18, 40)]
    assert sizes == sorted(sizes, reverse=True)
    for crf in (-1, 52):
        with pytest.raises(ValueError, match=f"crf={crf}.*0.*51"):
            SegmentWriter(tmp_path, 16, crf=crf)


@pytest.mark.parametrize("fps", [0, -16, float("nan"), float("inf"), 100_000])
def test_refuses_impossible_frame_rates(fps: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"fps={fps}"):
        SegmentWriter(tmp_path, fps)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 15, 16, 3), np.uint8), "15x16.*even.*crop or pad"),
        (np.zeros((2, 16, 15, 3), np.uint8), "16x15.*even"),
        (np.zeros((2, 16, 16, 3), np.float32), "float32.*uint8.*to_uint8"),
        (np.zeros((2, 3, 16, 16), np.uint8), r"\[2, 3, 16, 16\].*\[frames, height, width, 3\]"),
        (np.zeros((16, 16, 3), np.uint8), "uint8"),
        (np.zeros((0, 16, 16, 3), np.uint8), "at least one frame"),
    ],
)
def test_refuses_wrong_frames(frames: Frames, message: str, tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 16)
    with pytest.raises(ValueError, match=message):
        writer.write(0, frames)
    assert names(tmp_path) == []


def test_refuses_a_negative_block_and_another_size(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 16)
    with pytest.raises(ValueError, match="block=-1"):
        writer.write(-1, make_frames(1))
    writer.write(0, make_frames(1))
    with pytest.raises(ValueError, match=r"block 1 has frames of 48x32.*48x64"):
        writer.write(1, make_frames(1, width=32))
    assert writer.segments == [tmp_path / "block-000000.mp4"]


def test_a_missing_encoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualparal.io.video._ENCODER", "libx999")
    with pytest.raises(ValueError, match=r"'libx999' is not in this build.*PNG"):
        SegmentWriter(tmp_path, 16)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="pip install av"):
        SegmentWriter(tmp_path, 16)


# The playlist


def test_the_playlist_says_what_is_there(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 16)
    listed = []
    for block, length in ((0, 29), (2, 8), (1, 32)):
        writer.write(block, make_frames(length, height=16, width=16))
        listed.append([line for line in (tmp_path / PLAYLIST).read_text().splitlines() if line[0] != "#"])
    zero, one, two = (f"block-{block:06d}.mp4" for block in range(3))
    assert listed == [[zero], [zero, two], [zero, one, two]]
    assert (tmp_path / PLAYLIST).read_text() == (
        f"#EXTM3U\n#EXTINF:1.8125,block 0\n{zero}\n#EXTINF:2,block 1\n{one}\n#EXTINF:0.5,block 2\n{two}\n"
    )
    assert [path.name for path in writer.segments] == [zero, one, two]


# Going on in a directory


def test_resume_adopts_what_is_there_and_clears_leftovers(tmp_path: Path) -> None:
    first = SegmentWriter(tmp_path, 16)
    for block in range(2):
        first.write(block, make_frames(4, seed=block))
    (tmp_path / "block-000002.mp4.tmp").write_bytes(b"half")
    (tmp_path / "playlist.m3u.tmp").write_bytes(b"half")
    (tmp_path / PLAYLIST).unlink()
    (tmp_path / "notes.tmp").write_bytes(b"not ours")

    with pytest.raises(ValueError, match=r"2 segments of an earlier run.*resume=True"):
        SegmentWriter(tmp_path, 16)
    with pytest.raises(ValueError, match="16 frames/s, this run 24"):
        SegmentWriter(tmp_path, 24, resume=True)
    again = SegmentWriter(tmp_path, 16, resume=True)
    assert names(tmp_path) == ["block-000000.mp4", "block-000001.mp4", "notes.tmp", PLAYLIST]
    with pytest.raises(ValueError, match="blocks before it 48x64"):
        again.write(2, make_frames(4, width=32))
    again.write(1, make_frames(5, seed=1))  # made again, with another length
    again.write(2, make_frames(6, seed=2))
    assert [count_frames(path) for path in again.segments] == [4, 5, 6]
    assert join(again.segments, tmp_path / "video.mp4") == 15


def test_resume_names_a_damaged_segment(tmp_path: Path) -> None:
    path = SegmentWriter(tmp_path, 16).write(0, make_frames(4))
    content = path.read_bytes()
    for length in [*range(0, len(content), 101), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is no complete mp4"):
            SegmentWriter(tmp_path, 16, resume=True)
    path.write_bytes(content.replace(b"avc1", b"xxxx"))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} names no codec"):
        SegmentWriter(tmp_path, 16, resume=True)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_values_or_a_clear_error(
    data: st.DataObject, written: SegmentWriter, tmp_path: Path
) -> None:
    content = bytearray(written.segments[1].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert probe(path).width >= 0
    with contextlib.suppress(ValueError):
        join([written.segments[0], path], tmp_path / "video.mp4")


# The join


def test_join_keeps_every_pixel_and_spaces_frames_evenly(written: SegmentWriter, tmp_path: Path) -> None:
    out = tmp_path / "video.mp4"
    assert join(written.segments, out) == sum(LENGTHS)
    pictures, times = decode(out)
    assert np.array_equal(pictures, np.concatenate([decode(path)[0] for path in written.segments]))
    assert times == [Fraction(index, 16) for index in range(sum(LENGTHS))]
    assert probe(out) == VideoInfo(frames=sum(LENGTHS), width=64, height=48, fps=Fraction(16))
    content = out.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert names(tmp_path) == ["video.mp4"]
    assert join(iter(written.segments[:2]), out) == 30  # replaced
    assert count_frames(out) == 30


def test_no_rounding_adds_up_at_awkward_frame_rates(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 30000 / 1001)
    for block in range(40):
        writer.write(block, make_frames(3, seed=block, height=16, width=16))
    join(writer.segments, tmp_path / "video.mp4")
    _, times = decode(tmp_path / "video.mp4")
    assert times == [Fraction(index * 1001, 30000) for index in range(120)]


def test_join_takes_odd_names(written: SegmentWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path("file:a b%03d|ü.mp4")
    odd.write_bytes(written.segments[0].read_bytes())
    assert join([odd, odd], "pipe:1.mp4") == 58
    assert count_frames("pipe:1.mp4") == 58


def test_join_refuses_what_does_not_fit(written: SegmentWriter, tmp_path: Path) -> None:
    def segment(name: str, fps: int = 16, **size: int) -> Path:
        return SegmentWriter(tmp_path / name, fps).write(0, make_frames(3, **size))

    first, out = written.segments[0], tmp_path / "video.mp4"
    out.write_bytes(b"an earlier video")
    crf = SegmentWriter(tmp_path / "crf", 16, crf=0).write(0, make_frames(3))
    for odd, message in (
        (segment("fps", fps=24), r"differ in frames/s \(24 and 16\)"),
        (segment("size", width=32), "differ in size"),
        (crf, "differ in encoder settings"),
        (tmp_path / "video.mp4.txt", "No such file"),
        (Path(__file__), "no complete mp4"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            join([first, odd], out)
        assert out.read_bytes() == b"an earlier video"
    with pytest.raises(ValueError, match="no segments"):
        join([], out)
    with pytest.raises(ValueError, match="one of the segments"):
        join([first], first)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_playlist_that_calls_itself_mp4_is_not_followed(written: SegmentWriter, tmp_path: Path) -> None:
    trap = tmp_path / "trap.mp4"
    trap.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{written.segments[0]}\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="no complete mp4"):
        probe(trap)


# Faults


def test_order_of_sync_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut cannot be tried here; the order that survives one can be checked."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append(f"rename {Path(source).name} {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    segment = SegmentWriter(tmp_path, 16).write(0, make_frames(2))
    join([segment], tmp_path / "video.mp4")
    PngWriter(tmp_path).write(0, make_frames(2))

    def whole(name: str) -> list[str]:
        return [f"fsync {name}.tmp", f"rename {name}.tmp {name}"]

    directory = [f"fsync {tmp_path.name}"]
    assert calls == [
        *whole("block-000000.mp4"),
        *directory,
        *whole(PLAYLIST),
        *directory,
        *whole("video.mp4"),
        *directory,
        *whole("frame-00000001.png"),
        *whole("frame-00000002.png"),
        *directory,
    ]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_way_is_not_followed(dangling: bool, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    if not dangling:
        target.write_bytes(b"keep me")
    directory = tmp_path / "segments"
    directory.mkdir()
    for name in ("block-000000.mp4.tmp", "frame-00000001.png.tmp", "video.mp4.tmp"):
        (directory / name).symlink_to(target)
    writer = SegmentWriter(directory, 16)
    other = SegmentWriter(tmp_path / "other", 16).write(0, make_frames(1))
    for attempt in (
        lambda: writer.write(0, make_frames(1)),
        lambda: PngWriter(directory).write(0, make_frames(1)),
        lambda: join([other], directory / "video.mp4"),
    ):
        with pytest.raises(FileExistsError, match=r"link.*not followed.*\.tmp"):
            attempt()
    assert target.exists() is not dangling
    assert dangling or target.read_bytes() == b"keep me"
    assert names(directory) == ["block-000000.mp4.tmp", "frame-00000001.png.tmp", "video.mp4.tmp"]


def test_a_second_writer_cannot_commit_the_files_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process thought dead wakes up in the middle of its write, while its successor writes the same block."""
    writer = SegmentWriter(tmp_path, 16)
    unfinished = tmp_path / "block-000000.mp4.tmp"
    fsync = os.fsync

    def successor_arrives(descriptor: int) -> None:
        fsync(descriptor)
        unfinished.unlink()
        unfinished.write_bytes(b"the successor's first bytes")

    monkeypatch.setattr(os, "fsync", successor_arrives)
    with pytest.raises(FileExistsError, match="another process replaced"):
        writer.write(0, make_frames(2))
    assert names(tmp_path) == ["block-000000.mp4.tmp"]
    assert unfinished.read_bytes() == b"the successor's first bytes"


CHILD = """
import itertools, sys
from dualparal.io.video import SegmentWriter
from frames import make_frames
frames = make_frames(60, height=96, width=128)
writer = SegmentWriter(sys.argv[1], 16, resume=True)
sys.stdout.write("ready\\n")
sys.stdout.flush()
for block in itertools.count(len(writer.segments)):
    writer.write(block, frames[: 20 + block % 3])
"""


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    here = str(TESTS / "helpers")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=here)


def test_kill_at_any_moment_leaves_whole_segments(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    cut_short, segments = 0, list[Path]()
    for kill in range(40):
        if kill >= 6 and cut_short and len(segments) > 3:
            break
        child = spawn(CHILD, tmp_path)
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0.02, 0.4))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
        cut_short += bool(list(tmp_path.glob("*.tmp")))
        segments = sorted(tmp_path.glob("*.mp4"))
        assert [path.name for path in segments] == [f"block-{block:06d}.mp4" for block in range(len(segments))]
        for block, path in enumerate(segments):
            assert len(decode(path)[0]) == 20 + block % 3
        listed = [line for line in (tmp_path / PLAYLIST).read_text().splitlines() if line[0] != "#"] if segments else []
        # The kill may fall between the last segment and its line.
        assert listed in ([path.name for path in segments], [path.name for path in segments[:-1]])
    assert cut_short > 0, "no kill fell into a write: the test tried nothing"
    assert len(segments) > 3
    writer = SegmentWriter(tmp_path, 16, resume=True)
    assert not list(tmp_path.glob("*.tmp"))
    join(writer.segments, tmp_path / "video.mp4")
    pictures, times = decode(tmp_path / "video.mp4")
    assert np.array_equal(pictures, np.concatenate([decode(path)[0] for path in segments]))
    assert times == [Fraction(index, 16) for index in range(len(pictures))]


LIMITED = """
import resource, sys
from pathlib import Path
from dualparal.io.pictures import PngWriter
from dualparal.io.video import SegmentWriter, join
from frames import make_frames
directory, limit, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
small, large = make_frames(4), make_frames(80, seed=1)
writer = SegmentWriter(directory, 16)
writer.write(0, small)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if what == "segment":
        writer.write(1, large)
    elif what == "join":
        join(writer.segments * 40, directory / "video.mp4")
    else:
        PngWriter(directory).write(0, make_frames(1, height=480, width=640))
except OSError as error:
    sys.stdout.write(f"{error.errno} {error.filename}")
else:
    sys.stdout.write("written")
"""


@pytest.mark.parametrize(
    ("what", "name"), [("segment", "block-000001.mp4"), ("join", "video.mp4"), ("png", "frame-00000001.png")]
)
def test_a_full_disk_keeps_the_finished_and_nothing_half(what: str, name: str, tmp_path: Path) -> None:
    first = SegmentWriter(tmp_path / "measure", 16).write(0, make_frames(4)).stat().st_size
    # Limits that fall in the middle of a write, and right before the end: a short last write must not pass.
    for index, limit in enumerate((first + 1, first + 2000, 2 * first)):
        directory = tmp_path / str(index)
        with spawn(LIMITED, directory, limit, what) as child:
            output = child.communicate(timeout=60)[0]
        assert output == f"{errno.EFBIG} {directory / name}"
        assert child.returncode == 0
        assert names(directory) == ["block-000000.mp4", PLAYLIST]
        assert np.array_equal(
            decode(directory / "block-000000.mp4")[0], decode(tmp_path / "measure/block-000000.mp4")[0]
        )


def test_every_size_limit_up_to_thewhole_file(tmp_path: Path) -> None:
    """Under each limit a segment is either refused, leaving nothing, or whole."""
    if (soft := resource.getrlimit(resource.RLIMIT_FSIZE))[0] != resource.RLIM_INFINITY:
        pytest.skip("a file size limit is set already")
    frames = make_frames(3, height=16, width=16)
    size = SegmentWriter(tmp_path / "measure", 16).write(0, frames).stat().st_size
    writer = SegmentWriter(tmp_path / "limited", 16)
    for limit in [*range(500, size, 97), *range(size - 3, size)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft[1]))
        try:
            with pytest.raises(OSError, match=r"too large.*block-000000\.mp4'"):
                writer.write(0, frames)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert names(tmp_path / "limited") == []
    assert count_frames(writer.write(0, frames)) == 3


def test_a_write_error_that_was_swallowed_still_counts(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "any.mp4"

    def write_and_carry_on() -> None:
        with whole_file(path) as file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
            try:
                with contextlib.suppress(OSError):
                    file.write(bytes(20))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.raises(OSError, match=r"too large.*any\.mp4"):
        write_and_carry_on()
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SegmentWriter(tmp_path, 16)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "ascontiguousarray", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.write(0, make_frames(2))
    assert names(tmp_path) == []


def test_no_file_stays_open(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 16)
    writer.write(0, make_frames(2))
    before = len(os.listdir("/proc/self/fd"))
    for block in range(1, 6):
        writer.write(block, make_frames(2))
        join(writer.segments, tmp_path / "video.mp4")
    assert len(os.listdir("/proc/self/fd")) == before


# Pictures


def test_pictures_are_numbered_over_the_video(tmp_path: Path) -> None:
    writer = PngWriter(tmp_path / "new")
    blocks = [make_frames(3, seed=0, height=15, width=17), make_frames(2, seed=1, height=15, width=17)]
    paths = [path for block, frames in enumerate(blocks) for path in writer.write(block, frames)]
    assert [path.name for path in paths] == [f"frame-{number:08d}.png" for number in range(1, 6)]
    assert names(tmp_path / "new") == [path.name for path in paths]
    for path, frame in zip(paths, np.concatenate(blocks)):
        assert np.array_equal(np.asarray(Image.open(path)), frame)


def test_pictures_refuse_disorder_and_wrong_frames(tmp_path: Path) -> None:
    writer = PngWriter(tmp_path)
    writer.write(1, make_frames(1))
    with pytest.raises(ValueError, match="block=1 after block 1"):
        writer.write(1, make_frames(1))
    with pytest.raises(ValueError, match="float64"):
        writer.write(2, np.zeros((1, 4, 4, 3)))  # type: ignore[arg-type]
    assert names(tmp_path) == ["frame-00000001.png"]


def test_pictures_resume_at_a_number(tmp_path: Path) -> None:
    PngWriter(tmp_path).write(0, make_frames(4))
    (tmp_path / "frame-00000005.png.tmp").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"4 frames of an earlier run.*resume_at"):
        PngWriter(tmp_path)
    with pytest.raises(ValueError, match="frame 5 is not"):
        PngWriter(tmp_path, resume_at=7)
    with pytest.raises(ValueError, match="counted from 1"):
        PngWriter(tmp_path, resume_at=0)
    frames = make_frames(3, seed=5)
    paths = PngWriter(tmp_path, resume_at=3).write(0, frames)
    assert names(tmp_path) == [f"frame-{number:08d}.png" for number in range(1, 6)]
    assert np.array_equal(np.asarray(Image.open(paths[0])), frames[0])
