"""Memory that freed matrices leave behind while a model is loaded, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dualparal.models.heap import _malloc_trim

# Blocks of 16 MiB as a layer leaves them: freed one by one, each with a block behind it that stays.
HOLES = """
import ctypes, json
from pathlib import Path
from dualparal.models.heap import give_back
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, SIZE = ctypes.c_void_p, [ctypes.c_void_p], 16 << 20
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
libc.free(libc.malloc(30 << 20))  # from here on blocks of this size are kept
before, blocks = resident(), []
for _ in range(6):
    blocks.append(libc.malloc(SIZE))
    ctypes.memset(blocks[-1], 1, SIZE)
    libc.malloc(256 << 10)
for block in blocks:
    libc.free(block)
kept = resident() - before
give_back()
print(json.dumps([kept, resident() - before]))
"""


@pytest.mark.skipif(_malloc_trim() is None, reason="the C library has no malloc_trim")
def test_freed_blocks_go_back_to_the_system() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, env=env)
    kept, after = json.loads(done.stdout)
    assert kept > 64 << 20 and after < 8 << 20
