"""The cards of this machine as the planner sees them: known by name, or measured in a few seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from dualparal.kernels.attention import attention, table
from dualparal.kernels.attention.calibrate import time_together
from dualparal.planning.devices import DEVICES, Device, Efficiency

# What the names of the driver contain, the more special first.
_NAMES = {
    "RTX 4090": "rtx4090",
    "RTX 5090": "rtx5090",
    "L40S": "l40s",
    "A100-SXM4-40GB": "a100-40gb",
    "A100-PCIE-40GB": "a100-40gb",
    "A100": "a100-80gb",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
}
_MEASURED = Efficiency(1.0, 1.0, 1.0, 1.0, "measured on this machine")


def cards(kind: str, count: int) -> list[Device]:
    """The cards of ``count`` stages on this machine.

    CUDA: the first cards, by name, attention as ``dualparal calibrate`` has measured it; one that is not known is
    measured. CPU: processes that share cores and memory, measured once.

    Args:
        kind: "cuda" or "cpu".
        count: number of stages.

    Raises:
        ValueError: fewer cards than stages.
    """
    if kind != "cuda":
        own = measure(torch.device("cpu"))
        return [replace(own, memory=own.memory // count)] * count
    if count > torch.cuda.device_count():
        raise ValueError(
            f"{count} stages: torch sees {torch.cuda.device_count()} cards here, and a plan needs to know all of them; "
            "run 'dualparal plan' with --gpus, and give --layers-per-stage and --max-blocks-in-flight yourself"
        )
    return [_card(torch.device("cuda", index)) for index in range(count)]


def _card(device: torch.device) -> Device:
    facts = torch.cuda.get_device_properties(device)
    name = next((ours for theirs, ours in _NAMES.items() if theirs in facts.name), None)
    if name is None:
        return measure(device)
    known = replace(DEVICES[name], memory=facts.total_memory)
    best = _calibrated(device)
    if best is None:
        return known
    shares = known.efficiency
    origin = f"attention measured here by 'dualparal calibrate'; the rest: {shares.origin}"
    return replace(known, efficiency=replace(shares, attention=best / known.tensor, origin=origin))


def _calibrated(device: torch.device) -> float | None:
    """FLOP/s of the best backend at long shapes, from the table measured on this very machine; None: no such table."""
    facts = table.machine(device)
    try:
        path = table.measured_path(facts["card"])
        if not table.read_measured(path, facts):
            return None
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        found = [float(row["tflops"]) for row in rows if row["length"] == "long" and row["tflops"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return 1e12 * max(found) if found else None


@torch.inference_mode()
def measure(device: torch.device) -> Device:
    """Measures a card at shapes like Wan's: a linear layer, attention, a copy, a convolution. Takes some seconds."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    rows, inner, heads, side = (8192, 1536, 12, 256) if cuda else (512, 512, 4, 32)
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(4 * inner, inner, device=device, dtype=dtype)
    picture = torch.randn(1, 96, 6, side, side, device=device)
    kernel = torch.randn(96, 96, 3, 3, 3, device=device)
    large = torch.empty((256 if cuda else 32) << 20, dtype=torch.uint8, device=device)
    other = torch.empty_like(large)
    work: dict[str, tuple[Callable[[], object], float]] = {
        "linear": (lambda: torch.nn.functional.linear(x, weight), 8.0 * rows * inner**2),
        "attention": (lambda: attention(x, x, x, heads=heads), 4.0 * rows**2 * inner),
        "conv": (lambda: torch.conv3d(picture, kernel), 2.0 * 27 * 96**2 * 4 * (side - 2) ** 2),
        "copy": (lambda: other.copy_(large), 2.0 * large.nbytes),
    }
    seconds = time_together({name: function for name, (function, _) in work.items()}, device, repeats=5)
    rate = {name: amount / seconds[name] for name, (_, amount) in work.items()}
    if cuda:
        facts = torch.cuda.get_device_properties(device)
        name, memory = facts.name.lower().replace(" ", "-"), facts.total_memory
        fp8 = 2 * rate["linear"] if (facts.major, facts.minor) >= (8, 9) else 0.0
    else:
        fp8 = 0.0
        name, memory = "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shares = replace(_MEASURED, attention=rate["attention"] / rate["linear"])
    return Device(name, memory, rate["linear"], rate["conv"], rate["copy"], "pcie4-host", shares, fp8)
