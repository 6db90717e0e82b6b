"""Sizes of a light decoder (TAEHV's architecture for Wan's latents) from its file's header. No torch, no weights.

Three levels of blocks that remember a frame, each followed by upsampling, growth in time and a convolution. Layers are
named by their place: "decoder.1" to "decoder.22".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dualparal.models.json_files import ModelError, shorten
from dualparal.models.sizes import Borders

GROWTH = (1, 2, 2)  # frames that one becomes behind each level
BLOCKS = 3  # of a level
FIRST, LAST = "decoder.1", "decoder.22"
_STEP = BLOCKS + 3  # layers of a level: blocks, upsampling, growth, convolution
_UNUSED = "encoder."  # tensors of the other half, which may be in the file


def block_name(level: int, block: int) -> str:
    """The name of a block that remembers a frame."""
    return f"decoder.{3 + _STEP * level + block}"


def growth_name(level: int) -> str:
    """The name of a level's growth in time."""
    return f"decoder.{3 + _STEP * level + BLOCKS + 1}.conv"


def way_out_name(level: int) -> str:
    """The name of the convolution at the end of a level."""
    return f"decoder.{3 + _STEP * level + BLOCKS + 2}"


@dataclass(frozen=True)
class LightSizes:
    """Sizes of a light decoder.

    Attributes:
        widths: channels of the three levels and behind them.
        channels: of latents.
        patch: side of the square of pixels that a point of the last layer becomes.
    """

    widths: tuple[int, int, int, int]
    channels: int
    patch: int

    @property
    def spatial_factor(self) -> int:
        return 8 * self.patch

    @property
    def temporal_factor(self) -> int:
        return 4

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        found: dict[str, tuple[int, ...]] = {}

        def conv(name: str, inputs: int, outputs: int, bias: bool = True, side: int = 3) -> None:
            found[f"{name}.weight"] = (outputs, inputs, side, side)
            if bias:
                found[f"{name}.bias"] = (outputs,)

        conv(FIRST, self.channels, self.widths[0])
        for level, growth in enumerate(GROWTH):
            width, out = self.widths[level : level + 2]
            for block in range(BLOCKS):
                for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                    conv(f"{block_name(level, block)}.conv.{layer}", inputs, width)
            conv(growth_name(level), width, growth * width, bias=False, side=1)
            conv(way_out_name(level), width, out, bias=False)
        conv(LAST, self.widths[-1], 3 * self.patch**2)
        return found

    @property
    def parameters(self) -> int:
        """Parameters of the decoder, which is all that is loaded."""
        total = 0
        for shape in self.shapes.values():
            count = 1
            for side in shape:
                count *= side
            total += count
        return total

    def flops(self, pixels: int) -> int:
        """FLOPs of decoding one latent frame of ``pixels`` latent pixels."""
        total = 9 * self.channels * self.widths[0]
        frames = scale = 1
        for level, growth in enumerate(GROWTH):
            width, out = self.widths[level : level + 2]
            total += BLOCKS * 36 * width**2 * frames * scale**2
            scale *= 2
            total += growth * width**2 * frames * scale**2
            frames *= growth
            total += 9 * width * out * frames * scale**2
        total += 9 * self.widths[-1] * 3 * self.patch**2 * frames * scale**2
        return 2 * total * pixels

    def cache_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes that the decoder holds from one latent frame to the next: the last frame before each block."""
        return itemsize * pixels * sum(BLOCKS * self.widths[level] * 4**level for level in range(len(GROWTH)))

    def working_bytes(self, pixels: int, itemsize: int) -> int:
        """Bytes of the largest set of tensors that live at once: the last level's frames, and twice those behind it."""
        grown, last = self.widths[-2], self.widths[-1]
        return itemsize * pixels * 64 * 4 * (grown + 2 * last)

    def borders(self, width: int) -> Borders:
        """A row of the input of every convolution over space."""
        numbers, messages, frames, scale = self.channels, 1, 1, 1
        for level, growth in enumerate(GROWTH):
            numbers += BLOCKS * 4 * self.widths[level] * frames * scale
            scale, frames = 2 * scale, growth * frames
            numbers += self.widths[level] * frames * scale
            messages += 3 * BLOCKS + 1
        return Borders(width * (numbers + self.widths[-1] * frames * scale), messages + 1, 0)


def read_light_sizes(path: Path, channels: int, spatial_factor: int) -> LightSizes:
    """Sizes of the light decoder in a safetensors file, whose names and shapes are checked.

    Args:
        path: the file.
        channels: of the latents that it must take.
        spatial_factor: pixels per latent pixel that it must make, a multiple of 8.

    Raises:
        ModelError: no safetensors file, or tensors that are missing, unknown or of another shape; names them.
    """
    found = {name: shape for name, shape in _header(path).items() if not name.startswith(_UNUSED)}
    firsts = [f"{FIRST}.weight", *(f"{way_out_name(level)}.weight" for level in range(len(GROWTH)))]
    widths = [found[name][0] if len(found.get(name, ())) == 4 else 0 for name in firsts]
    sizes = LightSizes((widths[0], widths[1], widths[2], widths[3]), channels, spatial_factor // 8)
    expected = sizes.shapes
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{shorten(name)} is unknown" for name in found if name not in expected]
    problems += [f"{n} is {list(found[n])} instead of {list(s)}" for n, s in expected.items() if found.get(n, s) != s]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(
            f"decoder {path}: {'; '.join(problems[:3])}{more}; it must be a tiny autoencoder (TAEHV) for latents of "
            f"{channels} channels, such as taew2_1 for Wan2.1"
        )
    return sizes


def _header(path: Path) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor in a file. Raises ModelError."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise ModelError(f"decoder {path}: not a .safetensors file (pickles, .pth and .pt, are never read)")
    try:
        with safe_open(path, framework="np") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"decoder {path} is not a whole safetensors file ({error}); get it again") from None
