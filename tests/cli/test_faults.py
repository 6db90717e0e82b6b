"""Faults in whole runs of the real engine: what is said, with which exit code, and what is left on disk.

Processes without torch show the same for the supervisor alone, many times over: `test_supervisor.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cli_runs import decode
from dualparal.config.engine import EngineConfig
from dualparal.config.video import VideoConfig
from dualparal.decoding.chunks import NonFiniteError
from dualparal.engine import capacity
from dualparal.engine.capacity import TooLarge
from dualparal.engine.engine import Engine
from dualparal.launch.blame import Limits
from dualparal.launch.stragglers import ITERATIONS, SlowStages
from dualparal.launch.supervisor import Kept, Result, supervise
from dualparal.models.registry import model_sizes
from dualparal.planning.workload import Workload
from dualparal.runtime.nonfinite import FirstMark, Origin, mark
from dualparal.runtime.stage import Stage, UnitPlan
from dualparal.schedule.actions import Unit
from engine_calls import embeds
from places import WORKERS

WORKER = WORKERS / "faulty_cli.py"
LIMITS = Limits(heartbeat=2.0, progress=60.0, startup=120.0, grace=5.0)
SIZE = {"height": 32, "width": 32}
PROMPT = "a private prompt"
RUN = [
    "generate", "--prompt", PROMPT, "--device", "cpu", "--height", "32", "--width", "32", "--steps", "2",
    "--frames-per-block", "2", "--context-frames", "1", "--guidance-scale", "1", "--threads", "1",
]  # fmt: skip


class Run:
    """Ranks of the command line, two by default, a fault in one of them."""

    def __init__(
        self, folder: Path, model: Path, fault: str, frames: int = 801, more: tuple[str, ...] = (), ranks: int = 2,
        places: int = 1, **env: str,
    ) -> None:  # fmt: skip
        self.out = folder / "a.mp4"
        self.messages: list[tuple[float, int, dict[str, Any]]] = []
        self.known_at: float | None = None
        logger, handler = logging.getLogger("dualparal"), logging.Handler()
        self.warnings: list[str] = []
        handler.emit = self._log  # type: ignore[method-assign]
        logger.addHandler(handler)
        slow, committed = SlowStages(2, places), []

        def hear(rank: int, message: dict[str, Any]) -> None:
            self.messages.append((time.monotonic(), rank, message))
            if "busy" in message:
                slow.note(rank, message["iteration"], message["busy"], message.get("decoding", 0.0))
            if "committed" in message:
                committed.append(message["committed"])

        try:
            self.result: Result = supervise(
                [sys.executable, str(WORKER), *RUN, "--model", str(model), "--num-frames", str(frames),
                 "--out", str(self.out), *more],
                ranks,
                limits=LIMITS,
                env={"OMP_NUM_THREADS": "1", "FAULT": fault, **env},
                on_message=hear,
                error_path=folder / "error.json",
                kept=lambda: Kept(committed[-1] if committed else None, "dualparal generate --resume x"),
            )  # fmt: skip
        finally:
            logger.removeHandler(handler)
        self.ended_at = time.monotonic()
        assert not psutil.Process().children(recursive=True)
        self.committed = committed
        self.error = json.loads((folder / "error.json").read_text()) if self.result.failure else None

    def _log(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())
        if record.levelno >= logging.ERROR:
            self.known_at = time.monotonic()

    def struck_at(self, rank: int, block: int) -> float:
        """When the faulty rank said that it begins the block."""
        return next(
            at for at, who, m in self.messages if who == rank and m.get("phase") == "run" and m["block"] >= block
        )

    def check(self, rank: int, exit_code: int, *words: str, role: str = "") -> None:
        text = str(self.result.failure)
        assert self.result.exit_code == exit_code, text
        headline = text.splitlines()[0]
        assert headline.startswith(f"rank {rank} ({role or f'stage {rank}'}) failed at block "), text
        for word in words:
            assert word in headline, text
        assert f"last block on disk: {self.committed[-1]}" in text and "resume with: dualparal" in text
        assert self.error is not None
        fields = {"rank", "stage", "block", "step", "phase", "cause", "hint", "last_committed_block", "resume_command"}
        assert fields <= set(self.error) and self.error["message"] == text
        assert self.error["last_committed_block"] == self.committed[-1]
        assert PROMPT not in json.dumps(self.error) and PROMPT not in "".join(self.warnings)
        segments = sorted(self.out.with_name("a.mp4.blocks").glob("block-*.mp4"))
        # A block may have been finished whose report the fault cut off.
        assert len(segments) in (len(self.committed), len(self.committed) + 1)
        assert [decode(path) for path in segments] == [5] + [8] * (len(segments) - 1)
        # Nothing half-written but what its writer was killed at, which a resumed run clears away: the next block, or
        # the list of those that are whole.
        begun = ([], [f"block-{len(segments):06d}.mp4.tmp"], ["playlist.m3u.tmp"])
        assert [path.name for path in self.out.parent.rglob("*.tmp")] in begun


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("fault", "rank"), [("kill", 0), ("segv", 1)])
def test_a_dead_rank_is_named_though_no_transport_says_so(tmp_path: Path, wan21: Path, fault: str, rank: int) -> None:
    run = Run(tmp_path, wan21, f"{fault}:{rank}", FAULT_DEAF="1", FAULT_BLOCK="6")
    run.check(rank, 3, "killed by SIG" + fault.upper(), "phase 'run'")
    assert run.known_at is not None
    assert run.known_at - run.struck_at(rank, 6) < 1.0
    assert run.ended_at - run.struck_at(rank, 6) < 5.0


def test_a_stopped_rank_is_named_though_no_transport_says_so(tmp_path: Path, wan21: Path) -> None:
    run = Run(tmp_path, wan21, "stop:1", FAULT_DEAF="1", FAULT_BLOCK="6")
    run.check(1, 4, "no heartbeat for 2.")
    assert run.known_at is not None
    assert run.known_at - run.struck_at(1, 6) < LIMITS.heartbeat + 1.0
    assert run.ended_at - run.struck_at(1, 6) < LIMITS.heartbeat + 5.0


DECODERS: dict[str, Any] = {"more": ("--decode-gpus", "2"), "ranks": 3, "FAULT_BLOCK": "6"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("kill", 3, ("killed by SIGKILL", "phase 'decode'")),
        ("stop", 4, ("no heartbeat for 2.",)),
    ],
)
def test_a_rank_that_decodes_is_named_by_its_role(
    tmp_path: Path, wan21: Path, fault: str, code: int, words: tuple[str, ...]
) -> None:
    run = Run(tmp_path, wan21, f"{fault}:2", **DECODERS)
    run.check(2, code, *words, role="decoder 1")
    assert run.committed == list(range(6)) or run.committed == list(range(5))  # the last one on its way out
    assert run.error is not None and run.error["decoder"] == 1 and run.error["stage"] is None


def test_a_rank_that_shares_a_stage_is_named_by_its_place(tmp_path: Path, wan21: Path) -> None:
    """Not the one that waits for it in the same unit."""
    size = ("--height", "128", "--width", "128", "--num-frames", "61")
    more = (*size, "--sequence-parallel", "2", "--stages", "2")
    run = Run(tmp_path, wan21, "kill:3", more=more, ranks=4, places=2, FAULT_BLOCK="4")
    text, code = str(run.result.failure), run.result.exit_code
    assert code == 3 and text.startswith("rank 3 (stage 1, place 1) failed at block 4, step 0, phase 'run': killed by")
    assert run.error is not None and (run.error["stage"], run.error["place"]) == (1, 1)


def test_nan_of_a_rank_that_decodes_is_named_by_its_role(tmp_path: Path, wan21: Path) -> None:
    run = Run(tmp_path, wan21, "broken:2", **DECODERS)
    run.check(0, 6, "NonFiniteError: the frames of block 6 hold NaN, first in decoder 1 (rank 2); it is not given out")
    assert run.committed == list(range(6))


def test_a_decoder_beside_a_stage_that_fails_ends_its_rank(tmp_path: Path, wan21: Path) -> None:
    run = Run(tmp_path, wan21, "decoder:1", more=("--decode-in-place",), FAULT_BLOCK="6")
    run.check(1, 3, "MemoryError: no room for the rows")


def test_the_cause_is_the_headline_and_not_who_lost_a_peer(tmp_path: Path, wan21: Path) -> None:
    run = Run(tmp_path, wan21, "oom:1", FAULT_BLOCK="6")
    run.check(1, 3, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "hint: use smaller blocks" in str(run.result.failure)
    assert "edge" not in str(run.result.failure)


def test_nan_stops_the_run_before_its_block_and_names_its_origin(tmp_path: Path, wan21: Path) -> None:
    run = Run(tmp_path, wan21, "nan:1", FAULT_BLOCK="6", FAULT_DECODE_SECONDS="0.3")
    run.check(0, 6, "NonFiniteError", "first in stage 1 at block 6, step 1", "not given out")
    assert run.committed == list(range(6))  # some of which were still to be decoded
    assert not (tmp_path / "a.mp4.blocks" / "block-000006.mp4").exists()


def test_a_message_out_of_order_is_an_error_that_names_both_ends(tmp_path: Path, wan21: Path) -> None:
    run = Run(tmp_path, wan21, "order:0", FAULT_BLOCK="6")
    run.check(1, 3, "TransportError: edge 0 -> 1: ", "arrives where the schedule says")


def test_a_slow_stage_is_named_once(tmp_path: Path, wan21: Path) -> None:
    run = Run(tmp_path, wan21, "slow:1", frames=61, FAULT_UNIT_SECONDS="0.08")
    assert run.result == Result(0)
    slow = [text for text in run.warnings if "times as long" in text]
    assert len(slow) == 1 and slow[0].startswith("stage 1 (rank 1) takes ")


def test_even_stages_give_no_warning_and_a_slow_reader_stops_the_pipeline(tmp_path: Path, wan21: Path) -> None:
    run = Run(tmp_path, wan21, "reader:0", frames=61, FAULT_UNIT_SECONDS="0.05")
    assert run.result == Result(0) and run.warnings == []
    times = [at for at, rank, message in run.messages if rank == 1 and message.get("phase") == "run"]
    longest, began = max((later - at, at) for at, later in itertools.pairwise(times))
    assert longest > 1.5, "rank 1 had nothing to do while the consumer was away"
    # What it still did after rank 0 stopped: the units in two buffers of depth 2, not the rest of the video.
    assert sum(at > began for at in times) > 5
    assert decode(run.out) == 61


# What ranks say of their speed --------------------------------------------------------------------------------------


def feed(slow: SlowStages, seconds: list[list[float]], lost: tuple[int, int] | None = None) -> int | None:
    """seconds: of each iteration, per stage."""
    totals = [0.0] * len(seconds[0])
    for iteration, row in enumerate(seconds):
        for stage, more in enumerate(row):
            totals[stage] += more
            if (iteration, stage) != lost:
                slow.note(stage, iteration, totals[stage])
    return slow.warned


@pytest.mark.parametrize(
    ("row", "count", "named"),
    [
        ([1.0, 3.0], ITERATIONS, 1),
        ([1.0, 3.0], ITERATIONS - 1, None),
        ([1.0, 1.4], 20, None),
        ([1.0, 1.0, 1.6, 1.0], ITERATIONS, 2),
        ([0.001, 0.003], 20, None),  # too little to matter
        ([1.0], 20, None),
    ],
)
def test_slow_is_half_as_long_again_in_a_row(
    row: list[float], count: int, named: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert feed(SlowStages(len(row)), [row] * count) == named
    assert len(caplog.records) == (named is not None)


@pytest.mark.parametrize(("decoding", "named"), [(0.0, 0), (0.3, 0), (2.0, None), (2.9, None)])
def test_a_stage_beside_its_decoder_is_not_blamed(decoding: float, named: int | None) -> None:
    """Nor is another one, which is as quick as it ever was."""
    slow = SlowStages(2)
    for iteration in range(1, 9):
        slow.note(0, iteration, 3.0 * iteration, decoding * iteration)
        slow.note(1, iteration, 1.0 * iteration)
    assert slow.warned == named


def test_slow_now_and_then_is_not_slow() -> None:
    assert feed(SlowStages(2), [[1.0, 3.0], [1.0, 3.0], [1.0, 1.0]] * 9) is None


def test_a_lost_report_is_made_up_for_by_the_next() -> None:
    assert feed(SlowStages(2), [[1.0, 3.0]] * (ITERATIONS + 1), lost=(1, 0)) == 1


# NaN in one process -------------------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, stage: int, unit: tuple[int, int], value: float) -> None:
    computed = Stage.run
    seen: list[Stage] = []

    def run(self: Stage, hidden: torch.Tensor, plan: UnitPlan) -> torch.Tensor:
        result = computed(self, hidden, plan)
        if self not in seen:
            seen.append(self)  # stage k is the k-th to run
        if seen.index(self) == stage and (plan.unit.block, plan.unit.step) == unit:
            result = result.clone()  # outside of inference mode
            result.view(-1)[3] = value
        return result

    monkeypatch.setattr(Stage, "run", run)


@pytest.mark.parametrize(
    ("stages", "stage", "value"), [(1, 0, float("nan")), (3, 1, float("inf")), (3, 2, -float("inf"))]
)
def test_the_first_stage_and_step_are_named(
    monkeypatch: pytest.MonkeyPatch, wan21: Path, stages: int, stage: int, value: float
) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", frames_per_block=2, context_frames=1, stages=stages)
    poison(monkeypatch, stage, (3, 1), value)
    with pytest.raises(NonFiniteError, match=f"first in stage {stage} at block 3, step 1; it is not given out"):
        engine(**embeds(engine), num_frames=61, num_inference_steps=3, output_type="latent", **SIZE)


def test_nonfinite_blocks_can_be_had(
    monkeypatch: pytest.MonkeyPatch, wan21: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"device": "cpu", "frames_per_block": 2, "context_frames": 1}
    engine = Engine.from_pretrained(wan21, allow_nonfinite=True, **options)
    poison(monkeypatch, 0, (2, 1), float("nan"))
    made = engine(**embeds(engine), num_frames=29, num_inference_steps=2, output_type="latent", **SIZE).frames
    assert made.isnan().any() and made.shape[2] == 8
    assert "first in stage 0 at block 2, step 1" in caplog.text


def test_nan_that_a_callback_made_is_not_blamed_on_a_stage(wan21: Path) -> None:
    def callback(_: Engine, step: int, timestep: torch.Tensor, state: dict[str, Any]) -> dict[str, Any] | None:
        return {"latents": state["latents"] * float("nan")} if (state["block"], step) == (1, 0) else None

    engine = Engine.from_pretrained(wan21, device="cpu", frames_per_block=2, context_frames=1, stages=2)
    with pytest.raises(NonFiniteError, match=r"first in the latents .* at block 1, step 1"):
        engine(
            **embeds(engine), num_frames=29, num_inference_steps=2, output_type="latent",
            callback_on_step_end=callback, **SIZE,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("origin", [Origin(0, 0, 0, 0), Origin(3, 2**30, 9999, 253), Origin(1, 5, 0, None)])
def test_marks_keep_the_first_origin(dtype: torch.dtype, origin: Origin) -> None:
    first = FirstMark(torch.device("cpu"))
    good, bad = torch.ones(4, dtype=dtype), torch.tensor([1.0, float("nan")], dtype=dtype)
    unit = Unit(origin.block, origin.step, 0, origin.video)
    first.take(Unit(9, 9, 0), mark(good, mark(good, None, None), 0))
    assert first.origin() is None
    found = mark(bad, mark(bad if origin.stage is None else good, None, None), origin.stage or 0)
    first.take(unit, mark(bad, found, 254))
    first.take(Unit(7, 7, 0), mark(bad, mark(good, None, None), 1))
    assert first.origin() == origin


# Requests that cannot fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        {"height": 16384, "width": 16384, "num_frames": 81},
        {"num_frames": 100_000_000 - 3, "result_kind": "frames", **SIZE},
        {"num_frames": 100_000_000 - 3, "result_kind": "latents", "output_type": "latent", **SIZE},
    ],
)
def test_a_request_that_cannot_fit_is_refused_with_its_size(
    wan21: Path, monkeypatch: pytest.MonkeyPatch, call: dict[str, Any]
) -> None:
    monkeypatch.setattr(capacity, "host_memory", lambda: 32 * 2**30)
    engine = Engine.from_pretrained(wan21, device="cpu")
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(TooLarge, match=r"need about [\d.]+ GiB \(\d{11,} bytes.* this machine has 32.0"):
        engine.stream("a cat", **call)
    assert time.monotonic() - begin < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024, "KiB"


def test_every_prompt_counts(wan21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos made in one call hold features each of their own: forty do not fit where one does."""
    engine = Engine.from_pretrained(wan21, device="cpu")
    monkeypatch.setattr(capacity, "host_memory", lambda: 100 * 2**20)
    call = {"num_frames": 801, "height": 64, "width": 64, "output_type": "latent"}
    engine.stream("a cat", **call)
    with pytest.raises(TooLarge, match=r"40 videos of 801 frames of 64x64"):
        engine.stream(["a cat"] * 40, **call)


