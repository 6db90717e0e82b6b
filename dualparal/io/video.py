"""Writers of finished frames: one closed video file per block, and a lossless join of them.

Every file is written aside, synced and renamed, so what bears its final name is whole: after a kill, a full
disk or a power cut, all finished blocks play. Latents, and which block comes when, are left to others.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from dualparal.io.files import WholeFile, make_folder, numbered, remove_leftovers, whole_file
from dualparal.io.pictures import Frames, check_frames

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.video.stream import VideoStream

PLAYLIST = "playlist.m3u"

_ENCODER = "libx264"
# The same for every segment and every machine, or segments would not join: x264's output depends on the
# number of threads. No B-frames: packets leave in display order, so a join needs frame counts only. No macroblock
# tree: with it, 1 in 200 encodings of the same small frames came out otherwise (not with asm=0, so it is x264's own).
_ENCODER_OPTIONS = {"preset": "faster", "bf": "0", "threads": "4", "x264-params": "mbtree=0"}
_BT709 = 1  # the same number for matrix, primaries and transfer in the H.264 standard
_LIMITED_RANGE = 1
_SCALER = 4 | 0x40000 | 0x80000  # swscale's bicubic, accurate rounding, the same on every processor

_SEGMENT_NAME = re.compile(r"block-(\d{6,})\.mp4")
_OUR_NAMES = re.compile(rf"{_SEGMENT_NAME.pattern}|{re.escape(PLAYLIST)}")


@dataclass(frozen=True)
class VideoInfo:
    """The facts in the header of a video file: number of frames, pixels, and frames per second."""

    frames: int
    width: int
    height: int
    fps: Fraction

    @property
    def seconds(self) -> Fraction:
        """The length of the video."""
        return self.frames / self.fps


class SegmentWriter:
    """Writes each finished block as `block-000012.mp4`, and `playlist.m3u` that plays what is there so far.

    Segments are H.264, 8-bit 4:2:0, BT.709, constant quality `crf` (0 to 51, smaller is better). The same
    frames give the same bytes. Nothing stays open between two writes.
    """

    def __init__(
        self, directory: str | Path, fps: int | float | Fraction, *, crf: int = 18, resume: bool = False
    ) -> None:
        """Makes `directory` if needed and clears what a killed run left half-written.

        Args:
            fps: frames per second, 1/1001 to 1000.
            crf: the encoder's constant rate factor, 0 (no loss) to 51 (worst).
            resume: keep the segments found there; a block written again replaces its old file.

        Raises:
            ValueError: PyAV or its H.264 encoder is missing, fps or crf is out of range, the directory holds segments
                and ``resume`` is off, or they have another frame rate.
        """
        _require_encoder()
        self._fps = _frame_rate(fps)
        if not 0 <= crf <= 51:
            raise ValueError(f"crf={crf}: H.264 takes 0 (no loss) to 51 (worst); 18 is hard to tell from 0")
        self._crf = crf
        self._directory = Path(directory)
        make_folder(self._directory)
        remove_leftovers(self._directory, _OUR_NAMES)
        self._frames: dict[int, int] = {}  # block -> number of frames: one small entry for a whole file
        self._size: tuple[int, int] | None = None
        found = numbered(self._directory, _SEGMENT_NAME)
        if found and not resume:
            raise ValueError(
                f"{self._directory} holds {len(found)} segments of an earlier run: pass resume=True to go on "
                "with them, or choose an empty directory"
            )
        for block, path in found.items():
            self._adopt(block, path)
        if found:
            self._write_playlist()

    @property
    def blocks(self) -> set[int]:
        """The blocks on disk."""
        return set(self._frames)

    @property
    def segments(self) -> list[Path]:
        """The segments on disk in the order of their blocks, as `join` takes them."""
        return self.segments_before(None)

    def segments_before(self, end: int | None) -> list[Path]:
        """The segments of the blocks before `end`; None: all."""
        return [self._path(block) for block in sorted(self._frames) if end is None or block < end]

    def write(self, block: int, frames: Frames) -> Path:
        """Writes the frames of one block, uint8 [F, H, W, 3], any F; returns the path once it is safe on disk.

        Raises:
            ValueError: a wrong array, or a size the format cannot hold.
            OSError: a full disk and the like; the unfinished file is removed, the earlier segments are untouched.
        """
        if block < 0:
            raise ValueError(f"block={block}: blocks are counted from 0")
        check_frames(frames)
        height, width = frames.shape[1:3]
        if height % 2 or width % 2:
            raise ValueError(
                f"frames of {height}x{width}: H.264 4:2:0 has one colour for 2x2 pixels, so height and width "
                "must be even; crop or pad one pixel, or write PNG files"
            )
        self._require_size((height, width), f"block {block}")
        path = self._path(block)
        with whole_file(path) as file:
            self._encode(file, frames)
        self._size = height, width
        self._frames[block] = len(frames)
        self._write_playlist()
        return path

    def _path(self, block: int) -> Path:
        return self._directory / segment_name(block)

    def _adopt(self, block: int, path: Path) -> None:
        info = probe(path)
        if info.fps != self._fps:
            raise ValueError(
                f"{path} has {_decimal(info.fps)} frames/s, this run {_decimal(self._fps)}: they would not "
                "join; use the same fps or another directory"
            )
        self._require_size((info.height, info.width), str(path))
        self._size = info.height, info.width
        self._frames[block] = info.frames

    def _require_size(self, size: tuple[int, int], what: str) -> None:
        if self._size is not None and size != self._size:
            raise ValueError(
                f"{what} has frames of {size[0]}x{size[1]}, the blocks before it {self._size[0]}x"
                f"{self._size[1]}: a video has one size; use another directory for another size"
            )

    def _encode(self, file: WholeFile, frames: Frames) -> None:
        import av

        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream(_ENCODER, rate=self._fps, options={**_ENCODER_OPTIONS, "crf": str(self._crf)})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            # Say which matrix was used: players else guess BT.709 or BT.601 by size, and colours shift.
            codec = stream.codec_context
            codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
            codec.color_range = _LIMITED_RANGE
            for index, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
                    format="yuv420p",
                    dst_colorspace=_BT709,
                    dst_color_range=_LIMITED_RANGE,
                    interpolation=_SCALER,
                )
                frame.pts, frame.duration, frame.time_base = index, 1, 1 / self._fps
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))

    def _write_playlist(self) -> None:
        lines = ["#EXTM3U"]
        for block in sorted(self._frames):
            seconds = _decimal(self._frames[block] / self._fps)
            lines += [f"#EXTINF:{seconds},block {block}", self._path(block).name]
        with whole_file(self._directory / PLAYLIST) as file:
            file.write("\n".join([*lines, ""]).encode())


def segment_name(block: int) -> str:
    """The name of a block's segment."""
    return f"block-{block:06d}.mp4"


