"""The identity of a run: values that ranks compare before they begin, and that a snapshot keeps for its resume."""

from __future__ import annotations

import json
import logging
import platform
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dualparal.checkpoint.snapshot import Resumed, Snapshot, SnapshotError
from dualparal.engine.clips import clip_fingerprint
from dualparal.engine.images import fingerprints
from dualparal.engine.request import Request
from dualparal.engine.setup import Setup
from dualparal.schedule.schedule import Schedule
from dualparal.version import __version__

logger = logging.getLogger("dualparal")


def run_info(
    setup: Setup,
    scheduler: Any,
    requests: Sequence[Request],
    schedule: Schedule,
    timeline: Path | None,
    resumed: Resumed | None,
) -> dict[str, Any]:
    """The values on which all ranks of a run must agree, for JSON. No prompt is among them: only one rank knows it.

    Args:
        scheduler: diffusers' sampler object.
        timeline, resumed: the run's, if it has them.
    """
    config = asdict(setup.config)
    for name in ("device", "decoder", "loras", "transformers"):  # ranks have cards and paths of their own
        del config[name]
    return {
        "dualparal": __version__,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "world_size": setup.mesh.world_size,
        "device": setup.mesh.device.type,
        "float32_products": _float32_products(setup.mesh.device),
        "weights": setup.source.fingerprint,
        "sampler": type(scheduler).__name__,
        "schedule": asdict(schedule),
        "video": {k: v for k, v in asdict(requests[0].video).items() if k not in ("output_type", "seed")},
        "frames": requests[0].video.output_type if schedule.decode_ranks or schedule.decode_in_place else None,
        "images": [fingerprints(request) for request in requests],
        "clips": [clip_fingerprint(request) for request in requests] if resumed is None else None,
        "seeds": [request.video.seed for request in requests],
        "layers_per_stage": [len(layers) for layers in setup.layers],
        "engine": config,
        "decoder": setup.light and setup.light.fingerprint,
        "timeline": timeline and str(timeline),
        "snapshot": resumed and resumed.name,
    }


def snapshot_info(
    setup: Setup,
    scheduler: Any,
    requests: Sequence[Request],
    files: Mapping[str, str | None],
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """The description of a run that its snapshots hold, as JSON values.

    Args:
        scheduler: diffusers' sampler object.
        files: names of the files with the initial noise ("noise"; None: it comes from seeds), what came of images
            ("images") and the ends of clips ("clips"); None: there are none.
        notes: values of whoever started the run.
    """
    return {
        "id": secrets.token_hex(8),
        "videos": [asdict(request.video) for request in requests],
        **files,
        "notes": dict(notes),
        "same": _identity(setup, scheduler),
        **maker(setup),
    }


def maker(setup: Setup) -> dict[str, Any]:
    """The entries of a snapshot's description that follow whoever writes it: a resumed run replaces them."""
    return {"made_with": versions(setup), "vae_dtype": setup.config.vae_dtype}


def versions(setup: Setup) -> dict[str, str]:
    """The versions of software, the card and its products, by name, which decide the last bits of frames.

    A run that is resumed with others goes on, and its frames may differ in those bits.
    """
    device = setup.mesh.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = {"dualparal": __version__, "torch": torch.__version__, "diffusers": version("diffusers")}
    return {**found, "device": f"{device.type} {card}", "float32 products": _float32_products(device)}


def _float32_products(device: torch.device) -> str:
    """The precision of float32 matrix products in this process: the caller's to set, "ieee" unless he does.

    Part of the transformer is float32 whatever the dtype of the rest is. Convolutions need no entry: the family sets
    their precision itself.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    found = getattr(getattr(backend, "matmul", None), "fp32_precision", None)  # since torch 2.9
    if found is None:
        found = {"highest": "ieee"}.get(torch.get_float32_matmul_precision(), torch.get_float32_matmul_precision())
    return "ieee" if found == "none" else found


def check_same_run(setup: Setup, scheduler: Any, found: Snapshot) -> None:
    """Checks that a snapshot is of a run like this engine's, and warns where only the last bits may differ.

    Raises:
        SnapshotError: the snapshot is of another model, engine or sampler.
    """
    wanted = found.run["same"]
    have = json.loads(json.dumps(_identity(setup, scheduler)))
    different = [f"{k}: {wanted.get(k)!r} there, {have[k]!r} here" for k in have if have[k] != wanted.get(k)]
    if different:
        raise SnapshotError("the snapshot is of another run: " + "; ".join(different))
    for key, value in versions(setup).items():
        if found.run["made_with"].get(key) != value:
            logger.warning(
                "resumed with %s %s, begun with %s: frames may differ in the last bits from an unbroken run's",
                key,
                value,
                found.run["made_with"].get(key),
            )
    begun, now = found.run["vae_dtype"], setup.config.vae_dtype
    if begun != now and found.run["videos"][0]["output_type"] != "latent":
        logger.warning(
            "resumed with vae_dtype=%s, begun with %s: latents are an unbroken run's, frames differ by some levels of "
            "255 from here on; give vae_dtype=%r to go on as before",
            now,
            begun,
            begun,
        )


def _identity(setup: Setup, scheduler: Any) -> dict[str, Any]:
    """The values that must be the same for a run to go on. Split, depth and graphs may change: they move no bit."""
    sampler = scheduler.config
    return {
        "weights": setup.source.fingerprint,
        "decoder": setup.light and setup.light.fingerprint,
        "blocks": asdict(setup.config.blocks),
        "dtype": str(setup.dtype),
        "attention_8bit": asdict(setup.config.attention_8bit),
        "features_8bit": setup.config.features_8bit,
        "linear_8bit": asdict(setup.config.linear_8bit),
        "reuse": asdict(setup.config.reuse),
        "sampler": type(scheduler).__name__,
        "sampler_config": {k: v for k, v in sorted(sampler.items()) if isinstance(v, (bool, int, float, str))},
    }
