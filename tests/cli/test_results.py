"""Files of a run: a block is written while the next one is made, and nothing says that it is there before it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualparal.cli import results
from dualparal.cli.rank import _take
from dualparal.cli.results import Results
from dualparal.decoding.chunks import Chunk, Progress
from dualparal.io.receipts import Receipt

SECONDS = 20.0  # after which something hangs


class SlowOutput:
    """Writes a block when it may, and keeps the order in which it was asked to."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.path, self.missing, self.before = Path("a.mp4"), list[int](), before
        self.written: list[int] = []
        self.joined = 0

    def write(self, block: int, frames: Any) -> Receipt:
        self.before(block)
        self.written.append(block)
        return Receipt(len(frames), f"block {block}")

    def close(self) -> int:
        self.joined += 1
        return len(self.written)

    def remove_blocks(self) -> None:
        pass


class Said:
    """What a rank tells its parent."""

    def __init__(self) -> None:
        self.committed: list[int] = []

    def message(self, committed: int | None = None, **fields: Any) -> None:
        if committed is not None:
            self.committed.append(committed)


@pytest.fixture
def open_results(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Results, SlowOutput]]:
    def opened(before: Callable[[int], None], **more: Any) -> tuple[Results, SlowOutput]:
        output = SlowOutput(before)
        monkeypatch.setattr(results, "open_output", lambda *_: output)
        job = {"prompts": ["a"], "outs": [output.path], "fps": 16.0, "receipts": None, "resume": False}
        left = {"latents_out": None, "checkpoint": None, "keep_blocks": False, "restartable": False}
        return Results(SimpleNamespace(**job, **left, **more)), output  # type: ignore[arg-type]

    return opened


def chunk(block: int) -> Chunk:
    return Chunk(block, 4 * block, [None] * 4, torch.zeros(1, 1, 1, 1, 1), Progress(3, 12, 3, 12, 1.0, 1.0, 0.0), 0)


def test_the_next_block_is_made_while_one_is_written(open_results: Any) -> None:
    asked = [threading.Event() for _ in range(4)]
    found, output = open_results(lambda block: asked[block + 1].wait(SECONDS) or pytest.fail("the run stood still"))

    def run() -> Iterator[Chunk]:
        for block in range(3):
            asked[block].set()
            yield chunk(block)
            assert output.written == list(range(block))  # one at a time, in order
        asked[3].set()

    said = Said()
    _take(run(), found, None, said)  # type: ignore[arg-type]
    assert output.written == said.committed == [0, 1, 2]


def test_a_snapshot_waits_for_the_block_that_is_being_written(open_results: Any) -> None:
    go = threading.Event()
    found, output = open_results(lambda _: go.wait(SECONDS))
    told: list[list[int]] = []
    found.take(chunk(0), lambda: told.append(list(output.written)))
    assert not told and not found.written
    threading.Timer(0.1, go.set).start()
    assert found.receipts(1) == [[Receipt(4, "block 0")]]
    assert told == [[0]] and found.written


@pytest.mark.parametrize("broken", [0, 2])  # 2: the last
def test_a_block_that_cannot_be_written_ends_the_run(open_results: Any, broken: int) -> None:
    def refuse(block: int) -> None:
        if block == broken:
            raise OSError("no space left")

    found, output = open_results(refuse)
    said = Said()
    with pytest.raises(OSError, match="no space left"):
        _take(map(chunk, range(3)), found, None, said)  # type: ignore[arg-type]
    assert output.written == said.committed == list(range(broken))
    found.close_after_failure(join=True)
    assert output.joined == 1


def test_a_run_that_fails_leaves_its_last_block_whole(open_results: Any, caplog: pytest.LogCaptureFixture) -> None:
    go = threading.Event()

    def before(block: int) -> None:
        go.wait(SECONDS)
        if block == 1:
            raise OSError("no space left")

    for blocks in (1, 2):
        found, output = open_results(before)
        for block in range(blocks):
            found.take(chunk(block), lambda: None)
            go.set()
        found.close_after_failure(join=False)
        assert output.written == [0] and not output.joined
    assert "the last block was not written: no space left" in caplog.text
