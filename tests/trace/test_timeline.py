"""Timelines: every action once, in the schedule's order, with the times that the statistics add up.

Runs over several processes are in test_cli.py.
"""

from __future__ import annotations

import gzip
import json
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from dualparal.distributed import mesh
from dualparal.distributed.mesh import Mesh
from dualparal.engine.engine import Engine
from dualparal.schedule.actions import Action, Op, Unit
from dualparal.schedule.replay import bubble
from dualparal.schedule.schedule import Schedule
from dualparal.trace import picture
from dualparal.trace.clock import BusyClock
from dualparal.trace.stats import RankStats, RunStats, Waits, schedule_bubble
from dualparal.trace.timeline import STAGE, Recorder, TimelineError, merge, merge_left, parts_of, place, prepare, read
from engine_calls import embeds
from timeline_checks import check_order, spans

CALL = {"height": 32, "width": 32, "num_frames": 29, "num_inference_steps": 3}


@pytest.mark.parametrize("stages", [1, 3])
def test_every_action_is_there_in_the_schedules_order(
    engine: Callable[..., Engine], tmp_path: Path, stages: int
) -> None:
    built = engine(stages=stages, frames_per_block=2, context_frames=1)
    path = tmp_path / "new" / "run.json"
    for _ in built.stream(**embeds(built), **CALL, timeline=path):
        time.sleep(0.005)
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]  # the parts are in it now
    events = json.loads(path.read_text())["traceEvents"]
    assert list(read(path)) == events
    check_order(events, Schedule(stages, 3, 4, "cached", 1))
    names = {(place(e)[0], e["args"]["name"]) for e in events if e["name"] == "process_name"}
    assert names == {(stage, f"stage {stage}") for stage in range(stages)}
    rows = {e["args"]["name"] for e in events if e["name"] == "thread_name" and place(e)[0] == 0}
    assert len({(e["pid"], e["tid"]) for e in spans(events)}) == len({e["tid"] for e in spans(events)})
    assert rows == {"stage", "decode", "consumer"}
    assert [e["args"]["block"] for e in spans(events, "decode")] == [0, 1, 2, 3]
    assert all(e["dur"] > 5000 for e in spans(events, "consumer")) and len(spans(events, "consumer")) == 4
    assert built.stats is not None
    computed = sum(e["dur"] for e in spans(events, "compute")) / 1e6
    assert computed == pytest.approx(sum(rank.busy for rank in built.stats.ranks), rel=1e-4)
    if stages == 1:
        assert built.stats.schedule_bubble == 0.0 and "% (schedule 0.0 %)" in built.stats.summary()
    else:  # in turn in one process: the schedule speaks of something else
        assert built.stats.schedule_bubble is None and "schedule" not in built.stats.summary()