def test_a_whole_video_counts_its_frames(wan21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu")
    monkeypatch.setattr(capacity, "host_memory", lambda: 2**30)
    with pytest.raises(TooLarge, match="kept whole"):
        engine("a cat", num_frames=100_001, **SIZE)
    engine.stream("a cat", num_frames=100_001, **SIZE)  # whoever reads on the way may have any length


def test_the_text_encoder_counts_where_it_is_needed(wan21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(wan21, device="cpu", stages=2)
    work = Workload(
        model_sizes(str(wan21)), VideoConfig(32, 32, 9, output_type="latent"), EngineConfig(dtype="float32")
    )
    larger = dataclasses.replace(work, model=dataclasses.replace(work.model, text_encoder=2**29))
    monkeypatch.setattr(capacity, "host_memory", lambda: 2**30)
    capacity.check(larger, [2, 2], [0, 1], engine.mesh.device, encodes=False)
    with pytest.raises(TooLarge, match=r"need about 2\.0 GiB"):
        capacity.check(larger, [2, 2], [0, 1], engine.mesh.device)


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "some").write_text("1073741824\n")
    everything = psutil.virtual_memory().total
    for names, expected in ((["max", "none"], everything), (["none", "some"], min(everything, 2**30))):
        monkeypatch.setattr(capacity, "_CGROUP_LIMITS", [str(tmp_path / name) for name in names])
        assert capacity.host_memory() == expected


# Processes of the command line --------------------------------------------------------------------------------------


class Command:
    """`dualparal generate` of a long video, some blocks of which are on disk."""

    def __init__(
        self, folder: Path, model: Path, *flags: str, temporary: Path | None = None, decode_seconds: float = 0.0
    ) -> None:
        folder.mkdir()
        self.folder, self.blocks = folder, folder / "a.mp4.blocks"
        self.log = folder / "stderr.txt"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), *RUN, "--model", str(model), "--num-frames", "20001",
                 "--out", str(folder / "a.mp4"), *flags],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(temporary or folder), "FAULT_DECODE_SECONDS": str(decode_seconds)},
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while len(self.segments()) < 3:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.ranks = [child for child in children if "RANK" in child.environ()]

    def segments(self) -> list[Path]:
        return sorted(self.blocks.glob("block-*.mp4"))

    def alive(self) -> list[psutil.Process]:
        found = []
        for rank in self.ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                if rank.status() != psutil.STATUS_ZOMBIE:
                    found.append(rank)
        return found

    def wait_until_gone(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.alive()


@pytest.fixture
def command(tmp_path: Path, wan21: Path) -> Any:
    started: list[Command] = []

    def start(*flags: str, **more: Any) -> Command:
        started.append(Command(tmp_path / f"run{len(started)}", wan21, *flags, **more))
        return started[-1]

    yield start
    for each in started:
        for process in each.ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        each.process.kill()
        each.process.wait()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
def test_a_full_disk_ends_the_run_and_finished_blocks_play(command: Any) -> None:
    run = command()
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
    code = run.process.wait(60)
    assert code == 5, run.log.read_text()
    told = run.log.read_text()
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "cannot read or write: [Errno 27] File too large: " in errors[0], told
    assert str(run.blocks) in errors[0]
    segments = run.segments()
    assert len(segments) >= 3 and [decode(path) for path in segments] == [5] + [8] * (len(segments) - 1)
    assert not list(run.folder.rglob("*.mp4.tmp"))
    assert "Traceback" not in told and PROMPT not in told


def test_a_second_signal_ends_one_process_at_once(command: Any) -> None:
    run = command(decode_seconds=1.0)  # so that what is finished takes seconds to be given out
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert run.process.poll() is None
    begin = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(5) == 130
    assert time.monotonic() - begin < 0.5
    assert all(decode(path) for path in run.segments())


def test_no_rank_outlives_a_killed_parent_and_the_next_run_starts_and_ends_at_once(command: Any) -> None:
    run = command("--stages", "2")
    run.ranks[0].suspend()  # the other one waits for it in a receive
    time.sleep(0.3)
    run.process.kill()
    run.process.wait()
    assert run.wait_until_gone(5.0)
    assert all(decode(path) for path in run.segments())
    deadline = time.monotonic() + 10
    while list(run.folder.glob("dualparal-*")) and time.monotonic() < deadline:  # where its ranks met
        time.sleep(0.05)
    assert not list(run.folder.glob("dualparal-*"))
    again = command("--stages", "2", temporary=run.folder)
    again.ranks[1].suspend()  # now rank 0 waits in a receive, and a block boundary never comes
    again.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert again.process.poll() is None and again.alive()
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(30) == 143  # how soon: test_supervisor.py
    assert again.wait_until_gone(0.5)
