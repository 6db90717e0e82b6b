"""A power cut loses what was not synced: not what is said to be safe, and the end of a run can be gone on with."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch

from dualparal.checkpoint import snapshot
from dualparal.cli.job import Job
from dualparal.cli.results import tidy_again
from dualparal.io.latents import write_latents
from failing_io import Disk

PICTURE = torch.arange(1000.0).view(1, 1, 10, 10, 10)


def dark_after(folder: Path, number: int, seed: int, work: Callable[[], object]) -> None:
    """Works in a child whose power goes out before its call of that number, or after its last one."""
    child = os.fork()
    if child == 0:
        try:
            disk = Disk(folder, number, "power", os.open(os.devnull, os.O_WRONLY), str(seed))
            disk.patch()
            work()
            disk.end()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the power stayed on"


def test_a_file_that_was_written_stays_with_the_folders_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "newer" / "a.safetensors"
    for seed in range(8):
        dark_after(tmp_path, 1000, seed, partial(write_latents, path, PICTURE))
        written = path.read_bytes()
        path.unlink()
        path.parent.rmdir()
        path.parent.parent.rmdir()
        assert len(written) > 4 * PICTURE.numel()


def test_what_a_run_removes_at_its_end_goes_in_an_order_that_can_be_gone_on_with(tmp_path: Path) -> None:
    """At any cut the newest snapshot is the last one, or what it would make sure of is gone."""
    # Most calls remove files whose order is all the same; what the last ones leave decides (without a sync: seed 26).
    cuts = [*((number, number) for number in range(0, 12, 3)), *((1000, seed) for seed in range(12, 28))]
    for case, (number, seed) in enumerate(cuts):
        folder = tmp_path / str(case)
        kept, blocks = folder / "kept", folder / "a.mp4.blocks"
        blocks.mkdir(parents=True)
        snapshot.prepare(kept)
        for path in (blocks / "block-000000.mp4", blocks / "block-000001.mp4", folder / "a.mp4"):
            path.touch()
        for block in range(2):
            snapshot.write_block(kept, "run", 0, block, PICTURE)
        for iteration, end in enumerate(snapshot.ENDS, 1):
            snapshot.Snapshot(iteration, {"id": "run"}, [{}], [{}], end).write(kept)
        made = {"outs": [folder / "a.mp4"], "latents_out": None, "keep_blocks": False, "restartable": False}
        job = cast("Job", SimpleNamespace(checkpoint=kept, **made))
        dark_after(folder, number, seed, partial(tidy_again, job))
        if snapshot.has_snapshots(kept):
            assert snapshot.newest(kept).snapshot.end == snapshot.JOINED
        else:
            assert not blocks.exists()
