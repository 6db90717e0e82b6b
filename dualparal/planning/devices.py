"""Cards and links: what their makers state, and the share of it that real work reaches. No torch.

Every share is an assumption with its origin beside it; none was measured by this project on a GPU yet. ``measured``
replaces them by what this machine does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Efficiency:
    """Reached shares, 0 to 1, of a card's stated peaks.

    Attributes:
        attention, linear: of the tensor rate.
        memory: of the bandwidth.
        conv: of the TF32 rate.
        origin: the source of each.
    """

    attention: float
    linear: float
    memory: float
    conv: float
    origin: str


HOPPER = Efficiency(
    0.70,
    0.70,
    0.90,
    0.35,
    "attention 690 of 989 TFLOP/s: NVIDIA's cuDNN 9.19 rows for H200 (cudnn-frontend, sdpa benchmark); linear the "
    "same, memory 4.3 of 4.8 TB/s: docs/gpu.md; convolutions: assumption",
)
AMPERE = Efficiency(
    0.70,
    0.75,
    0.85,
    0.35,
    "attention: FlashAttention-2's paper states up to 73 % on A100 for head dimension 128; the rest: assumption",
)
CONSUMER = Efficiency(
    0.85,
    0.85,
    0.80,
    0.35,
    "chosen so that Wan2.1-1.3B, 81 frames, 480p, 50 steps in plain diffusers takes 188 s on an RTX 5090, published: "
    "184 s (TurboDiffusion's README); convolutions: assumption",
)
LOW_POWER = Efficiency(
    0.55,
    0.60,
    0.80,
    0.35,
    "assumption: 350 W do not carry the stated tensor rate",
)
BLACKWELL = Efficiency(
    0.65, 0.70, 0.85, 0.35, "assumption: as Hopper, attention a little lower for want of a published row we checked"
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
        bandwidth: of its memory, bytes/s.
        link: to its neighbour in the same machine, unless the user says otherwise.
        efficiency: reached shares of these rates.
    """

    name: str
    memory: int
    tensor: float
    tf32: float
    bandwidth: float
    link: str
    efficiency: Efficiency

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
        """FLOP/s that matrix products in fp8 reach, on cards that have them."""
        return FP8_GAIN * self.linear

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
    name: str, mib: int, tensor: float, tf32: float, bandwidth: float, link: str, efficiency: Efficiency
) -> Device:
    return Device(name, mib << 20, tensor * 1e12, tf32 * 1e12, bandwidth * 1e9, link, efficiency)


# Rates: NVIDIA's data sheets (Ada and Blackwell architecture papers for the RTX cards), dense.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _device("rtx4090", 24564, 165.2, 82.6, 1008, "pcie4-host", CONSUMER),
        _device("rtx5090", 32607, 209.5, 104.8, 1792, "pcie5-host", CONSUMER),
        _device("l40s", 46068, 362.0, 183.0, 864, "pcie4", LOW_POWER),
        _device("a100-40gb", 40960, 312.0, 156.0, 1555, "nvlink3", AMPERE),
        _device("a100-80gb", 81920, 312.0, 156.0, 2039, "nvlink3", AMPERE),
        _device("h100", 81559, 989.0, 494.0, 3350, "nvlink4", HOPPER),
        _device("h200", 143771, 989.0, 494.0, 4800, "nvlink4", HOPPER),
        _device("b200", 183359, 2250.0, 1100.0, 8000, "nvlink5", BLACKWELL),
    )
}
_ALIASES = {"4090": "rtx4090", "5090": "rtx5090", "a100": "a100-80gb", "h100-80gb": "h100", "h200-141gb": "h200"}
# A card that is known by its memory alone is taken for the usual one of that size.
_BY_MEMORY = {24: "rtx4090", 32: "rtx5090", 40: "a100-40gb", 48: "l40s", 80: "a100-80gb", 141: "h200", 192: "b200"}


def device(name: str, extra: Mapping[str, Device] | None = None) -> Device:
    """The card of a name such as "rtx4090", "a100-80gb" or "24gb".

    Args:
        name: in any case.
        extra: further cards by name, such as a measured one.

    Raises:
        ValueError: unknown; names those that are known.
    """
    plain = name.lower().replace("_", "-").replace("nvidia-", "").replace("rtx-", "rtx")
    known = {**DEVICES, **(extra or {})}
    plain = _ALIASES.get(plain, plain)
    if plain in known:
        return known[plain]
    size = re.fullmatch(r"(\d+)\s*gi?b", plain)
    if size and int(size[1]) in _BY_MEMORY:
        return known[_BY_MEMORY[int(size[1])]]
    sizes = ", ".join(f"{size}gb" for size in _BY_MEMORY)
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