def test_no_timeline_leaves_nothing_and_the_same_bits(
    engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    built = engine(stages=2)
    call = {**embeds(built), **CALL, "output_type": "latent"}
    plain = built(**call).frames
    assert not list(tmp_path.iterdir())
    assert torch.equal(built(**call, timeline="run.json.gz").frames, plain)
    with gzip.open("run.json.gz", "rt") as file:
        assert spans(json.load(file)["traceEvents"], "compute")
    assert torch.equal(built(**call, timeline="run.json.gz").frames, plain)  # replaces the first


@pytest.mark.parametrize("how", ["fails", "closed", "interrupted", "never started"])
def test_a_run_that_ends_early_leaves_what_was_done(engine: Callable[..., Engine], tmp_path: Path, how: str) -> None:
    built = engine(stages=2, frames_per_block=2, context_frames=1)
    path = tmp_path / "run.json"

    def callback(engine: Engine, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        if how == "fails" and tensors["block"] == 1:
            raise RuntimeError("no more")
        if how == "interrupted" and tensors["block"] == 1:
            engine.interrupt()

    chunks = built.stream(**embeds(built), **CALL, timeline=path, callback_on_step_end=callback)
    if how == "never started":
        chunks.close()  # type: ignore[attr-defined]
        assert not list(tmp_path.iterdir())
        return
    if how == "fails":
        with pytest.raises(RuntimeError, match="no more"):
            list(chunks)
    elif how == "closed":
        next(chunks)
        chunks.close()  # type: ignore[attr-defined]
    else:
        list(chunks)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    events = json.loads(path.read_text())["traceEvents"]
    whole = [str(action) for action in Schedule(2, 3, 4, "cached", 1).actions(0)]
    done = [e["name"] for e in spans(events, row=STAGE) if place(e)[0] == 0]
    assert 5 < len(done) < len(whole) and done == whole[: len(done)]
    failed = [e["name"] for e in spans(events) if "error" in e["args"]]
    assert failed == (["update b1s0"] if how == "fails" else [])
    assert built.stats is None or built.stats.schedule_bubble is None


def test_a_run_that_cannot_begin_leaves_nothing(
    engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("a weight file is gone")

    built = engine()
    monkeypatch.setattr(built.parts, "load", broken)
    with pytest.raises(OSError, match="weight file"):
        list(built.stream(**embeds(built), **CALL, timeline=tmp_path / "run.json"))
    assert not list(tmp_path.iterdir())


def test_parts_are_joined_also_when_cut_and_the_missing_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.json.gz"
    parts_of(path).mkdir()
    (parts_of(path) / "rank-00000-of-00001.json").write_text("of an earlier run")
    prepare(path)
    for rank in (0, 2):
        recorder = Recorder(path, rank, 4, offset=1.0)
        track = recorder.track(rank, 4)
        track.action(STAGE, Action(Op.RECV, rank, Unit(0, 0, 0)), 2.0, 2.5, waited=0.25)
        recorder.close()
        track.decode(0, 0, 3.0, 4.0)  # too late: nobody may write to another file that has its number by now
    with open(parts_of(path) / "rank-00002-of-00004.json", "a") as file:
        file.write('{"ph":"X","pid":2,"na')
    merge_left(path)
    assert "ranks [1, 3]" in caplog.text
    events = list(read(path))
    assert [(place(e)[0], e["cat"], e["ts"], e["dur"]) for e in spans(events)] == [
        (stage, kind, 3e6, duration) for stage in (0, 2) for kind, duration in (("receive", 5e5), ("wait", 2.5e5))
    ]
    merge_left(path)  # nothing left to join
    with pytest.raises(TimelineError, match="no parts"):
        merge(path)


def test_a_full_disk_ends_the_timeline_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.json"
    recorder = Recorder(path)
    track = recorder.track(0, 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dualparal.trace.timeline.os.write", full)
    for block in range(3):
        track.decode(0, block, 0.0, 1.0)
    assert caplog.text.count("No space left on device") == 1


@pytest.mark.parametrize("name", ["run.txt", "run", "run.gz", "folder.json"])
def test_names_that_no_timeline_has(engine: Callable[..., Engine], tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.json").mkdir()
    built = engine()
    with pytest.raises(TimelineError, match=name):
        built.stream(**embeds(built), **CALL, timeline=tmp_path / name)


def _timeline(path: Path, units: int) -> None:
    prepare(path)
    recorder = Recorder(path)
    for stage in range(2):
        track = recorder.track(stage, 2)
        for number in range(units):
            track.action(STAGE, Action(Op.RUN, stage, Unit(number, 0, 0)), number, number + 0.8)
    recorder.close()
    merge(path)


def test_the_picture_has_a_colour_per_block(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    _timeline(path, 4)
    drawn = picture.draw(path)
    assert drawn == tmp_path / "run.png" == picture.picture_of(tmp_path / "run.json.gz")
    colours, counts = np.unique(np.asarray(Image.open(drawn).convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    many = {tuple(colour.tolist()) for colour, count in zip(colours, counts) if count > 5000}
    # white, and matplotlib's blue, orange, green and red
    assert many == {(255, 255, 255), (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)}


def test_the_picture_of_a_long_run_shows_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    _timeline(path, 100)
    monkeypatch.setattr(picture, "LIMIT", 20)
    bars, more = picture._bars(path)
    assert more and [bar.block for bar in bars] == [number for number in range(10) for _ in range(2)]
    assert {bar.row for bar in bars} == {(0, STAGE), (1, STAGE)}


def test_pictures_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    _timeline(path, 0)
    with pytest.raises(TimelineError, match="nothing was done"):
        picture.draw(path)
    path.write_text("{}")
    with pytest.raises(TimelineError, match="not a timeline"):
        picture.draw(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TimelineError, match=r"dualparal\[timeline\]"):
        picture.draw(path)


# A GPU's clock, without a GPU -------------------------------------------------------------------------------------


class FakeGpu:
    """Events that are done when ``now`` has reached them, on a device that runs ``lag`` seconds behind the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.lag = 0.0
        self.waits = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now + gpu.lag

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self) -> None:
                gpu.waits += 1
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end: Any) -> float:
                assert self.query() and end.query(), "a real event would raise"
                return float(torch.tensor(1000 * (end.at - self.at), dtype=torch.float32))

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr("dualparal.trace.clock.time.perf_counter", lambda: gpu.now)


def test_on_a_gpu_spans_are_the_devices_and_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    path = tmp_path / "run.json"
    recorder = Recorder(path)
    clock = BusyClock(torch.device("cuda"), recorder.track(0, 2))
    gpu.waits = 0
    gpu.lag = 3.0
    units = 200
    for number in range(units):
        unit = Unit(number, 0, 0)
        with clock.on(Action(Op.RECV, 0, unit), lambda: 0.0):
            gpu.now += 0.25
        with clock.on(Action(Op.RUN, 0, unit), lambda: 0.0), clock:
            gpu.now += 1.5
    assert gpu.waits == 0, "no wait for the device in steady state"
    assert len(clock._spans) <= 6  # what the device has done is written at once
    clock.settle()
    assert clock.seconds == pytest.approx(1.5 * units)
    recorder.close()
    merge(path)
    events = list(read(path))
    device, host = spans(events, row=0), spans(events, row=1)
    assert len(device) == len(host) == 2 * units
    for there, here in zip(device, host):
        assert there["name"] == here["name"]
        # float32 milliseconds would be off by 16 us after 200 s
        assert there["ts"] - here["ts"] == pytest.approx(3e6, abs=8)
        assert there["dur"] == pytest.approx(here["dur"], abs=8)
    assert all("flow_in" in e for e in device if e["cat"] == "receive") and not any("flow_in" in e for e in host)


# Clocks of several machines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.0), (5.0, -5.0), (-0.5, 0.5)])
def test_clocks_are_set_against_each_other_where_they_differ(
    monkeypatch: pytest.MonkeyPatch, shift: float, expected: float
) -> None:
    lines: dict[str, queue.Queue[float]] = {name: queue.Queue() for name in ("0", "1")}
    true_clock = time.perf_counter

    def send(tensor: torch.Tensor, peer: int) -> None:
        lines[str(peer)].put(tensor.item())

    def recv(tensor: torch.Tensor, peer: int) -> None:
        tensor[0] = lines[threading.current_thread().name].get(timeout=30)

    monkeypatch.setattr(dist, "send", send)
    monkeypatch.setattr(dist, "recv", recv)
    clock = lambda: true_clock() + (shift if threading.current_thread().name == "1" else 0.0)  # noqa: E731
    monkeypatch.setattr(mesh.time, "perf_counter", clock)
    found: dict[int, float] = {}

    def rank(number: int) -> None:
        found[number] = Mesh(number, 2, 2, torch.device("cpu"), distributed=True).clock_offset()

    threads = [threading.Thread(target=rank, args=(number,), name=str(number)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == 0.0
    assert found[1] == (pytest.approx(expected, abs=0.1) if expected else 0.0)


# The closing line -------------------------------------------------------------------------------------------------


def test_the_closing_line_has_both_bubbles() -> None:
    assert schedule_bubble(Schedule(2, 3, 4)) == pytest.approx(bubble(Schedule(2, 3, 4)))
    assert schedule_bubble(Schedule(2, 3, None)) is None
    assert schedule_bubble(Schedule(8, 50, 10_000)) is None  # hours of video: minutes of replay
    stats = RunStats(4, 29, 2.0, 1.0, (), schedule_bubble=0.125)
    assert "bubble 0.0 % (schedule 12.5 %), peak" in stats.summary()


def _stats(*ranks: tuple[float, float, float, float], expected: float | None = None) -> RunStats:
    """Of a run of 10 s; of each rank the seconds computing, and waiting for stages, decoder and consumer."""
    rows = tuple(RankStats(busy, 10.0, 0, 0, Waits(*waits)) for busy, *waits in ranks)
    return RunStats(4, 29, 10.0, 1.0, rows, expected)


@pytest.mark.parametrize(
    ("stats", "bound"),
    [
        (_stats((2.0, 0.5, 7.0, 0.2), (2.5, 7.0, 0, 0)), "Bound by the decoder: decode on more"),
        (_stats((2.0, 0.5, 1.5, 5.0), (2.5, 7.0, 0, 0)), "Bound by the consumer of the chunks: take"),
        (_stats((3.0, 6.5, 0.2, 0.2), (9.0, 0.7, 0, 0)), "Bound by rank 1, which computes 1.5 times as long as the"),
        (_stats((9.0, 0.5, 0.2, 0.2), (9.1, 0.7, 0, 0)), "Bound by computing: use more stages"),
        (_stats((4.0, 5.5, 0.2, 0.2), (4.1, 5.7, 0, 0), expected=0.55), "Bound by the schedule's own bubble: make"),
        (_stats((4.0, 5.5, 0.2, 0.2), (4.1, 5.7, 0, 0), expected=0.1), "Bound by waits between stages: use"),
    ],
)
def test_the_closing_line_names_what_bound_the_run(stats: RunStats, bound: str) -> None:
    assert " GiB. Computing/waiting for stages/decoder/consumer in %, by rank: " in stats.summary()
    assert stats.summary().split("%, by rank: ")[1].split(". ", 1)[1].startswith(bound)
    rank = stats.ranks[0]
    shares = "/".join(f"{10 * seconds:.0f}" for seconds in (rank.busy, *rank.waits))
    assert f"by rank: {shares}; " in stats.summary()
    assert RankStats.from_list(rank.to_list()) == rank


def test_waits_for_the_decoder_and_the_consumer_are_measured(engine: Callable[..., Engine]) -> None:
    """A decoder that sleeps, then a consumer that does."""
    built = engine(frames_per_block=2, context_frames=1)
    call: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 25, "num_inference_steps": 2, **embeds(built)}
    for chunk in built.stream(**{**call, "output_type": "latent"}):
        time.sleep(0.1 * (chunk.block < 3))
    assert built.stats is not None
    waits = built.stats.ranks[0].waits
    assert 0.3 <= waits.consumer < built.stats.seconds and waits.decoder == 0.0
    assert "Bound by the consumer" in built.stats.summary()

    def slow(make: Callable[..., Any]) -> Callable[..., Any]:
        def push(self: Any, latents: torch.Tensor) -> Any:
            time.sleep(0.3)
            return make(self, latents)

        return push

    with pytest.MonkeyPatch.context() as patched:
        kind = type(built.parts.decoders(1)[0])
        patched.setattr(kind, "push", slow(kind.push))
        list(built.stream(**call, output_type="uint8"))
    waits = built.stats.ranks[0].waits
    assert 0.3 <= waits.decoder < built.stats.seconds and waits.consumer < 0.1
    assert "Bound by the decoder" in built.stats.summary()


def test_units_are_told_before_the_first_chunk(engine: Callable[..., Engine]) -> None:
    told: list[tuple[int, int | None]] = []
    decoded: list[float] = []

    def report(phase: str, **where: Any) -> None:
        if "units" in where:
            assert (phase, where["stage"]) == ("run", 0)
            told.append((where["units"], where["total_units"]))
        assert ("decoding" in where) == ("busy" in where and where["stage"] == 0)
        decoded.append(where.get("decoding", 0.0))

    built = engine(stages=2, frames_per_block=2, context_frames=1, report=report)
    stream = built.stream(**CALL, **embeds(built), output_type="uint8")
    next(stream)
    before = len(told)
    rest = list(stream)
    (total,) = {total for _, total in told}
    assert [done for done, _ in told] == list(range(total or 0)) and total and rest
    # Not `before < total`: the stages do not wait for the decode thread, which a busy machine may start late.
    assert before > 3
    assert max(decoded) > 0
