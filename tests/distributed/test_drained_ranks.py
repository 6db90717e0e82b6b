"""Two to four ranks over a stand-in for NCCL, whose device drains before every action: the bits of one process."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dualparal.cli import leader
from dualparal.distributed import remote
from dualparal.engine.engine import Engine
from dualparal.launch import supervisor
from dualparal.launch.blame import Limits
from dualparal.launch.supervisor import Result, supervise
from places import TESTS, WORKERS

WORKER = WORKERS / "virtual_rank.py"
CALL = {"prompt": "a cat", "num_frames": 29, "num_inference_steps": 3}


def launch(folder: Path, ranks: int, cases: list[dict[str, Any]], *more: str) -> Result:
    (folder / "cases.json").write_text(json.dumps(cases))
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS / "helpers")}
    command = [sys.executable, str(WORKER), str(folder), *more]
    return supervise(command, ranks, limits=Limits(progress=60.0, startup=120.0), env=env)


def case(model: Path, context: str, depth: int = 2, **more: Any) -> dict[str, Any]:
    options = {"frames_per_block": 2, "context_frames": 1, "context": context, "depth": depth}
    return {"model": str(model), "options": options, "call": {**CALL, **more.pop("call", {})}, **more}


@pytest.mark.parametrize("ranks", [4])
def test_drains_everywhere_change_nothing(tmp_path: Path, wan21: Path, ranks: int) -> None:
    """Also at an early end, whose messages and credits must be taken before the next run begins."""
    cases = [
        case(wan21, "cached"),
        case(wan21, "paper", depth=1),
        case(wan21, "cached", call={"num_frames": None}, leave_after=2),
        case(wan21, "cached", depth=3, call={"num_frames": 101}, leave_after=2),
        case(wan21, "prior", pause_after=1),
    ][: 5 if ranks == 2 else 3]
    assert launch(tmp_path, ranks, cases) == Result(0)
    for index, each in enumerate(cases):
        engine = Engine.from_pretrained(each["model"], device="cpu", **each["options"])
        call = {**each["call"], "num_frames": each["call"]["num_frames"] or 101}
        alone = engine(height=32, width=32, output_type="latent", **call).frames
        made = load_file(tmp_path / f"{index}.safetensors")["latents"]
        assert made.shape[2] >= 6 and torch.equal(made, alone[:, :, : made.shape[2]]), each
    for rank in range(ranks):
        stats = json.loads((tmp_path / f"stats-{rank}.json").read_text())
        assert stats[-1]["drains"] > 100 and stats[-1]["launched"] > 100
        if "pause_after" in cases[-1]:
            assert stats[-1]["free"] > 1.0, "while the consumer pauses no transfer holds a device"


def test_receives_posted_ahead_hang(tmp_path: Path, wan21: Path) -> None:
    """How it once was: else the test above would show nothing."""
    result = launch(tmp_path, 2, [case(wan21, "cached")], "ahead")
    assert result.failure is not None
    assert "Hang: the device waits for a receive from the other end that was posted" in str(result.failure)


def test_nccl_gets_few_thread_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(config=SimpleNamespace(max_ctas=32))
    groups: list[tuple[list[int], str, Any]] = []

    def new_group(ranks: list[int], backend: str, pg_options: Any = None) -> str:
        groups.append((ranks, backend, pg_options))
        return backend

    monkeypatch.setattr(remote.dist, "ProcessGroupNCCL", SimpleNamespace(Options=lambda: made), raising=False)
    monkeypatch.setattr(remote.dist, "new_group", new_group)
    monkeypatch.setattr(remote, "host_backend", lambda: "gloo")
    found = remote.make_groups(3, torch.device("cuda"))
    assert found == [("gloo", "nccl")] * 3 and made.config.max_ctas == 4
    assert groups == [x for k in range(3) for r in [[k, (k + 1) % 3]] for x in ((r, "gloo", None), (r, "nccl", made))]


@pytest.mark.parametrize(("given", "expected"), [(None, "EAGER"), ("LAZY", "LAZY")])
def test_ranks_load_their_code_before_a_run(monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str) -> None:
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_MODULE_LOADING", given)
    told = {}
    monkeypatch.setattr(supervisor, "supervise", lambda *_, **how: told.update(how["env"]) or Result(0))
    job = SimpleNamespace(
        engine=SimpleNamespace(layers_per_stage=None, sequence_parallel=1),
        stages=2,
        ranks=2,
        threads=1,
        timeline=None,
        outs=[],
        out=None,
    )
    monkeypatch.setattr(leader, "display_of", lambda _: nullcontext())
    monkeypatch.setattr(leader, "error_file", lambda _: None)
    assert leader.lead(job, Limits()) == 0
    assert told["CUDA_MODULE_LOADING"] == expected
