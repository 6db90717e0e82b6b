"""Cards and links: what their makers state, and the share of it that real work reaches. No torch.

Every share has its origin beside it: published runs where there are any (bench/published.py), assumptions elsewhere.
None was measured by this project on a GPU yet. ``measured`` replaces them by what this machine does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dualparal.config.units import GIB

# Not for tensors: CUDA context, NCCL's buffers, the libraries' workspaces. Assumption.
RESERVED = 1.2 * GIB
# Of the rest, what torch's allocator can hand out before it is torn to pieces. Assumption.
USABLE = 0.95

# Matrix products in fp8 with scales by row against those in 16 bits: the tensor rate is twice as high, and a smaller
# share of it is reached. 690 becomes 1,100 TFLOP/s on an H200: docs/gpu.md. Assumption.
FP8_GAIN = 1.6
# Convolutions in 16 bits against those in TF32: the tensor rate of every card here is twice as high, and the same share
# of it is supposed to be reached. Assumption.
CONV_GAIN = 2.0


# Convolutions of the VAE in TF32, as a share of that rate. diffusers' decoder takes 6.57 s in eager bfloat16 for 81
# frames of 720p on an RTX PRO 6000 (pypi.org/project/fastvae), and float32 1.2 to 1.3 times as long (FastVideo, pull
# request 1472): 654 TFLOP in 8.2 s, of 252 TFLOP/s. One card alone was timed; that others reach the same share is an
# assumption, and the least certain number here.
CONV = 0.32


class Band(NamedTuple):
    """Seconds of published runs as shares of those predicted for their cards and software: bench/published.py.

    Attributes:
        low, high: the smallest and the largest share.
        timings: number of runs.
    """

    low: float
    high: float
    timings: int


# The error of a prediction: on cards whose shares come from published runs, as far as these very runs scatter; on
# others, as far as they lie from the rates of kernels on their own.
TIMED = Band(0.83, 1.21, 16)
UNTIMED = Band(0.98, 1.72, 16)


@dataclass(frozen=True)
class Efficiency:
    """Reached shares, 0 to 1, of a card's stated peaks.

    Attributes:
        attention, linear: of the tensor rate, by a kernel on its own.
        memory: of the bandwidth, by a kernel on its own.
        origin: the source of each.
        conv: of the TF32 rate, in the whole decoder.
        fused, eager: of the three rates above, in whole runs of engines with fused passes, such as this one is, and of
            eager ones with their own passes: medians of published runs; of the other kind where one has none.
        timings: number of published runs on such cards; 0: all is assumed.
    """

    attention: float
    linear: float
    memory: float
    origin: str
    conv: float = CONV
    fused: float = 1.0
    eager: float = 1.0
    timings: int = 0


HOPPER = Efficiency(
    0.70,
    0.70,
    0.90,
    "kernels: attention 690 of 989 TFLOP/s by NVIDIA's cuDNN 9.19 rows for H200 (cudnn-frontend, sdpa benchmark), "
    "linear the same, memory 4.3 of 4.8 TB/s (docs/gpu.md)",
    fused=0.82,
    eager=0.68,
    timings=7,
)
HOPPER_H20 = Efficiency(
    0.83,
    0.83,
    0.90,
    "kernels: so that Wan2.2's repository's 1,134 s come out; so little arithmetic leaves power and bandwidth to spare",
    timings=1,
)
AMPERE = Efficiency(
    0.70,
    0.75,
    0.85,
    "kernels: attention by FlashAttention-2's paper, up to 73 % on A100 for head dimension 128; the rest assumed",
    fused=0.87,
    eager=0.87,
    timings=3,
)
GEFORCE = Efficiency(
    0.85,
    0.85,
    0.80,
    "kernels: chosen so that Wan2.1-1.3B, 81 frames, 480p, 50 steps in plain diffusers takes 188 s on an RTX 5090, "
    "published: 184 s (TurboDiffusion's README)",
    timings=4,
)
LOW_POWER = Efficiency(
    0.55,
    0.60,
    0.80,
    "assumption: 350 W do not carry the stated tensor rate",
)
GA102 = Efficiency(0.70, 0.75, 0.85, "assumption: kernels as on A100", fused=0.87, eager=0.87)
L20 = Efficiency(0.85, 0.85, 0.80, "assumption: as GeForce cards of its generation, since 275 W carry its low rate")
WORKSTATION = Efficiency(
    0.65,
    0.70,
    0.85,
    "assumption: kernels as on B200, since 600 W do not carry the stated tensor rate for long",
)
BLACKWELL = Efficiency(
    0.65,
    0.70,
    0.85,
    "assumption: kernels as on Hopper, attention a little lower for want of a published row we checked",
    fused=0.97,
    eager=0.97,
    timings=1,
)


@dataclass(frozen=True)
class Link:
    """One direction between two ranks.

    Attributes:
        bandwidth: bytes per second that transfers reach.
        latency: seconds.
        origin: the source of these numbers.
    """

    name: str
    bandwidth: float
    latency: float
    origin: str


LINKS: Mapping[str, Link] = {
    link.name: link
    for link in (
        Link("pcie4", 20e9, 20e-6, "nccl-tests issue 74: 40 GB/s in both directions together with peer access"),
        Link("pcie4-host", 10e9, 30e-6, "the same issue: 20 GB/s in both directions together without peer access"),
        Link("pcie5", 40e9, 20e-6, "assumption: twice pcie4"),
        Link("pcie5-host", 20e9, 30e-6, "assumption: twice pcie4-host"),
        Link("nvlink3", 240e9, 10e-6, "assumption: 80 % of 300 GB/s"),
        Link("nvlink4", 360e9, 10e-6, "assumption: 80 % of 450 GB/s"),
        Link("nvlink5", 720e9, 10e-6, "assumption: 80 % of 900 GB/s"),
        Link("10gbe", 1.1e9, 60e-6, "assumption: 90 % of the line"),
        Link("25gbe", 2.8e9, 60e-6, "assumption: 90 % of the line"),
        Link("100gbe", 11.2e9, 40e-6, "assumption: 90 % of the line"),
        Link("ib-hdr", 22.5e9, 15e-6, "assumption: 90 % of 200 Gbit/s"),
        Link("ib-ndr", 45e9, 15e-6, "assumption: 90 % of 400 Gbit/s"),
    )
}


@dataclass(frozen=True)
class Device:
    """A card.

    Attributes:
        memory: bytes, as nvidia-smi shows them.
        tensor: dense bfloat16 with float32 sums, FLOP/s.
        tf32: the same in TF32, which cuDNN takes for float32 convolutions.
        fp8: the same in fp8; 0: it has none.
        bandwidth: of its memory, bytes/s.
        link: to its neighbour in the same machine, unless the user says otherwise.
        efficiency: reached shares of these rates.
        stands_for: the size of memory by which the user named it, such as "24gb"; empty: its name was given.
        fp8: dense fp8 with float32 sums, FLOP/s; 0: it has none.
    """

    name: str
    memory: int
    tensor: float
    tf32: float
    bandwidth: float
    link: str
    efficiency: Efficiency
    fp8: float = 0.0
    stands_for: str = ""

    @property
    def band(self) -> Band:
        """The error of predictions for this card."""
        return TIMED if self.efficiency.timings else UNTIMED

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return int((self.memory - RESERVED) * USABLE)

    @property
    def attention(self) -> float:
        """FLOP/s that attention reaches."""
        return self.tensor * self.efficiency.attention

    @property
    def linear(self) -> float:
        """FLOP/s that matrix products reach."""
        return self.tensor * self.efficiency.linear

    @property
    def linear_8bit(self) -> float:
        """FLOP/s that matrix products in fp8 reach; as in 16 bits on cards that have no such products."""
        return FP8_GAIN * self.linear if self.fp8 else self.linear

    @property
    def conv(self) -> float:
        """FLOP/s that convolutions in TF32 reach."""
        return self.tf32 * self.efficiency.conv

    @property
    def conv_16bit(self) -> float:
        """FLOP/s that convolutions in 16 bits reach."""
        return CONV_GAIN * self.conv

    @property
    def copy(self) -> float:
        """Bytes/s, read and written together, that passes over memory reach."""
        return self.bandwidth * self.efficiency.memory


def _device(
    name: str,
    mib: int,
    rates: tuple[float, float, float],
    bandwidth: float,
    link: str,
    efficiency: Efficiency,
) -> Device:
    """A card from MiB, TFLOP/s in (bfloat16, TF32, fp8) and GB/s."""
    tensor, tf32, fp8 = (1e12 * rate for rate in rates)
    return Device(name, mib << 20, tensor, tf32, bandwidth * 1e9, link, efficiency, fp8)


# Dense rates with float32 sums: NVIDIA's data sheets of A100, L40S, H100, H200 and B200, and its architecture papers
# of GA102 (RTX 3090, RTX A6000), Ada (RTX 4090), RTX Blackwell (RTX 5090) and RTX Blackwell PRO (RTX PRO 6000, which
# has twice the GeForce's rate per unit). RTX 4090 D: the RTX 4090's by its 114 instead of 128 multiprocessors. L20 and
# H20, which have no public paper: the figures of vendors' pages (148 and 119.5 TFLOP/s in 16 bits).
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _device("rtx3090", 24576, (71.0, 35.6, 0.0), 936, "pcie4-host", GA102),
        _device("rtx4090", 24564, (165.2, 82.6, 330.3), 1008, "pcie4-host", GEFORCE),
        _device("rtx4090d", 24564, (147.1, 73.5, 294.2), 1008, "pcie4-host", GEFORCE),
        _device("rtx5090", 32607, (209.5, 104.8, 419.0), 1792, "pcie5-host", GEFORCE),
        _device("a6000", 49140, (154.8, 77.4, 0.0), 768, "pcie4", GA102),
        _device("l20", 46068, (119.5, 59.8, 239.0), 864, "pcie4", L20),
        _device("l40s", 46068, (362.0, 183.0, 733.0), 864, "pcie4", LOW_POWER),
        _device("rtxpro6000", 97887, (503.8, 251.9, 1007.6), 1792, "pcie5", WORKSTATION),
        _device("a100-40gb", 40960, (312.0, 156.0, 0.0), 1555, "nvlink3", AMPERE),
        _device("a100-80gb", 81920, (312.0, 156.0, 0.0), 2039, "nvlink3", AMPERE),
        _device("h20", 97871, (148.0, 74.0, 296.0), 4000, "nvlink4", HOPPER_H20),
        _device("h100", 81559, (989.0, 494.0, 1979.0), 3350, "nvlink4", HOPPER),
        _device("h200", 143771, (989.0, 494.0, 1979.0), 4800, "nvlink4", HOPPER),
        _device("b200", 183359, (2250.0, 1100.0, 4500.0), 8000, "nvlink5", BLACKWELL),
    )
}
_ALIASES = {
    "3090": "rtx3090",
    "4090": "rtx4090",
    "4090d": "rtx4090d",
    "rtx4090-d": "rtx4090d",
    "5090": "rtx5090",
    "rtxa6000": "a6000",
    "rtxpro-6000": "rtxpro6000",
    "pro6000": "rtxpro6000",
    "a100": "a100-80gb",
    "h100-80gb": "h100",
    "h200-141gb": "h200",
}
# Cards of a size in GB; one that is known by its memory alone is taken for the first.
BY_MEMORY: Mapping[int, tuple[str, ...]] = {
    24: ("rtx4090", "rtx4090d", "rtx3090"),
    32: ("rtx5090",),
    40: ("a100-40gb",),
    48: ("l40s", "l20", "a6000"),
    80: ("a100-80gb", "h100"),
    96: ("rtxpro6000", "h20"),
    141: ("h200",),
    192: ("b200",),
}


def device(name: str, extra: Mapping[str, Device] | None = None) -> Device:
    """The card of a name such as "rtx4090" or "a100-80gb", or that which a size such as "24gb" stands for.

    Args:
        name: in any case.
        extra: further cards by name, such as a measured one.

    Raises:
        ValueError: unknown; names those that are known.
    """
    plain = re.sub(r"[\s_]+", "-", name.lower()).replace("nvidia-", "").replace("rtx-", "rtx")
    known = {**DEVICES, **(extra or {})}
    plain = _ALIASES.get(plain, plain)
    if plain in known:
        return known[plain]
    size = re.fullmatch(r"(\d+)-?gi?b", plain)
    if size and int(size[1]) in BY_MEMORY:
        return replace(known[BY_MEMORY[int(size[1])][0]], stands_for=f"{size[1]}gb")
    sizes = ", ".join(f"{size}gb" for size in BY_MEMORY)
    near = difflib.get_close_matches(plain, known, 1, 0.7)
    hint = f"; the nearest name is {near[0]}" if near else ""
    raise ValueError(f"card {name!r} is not known; use one of {', '.join(known)}, or a size of memory: {sizes}{hint}")


def parse_gpus(text: str, extra: Mapping[str, Device] | None = None) -> list[list[Device]]:
    """Groups of cards, one card per stage, from a text such as "8xrtx4090", "8x24GB" or "4xa100-80gb,2xrtx4090".

    Args:
        text: groups, separated by commas.
        extra: further cards by name.

    Raises:
        ValueError: not of this form, or an unknown card.
    """
    groups = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(?:(\d+)\s*[x*])?\s*([a-zA-Z0-9][\w .-]*?)\s*", part)
        if not found or (found[1] is not None and not 1 <= int(found[1]) <= 1024):
            raise ValueError(f"gpus={text!r}: use COUNTxCARD, such as 8xrtx4090, 8x24GB or 4xa100-80gb,2xrtx4090")
        groups.append([device(found[2], extra)] * int(found[1] or 1))
    return groups


def link(name: str) -> Link:
    """The link of a name, in any case; raises ValueError for an unknown one, naming those that are known."""
    if name.lower() not in LINKS:
        raise ValueError(f"link {name!r} is not known; use one of {', '.join(LINKS)}")
    return LINKS[name.lower()]


def links(groups: Sequence[Sequence[Device]], within: str | None = None, between: str | None = None) -> list[Link]:
    """The edges stage k -> k + 1, and back from the last one to stage 0.

    Args:
        groups: the cards of each machine.
        within: name of the link between cards of a group; default: the slower of the two cards' own.
        between: the same from the end of one group to the next, and back to the first; default: as within, but no
            NVLink between unlike cards.

    Raises:
        ValueError: an unknown link.
    """
    cards = [(number, card) for number, group in enumerate(groups) for card in group]
    found = []
    for at, (group, card) in enumerate(cards):
        next_group, next_card = cards[(at + 1) % len(cards)]
        chosen = between or within if group != next_group else within
        if chosen is not None:
            found.append(link(chosen))
            continue
        own = [LINKS[c.link] for c in (card, next_card)]
        if card.name != next_card.name:
            own = [x if x.name.startswith("pcie") else LINKS["pcie4"] for x in own]
        found.append(min(own, key=lambda x: x.bandwidth))
    return found