def segments_in(directory: Path) -> dict[int, Path]:
    """The files (or links) with names of segments in a folder, by block. Raises OSError."""
    return numbered(directory, _SEGMENT_NAME)


def join(segments: Iterable[Path], out: str | Path) -> int:
    """Joins segments of one `SegmentWriter`, in the order given, without encoding again.

    Frames keep their pixels bit for bit and get uniform times from frame counts, so no rounding adds up. The
    index comes first in the file (it plays while it downloads). Replaces `out`; returns its number of frames.

    Raises:
        ValueError: no segments, a file that is no segment, or segments of different runs (size, frame rate, encoder
            settings).
        OSError: `out` cannot be written, and is as it was.
    """
    import av

    paths = [Path(segment) for segment in segments]
    if not paths:
        raise ValueError("join was given no segments: a video needs at least one block")
    out = Path(out)
    if any(out.resolve() == path.resolve() for path in paths):
        raise ValueError(f"{out} is one of the segments: join into another file")
    frames = 0
    index_first = {"movflags": "faststart"}
    with whole_file(out) as file, av.open(file, "w", format="mp4", options=index_first) as target:
        first: _Stream | None = None
        for path in paths:
            with _reading(path) as source:
                stream = _Stream.of(source, path)
                if first is None:
                    first = stream
                    track = target.add_stream_from_template(source.streams.video[0])
                stream.require_joins(first)
                frames += _copy_packets(source, target, track, frames, stream.fps, path)
    return frames


def probe(path: str | Path) -> VideoInfo:
    """Frame count, size and frame rate of an mp4 file, from its header.

    Raises ValueError if it is not a complete one.
    """
    with _reading(Path(path)) as source:
        shared = _Stream.of(source, Path(path))
        stream = source.streams.video[0]
        frames = stream.frames or sum(packet.size > 0 for packet in source.demux(stream))
        return VideoInfo(frames=frames, width=shared.size[1], height=shared.size[0], fps=shared.fps)


