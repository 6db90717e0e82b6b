"""Fragments of a video for players that begin before its end: a block's mp4 as one fMP4 fragment, not encoded again.

Fragments of one ``SegmentWriter`` share a header (the init segment) and a clock that runs from the video's first frame,
so a browser appends them one after another (HLS, Media Source Extensions).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

_FLAGS = "empty_moov+default_base_moof+frag_keyframe"
_TICKS = 1000  # of the clock per frame, at a whole rate of frames per second
_HEADER = 8  # bytes of a box: length and kind
_CONTAINERS = (b"moof", b"traf")


@dataclass(frozen=True)
class Fragment:
    """A block as a player takes it: the header that all blocks share, and the block's own bytes."""

    header: bytes
    media: bytes


def fragment(path: Path, start_frame: int, number: int) -> Fragment:
    """A closed segment as a fragment.

    Args:
        path: a segment of ``SegmentWriter``.
        start_frame: the video's frame with which it begins.
        number: of the block, from 0 on.

    Raises:
        ValueError: it is no such segment.
        OSError: it cannot be read.
    """
    import av

    from dualparal.io.video import count_frames

    count_frames(path)  # which refuses what is not whole
    target = io.BytesIO()
    with open(path, "rb") as file, av.open(file, "r", format="mp4") as source:
        stream = source.streams.video[0]
        assert stream.average_rate is not None, "a segment names its rate"
        rate = Fraction(stream.average_rate)
        options = {"movflags": _FLAGS, "video_track_timescale": str(rate.numerator * _TICKS)}
        with av.open(target, "w", format="mp4", options=options) as out:
            track = out.add_stream_from_template(stream)
            for index, packet in enumerate(each for each in source.demux(stream) if each.size):
                packet.time_base = 1 / rate
                packet.pts = packet.dts = index
                packet.duration = 1
                packet.stream = track
                out.mux(packet)
    return _cut(bytearray(target.getvalue()), start_frame * rate.denominator * _TICKS, number)


def _cut(data: bytearray, start: int, number: int) -> Fragment:
    """The header and the fragments of a fragmented mp4, whose clock and count are set on.

    Args:
        data: the file.
        start: ticks of its first frame.
        number: of the block: numbers of fragments grow from block to block.
    """
    header, media, count = bytearray(), bytearray(), 0
    for kind, at, end in _boxes(data, 0, len(data)):
        if kind in (b"ftyp", b"moov"):
            header += data[at:end]
        elif kind == b"moof":
            struct.pack_into(">I", data, _find(data, at, end, b"mfhd") + 4, (number << 12) + count + 1)
            _move(data, _find(data, at, end, b"tfdt"), start)
            media += data[at:end]
            count += 1
        elif kind == b"mdat":
            media += data[at:end]
    return Fragment(bytes(header), bytes(media))


def _move(data: bytearray, at: int, start: int) -> None:
    """Adds ``start`` to the decode time in the content of a tfdt box, which FFmpeg writes with 64 bits."""
    assert data[at] == 1, "a decode time of 64 bits"
    struct.pack_into(">Q", data, at + 4, struct.unpack_from(">Q", data, at + 4)[0] + start)


def _find(data: bytearray, begin: int, end: int, wanted: bytes) -> int:
    """The place of the content of the first box of a kind, inside a box from ``begin`` to ``end``."""
    for kind, at, stop in _boxes(data, begin + _HEADER, end):
        if kind == wanted:
            return at + _HEADER
        if kind in _CONTAINERS:
            return _find(data, at, stop, wanted)
    raise ValueError(f"a fragment without {wanted.decode()}")


def _boxes(data: bytearray, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of the boxes that lie side by side. FFmpeg writes none of 4 GiB."""
    while begin < end:
        (length,) = struct.unpack_from(">I", data, begin)
        if length < _HEADER or begin + length > end:
            raise ValueError("a fragment with a box that is longer than it")
        yield bytes(data[begin + 4 : begin + _HEADER]), begin, begin + length
        begin += length
