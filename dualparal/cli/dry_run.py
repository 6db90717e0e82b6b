"""``--dry-run``: the request as the run would have it, and its plan, as YAML. No torch, no weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from dualparal.cli.job import Job
from dualparal.models.folder import folder_of
from dualparal.models.json_files import ModelError
from dualparal.models.registry import folder_sizes
from dualparal.planning.workload import Workload
from dualparal.schedule.layout import split_layers


def describe(job: Job) -> str:
    """The job as YAML: ``request``, with nothing left open that is known before the ranks start, and ``plan``."""
    import yaml

    found = asdict(job)
    for name in ("texts", "end", "receipts", "resume", "restartable"):
        del found[name]
    request = json.loads(json.dumps(found, default=str))
    request["prompts"] = [{int(frame): text for frame, text in each.items()} for each in request["prompts"]]
    return yaml.safe_dump(
        {"request": request, "plan": _plan(job)}, sort_keys=False, allow_unicode=True, width=100
    ).rstrip()


def _plan(job: Job) -> dict[str, Any]:
    """The work: processes, layers of each, blocks, and the order's size."""
    plan: dict[str, Any] = {"processes": job.ranks, "device": job.device}
    try:
        sizes = folder_sizes(folder_of(job.model, job.engine.transformers), job.engine.transformers)
    except ModelError:
        return plan
    work = Workload(sizes, job.video, job.engine, len(job.prompts))
    layers = split_layers(sizes.num_layers, job.stages, job.engine.layers_per_stage)
    schedule = work.schedule(job.stages)
    return {
        **plan,
        "layers_per_stage": [len(each) for each in layers],
        "blocks": work.layout.num_blocks,
        "latent_frames": work.layout.num_latents,
        "forwards_per_block": schedule.units_per_block,
        "files": [str(out) for out in job.outs],
    }