def count_frames(path: str | Path) -> int:
    """Number of frames of an mp4 file, from its header. Raises ValueError if it is not a complete one."""
    return probe(path).frames


@dataclass(frozen=True)
class _Stream:
    """The properties that two segments must share to be joined; ``size`` is height and width."""

    path: Path
    fps: Fraction
    size: tuple[int, int]
    parameter_sets: bytes  # H.264 SPS and PPS: the joined file keeps those of the first segment only

    @classmethod
    def of(cls, source: InputContainer, path: Path) -> _Stream:
        stream = source.streams.video[0]
        codec = stream.codec_context
        if codec is None or not stream.average_rate:
            raise ValueError(f"{path} names no codec or no frame rate: is it damaged? Write that block again")
        return cls(path, stream.average_rate, (codec.height, codec.width), codec.extradata or b"")

    def require_joins(self, first: _Stream) -> None:
        for what, ours, theirs in (
            ("frames/s", _decimal(self.fps), _decimal(first.fps)),
            ("size", self.size, first.size),
            ("encoder settings", self.parameter_sets.hex(), first.parameter_sets.hex()),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{self.path} and {first.path} differ in {what} ({ours} and {theirs}): only segments of "
                    "one run join; encode the odd ones again"
                )


def _copy_packets(
    source: InputContainer, target: OutputContainer, track: VideoStream, start: int, fps: Fraction, path: Path
) -> int:
    count = 0
    for packet in source.demux(source.streams.video[0]):
        if packet.size == 0:  # the demuxer's end mark
            continue
        if packet.pts != packet.dts:
            raise ValueError(f"{path} has B-frames: it was not written by SegmentWriter; encode it again")
        packet.time_base = 1 / fps
        packet.pts = packet.dts = start + count
        packet.duration = 1
        packet.stream = track
        target.mux(packet)
        count += 1
    return count


@contextmanager
def _reading(path: Path) -> Iterator[InputContainer]:
    """Opens a segment. Raises ValueError when it is not a complete mp4 file with video."""
    import av

    # By file object and with the format named: ffmpeg would follow the addresses in a playlist that calls
    # itself .mp4.
    with open(path, "rb") as file:
        incomplete = f"{path} is no complete mp4 file: was it cut, or never finished? Write that block again"
        if not _has_whole_boxes(file):
            raise ValueError(incomplete)
        try:
            with av.open(file, "r", format="mp4") as container:
                if not container.streams.video:
                    raise ValueError(f"{path} holds no video: it was not written by SegmentWriter")
                yield container
        except (av.error.InvalidDataError, av.error.EOFError, av.error.MemoryError) as error:  # sizes that cannot be
            raise ValueError(incomplete) from error


def _has_whole_boxes(file: BinaryIO) -> bool:
    """True when the mp4 boxes of `file` end where it does, index and frames among them; ffmpeg opens cut files."""
    end, position, kinds = file.seek(0, os.SEEK_END), 0, set()
    while position < end:
        file.seek(position)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:], "big")
        if length < 8:
            return False
        kinds.add(kind)
        position += length
    file.seek(0)
    return position == end and {b"moov", b"mdat"} <= kinds


def _require_encoder() -> None:
    try:
        import av
    except ImportError as error:
        raise ValueError("writing video needs PyAV: `pip install av`, or write PNG files") from error
    try:
        av.Codec(_ENCODER, "w")
    except ValueError as error:  # av.codec.codec.UnknownCodecError
        raise ValueError(
            f"encoder {_ENCODER!r} is not in this build of PyAV {av.__version__}: install the wheel "
            "(`pip install --force-reinstall --only-binary av av`), or write PNG files"
        ) from error


def _frame_rate(fps: int | float | Fraction) -> Fraction:
    if not (math.isfinite(fps) and 1 / 1001 <= fps <= 1000):
        raise ValueError(f"fps={fps}: frames per second must be between 1/1001 and 1000; Wan's own is 16")
    return Fraction(fps).limit_denominator(1001)  # 30000/1001 given as a float comes back exact


def _decimal(value: Fraction) -> str:
    return f"{float(value):.6f}".rstrip("0").rstrip(".")
