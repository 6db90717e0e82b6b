"""Draws frames of a video side by side: python docs/draw_filmstrip.py demo/video.mp4 docs/demo.png

The frames are evenly spaced, in rows of eight, each with its number. With a name that ends in .webp: the video itself,
every second frame, as an animated picture.
"""

from __future__ import annotations

import sys

import av
import numpy as np
from PIL import Image, ImageDraw

COLUMNS, ROWS, SCALE, GAP = 8, 3, 2, 2


def main(video: str, picture: str) -> None:
    with av.open(video) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if picture.endswith(".webp"):
        first, *others = (
            Image.fromarray(frame).resize((4 * frame.shape[1], 4 * frame.shape[0]), Image.Resampling.BICUBIC)
            for frame in frames[::2]
        )
        first.save(picture, save_all=True, append_images=others, duration=125, loop=0, quality=60)
        return
    height, width, _ = frames[0].shape
    cell = np.array([width * SCALE + GAP, height * SCALE + GAP])
    sheet = Image.new("RGB", tuple(int(n) for n in cell * (COLUMNS, ROWS) - GAP), "white")
    for place, index in enumerate(np.linspace(0, len(frames) - 1, COLUMNS * ROWS).round().astype(int)):
        image = Image.fromarray(frames[index]).resize((width * SCALE, height * SCALE), Image.Resampling.NEAREST)
        ImageDraw.Draw(image).text((4, 2), str(index), fill="white", stroke_width=1, stroke_fill="black")
        column, row = place % COLUMNS, place // COLUMNS
        sheet.paste(image, (int(column * cell[0]), int(row * cell[1])))
    sheet.save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
