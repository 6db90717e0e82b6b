"""A rank that does not come is named, long before torch would give up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = """
import json, sys
from dualparal.distributed import mesh
mesh.JOIN_SECONDS = 3.0
try:
    mesh.Mesh.join("cpu")
except (TimeoutError, ValueError) as error:
    print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
"""


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({0: 3, 2: 3}, "TimeoutError: rank(s) [1] did not report within 3 s"),
        ({0: 3, 1: 2}, "ValueError: ranks disagree: world_size: rank 0 = 3, rank 1 = 2"),
    ],
)
def test_who_is_missing_is_named(tmp_path: Path, sizes: dict[int, int], expected: str) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size),
                 "DUALPARAL_RENDEZVOUS": str(tmp_path / "store")},
        )
        for rank, size in sizes.items()
    ]  # fmt: skip
    begin = time.monotonic()
    assert {json.loads(rank.communicate(timeout=100)[0]) for rank in ranks} == {expected}
    assert time.monotonic() - begin < 60 and [rank.returncode for rank in ranks] == [0, 0]
