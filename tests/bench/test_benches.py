"""Benches run, keep rows that say where they come from, and their curves can be drawn."""

from __future__ import annotations

import csv
import importlib
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import record
from harness.shapes import Shape
from PIL import Image

from dualparal.models.wan.tiny import build_tiny_pipeline
from places import BENCH, DOCS, ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModuleType]:
    """Runs a bench in this process; rows go to ``tmp_path``."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def run(name: str, *arguments: str, **changes: Any) -> ModuleType:
        module = importlib.import_module(name)
        for attribute, value in changes.items():
            monkeypatch.setattr(module, attribute, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        module.main()
        return module

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_say_where_they_come_from_and_columns_may_be_added(
    bench: Callable[..., ModuleType], tmp_path: Path
) -> None:
    (tmp_path / "some.csv").write_text("what,ms,date,torch\nold,1.5,2026-01-01,2.7\n")
    record.record("some", [{"what": "new", "rival": "x", "ms": 2}], "cpu")
    record.record("some", [], "cpu")
    old, new = rows(tmp_path / "some.csv")
    assert list(old) == ["what", "ms", "date", "torch", "rival", "device", "machine", "load", "diffusers", "commit"]
    assert (old["what"], old["ms"], old["rival"], old["commit"]) == ("old", "1.5", "", "")
    assert (new["what"], new["rival"], new["device"]) == ("new", "x", "cpu")
    assert "CPUs" in new["machine"] and float(new["load"]) >= 0 and new["commit"]


def test_ops_are_checked_and_compared(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    bench("bench_ops", "--cpu", "--repeats", "2", "--only", "wan1.3b-480p-lends")
    found = rows(tmp_path / "ops_cpu.csv")
    assert {row["op"] for row in found} == {"qk_norm_rope wan1.3b-480p-lends"}
    assert "torch" in [row["backend"] for row in found] and all(float(row["ms"]) > 0 for row in found)
    assert [row["times_torch"] for row in found if row["backend"] == "torch"] == ["1.0"]


def test_an_op_that_is_wrong_is_not_timed(
    bench: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import bench_ops

    right = bench_ops.combine_guidance
    wrong = lambda cond, uncond, scale, backend: right(cond, uncond, scale + (backend != "torch"), backend=backend)  # noqa: E731
    monkeypatch.setattr(bench_ops.backends, "absent", lambda name, kind: "" if name in ("cpp", "torch") else "no")
    monkeypatch.setattr(bench_ops, "combine_guidance", wrong)
    with pytest.raises((AssertionError, ValueError)):
        bench("bench_ops", "--cpu", "--repeats", "1", "--only", "combine_guidance")
    assert not list(tmp_path.iterdir())


def test_reuse_is_compared_with_every_step_run(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    small = {"height": 64, "width": 64, "num_frames": 61, "num_inference_steps": 10, "guidance_scale": 4.0}
    bench("bench_reuse", "--repeats", "1", "--only", "cores", CORES=small)
    found = {row["way"]: row for row in rows(tmp_path / "reuse.csv")}
    assert set(found) == {"paper", "cached", "cached, mild", "cached, strong"} and found["paper"]["ratio"] == "1.0"
    predicted = [float(row["predicted_ratio"]) for row in found.values()]
    assert predicted == sorted(predicted, reverse=True) and predicted[-1] < 0.4


DEMO = """demo:
\t@sleep {first}; echo 'block 1/2, 29 frames' >&2; sleep {rest}; echo 'block 2/2, 61 frames' >&2
\t@echo 'v.mp4: 61 frames in 2 blocks, {whole} s (1 frames/s), first frames after {first} s, bubble 1 %' >&2
\t@exit {code}
"""


def test_the_demo_of_two_checkouts(
    bench: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAKEFLAGS", " -j2 --jobserver-auth=3,4")  # as `make test` leaves it

    def checkout(name: str, first: float, rest: float, code: int = 0) -> Path:
        (tmp_path / name / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / name / ".venv" / "bin" / "dualparal").touch()
        makefile = DEMO.format(first=first, rest=rest, whole=first + rest, code=code)
        (tmp_path / name / "Makefile").write_text(makefile)
        return tmp_path / name

    before, this = checkout("before", 0.6, 0.2), checkout("this", 0.1, 0.1)
    bench("bench_demo", str(before), "--repeats", "1", HERE=this)
    (row,) = rows(tmp_path / "demo.csv")
    assert float(row["rival_first_s"]) >= 0.6 and float(row["rival_seconds"]) >= 0.8 and float(row["first_s"]) >= 0.1
    assert float(row["rival_first_s"]) < float(row["rival_seconds"]) and float(row["first_s"]) < float(row["seconds"])
    assert (row["run_first_s_ratio"], row["run_s_ratio"]) == ("6.0", "4.0") and float(row["seconds_ratio"]) > 1
    with pytest.raises(RuntimeError, match="ended with 2:\nblock 1/2"):
        bench("bench_demo", str(checkout("broken", 0, 0, code=1)), "--repeats", "1", HERE=this)
    with pytest.raises(SystemExit, match="nowhere: not installed"):
        bench("bench_demo", str(tmp_path / "nowhere"))


def test_the_pipeline_bench_and_its_curves(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    import bench_pipeline

    cases = [bench_pipeline.Case(2, 2), bench_pipeline.Case(8, 8, guidance=True)]
    bench("bench_pipeline", "--stages", "1", "2", "--model-ms", "8", "--repeats", "1", CASES=cases)
    found = rows(tmp_path / "pipeline.csv")
    assert [(r["stages"], r["steps"], r["blocks"], r["guidance"]) for r in found] == [
        ("1", "8", "8", "True"),
        ("2", "2", "2", "False"),
        ("2", "8", "8", "True"),
    ]
    for row in found:
        assert float(row["seconds"]) >= float(row["schedule_s"]) > 0  # a sleep is never too short
        assert float(row["first_s"]) > 0
        assert float(row["one_block_s"]) > 0 and 0 <= float(row["bubble"]) < 1
    assert float(found[0]["schedule_s"]) == pytest.approx(2 * 64 * 0.008)
    bench("draw", "--out", str(tmp_path / "scaling.png"), RESULTS=tmp_path)
    picture = np.asarray(Image.open(tmp_path / "scaling.png").convert("RGB"))
    assert min(picture.shape[:2]) > 500 and (picture < 100).any()
    with pytest.raises(SystemExit):
        bench("bench_pipeline", "--only", "nothing")


def test_composition_of_models_and_samplers(
    bench: Callable[..., ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import composition
    from quality import MODEL

    velocity, asked = composition.Model.velocity, []
    monkeypatch.setattr(composition.Model, "velocity", lambda *given: asked.append(given) or velocity(*given))
    other = shutil.copytree(MODEL, tmp_path / "other")
    flags = ("--model", str(MODEL), str(other), "--latents", "2", "--prompts", "3", "--samplers")
    samplers = ("2:5:lcm", "1:5", "1:5:3")
    bench("composition", *flags, *samplers)
    assert len(asked) == 2 * (2 + 1 + 2)  # without guidance the empty caption is not asked
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in said] == [
        f"{model}, 2 latents, {sampler}" for model in (MODEL, other) for sampler in samplers
    ]
    first, fewer, _, again, *_ = [re.findall(r"(\d+) \(([+-][\d.]+) \+- ([\d.]+)\)", line) for line in said]
    assert first == again and first != fewer and {part[1:] for part in again} == {("+0.0", "0.0")}  # paired with itself
    for parts in (first, fewer):
        assert len(parts) == 4 and sum(int(share) for share, *_ in parts) == pytest.approx(100, abs=2)


def test_end_to_end_compares_the_stock_pipeline(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    small = lambda path, **_: build_tiny_pipeline(path, layers=2)  # noqa: E731
    bench("bench_end_to_end", "--repeats", "1", "--steps", "1", CASES={"5 frames": 5}, build_tiny_pipeline=small,
          SIDE=32, WARM_FRAMES=5, RIVALS=(("WanPipeline", 1), ("ours, N=2", 2)))  # fmt: skip
    found = rows(tmp_path / "end_to_end.csv")
    assert [row["what"] for row in found] == ["WanPipeline", "ours, N=2"]
    assert float(found[0]["times_stock"]) == 1.0
    assert all(0 < float(row["first_s"]) <= float(row["seconds"]) for row in found)


def test_faults_are_named_in_time(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    bench("bench_faults", "--repeats", "3", "--only", "k")  # kill
    found = rows(tmp_path / "faults.csv")
    assert [(row["fault"], row["transport"]) for row in found] == [("kill", "hearing"), ("kill", "deaf")]
    for row in found:
        assert row["right_rank"] == "3/3" and float(row["named_max_s"]) < 1 and float(row["gone_max_s"]) < 5


def test_the_layer_bench(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    small = Shape("tiny", heads=2, head_dim=24, ffn_dim=96, height=32, width=48, frames=3, context=2, text_tokens=5)
    bench("bench_layer", "--cpu", "--seconds", "0", CPU_SHAPES=[small])
    found = rows(tmp_path / "layer_cpu.csv")
    assert [(row["what"], row["rival"]) for row in found] == [("layer", "diffusers"), ("step", "authors")]
    assert all(float(row["ours_ms"]) > 0 and float(row["rival_ms"]) > 0 for row in found)


def test_the_engine_bench_counts_units(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    """With stages of this process in place of ranks, which take seconds to start: those are in the pipeline bench."""
    import bench_engine

    overhead = partial(bench_engine.overhead, units_per_block=4, blocks=2)
    bench("bench_engine", "--only", "over", "--repeats", "1", overhead=overhead,
          seconds_of=lambda ranks, job: bench_engine.run(job, ranks))  # fmt: skip
    found = rows(tmp_path / "engine_overhead.csv")
    assert len(found) == 12 and {row["context"] for row in found} == {"cached", "paper"}
    assert all(float(row["us_per_unit"]) > 0 and row["units"] == "8" for row in found)


def test_the_simulation_bench(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    bench("bench_simulate", "--only", "N=2 T=4 M=5 cached", "--unit", "0.002")
    (row,) = rows(tmp_path / "simulate.csv")
    assert row["same_order"] == "True" and float(row["makespan_s"]) > 0
    with pytest.raises(SystemExit, match="no such case"):
        bench("bench_simulate", "--only", "N=3")


def test_the_snapshot_bench(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    bench("bench_snapshot", "--only", "small prior", "--repeats", "1", SIZES={"small": (64, 96)})
    (row,) = rows(tmp_path / "snapshot.csv")
    assert row["case"] == "small prior" and float(row["megabytes"]) > 1 and int(row["blocks"]) > 1


def test_the_error_of_8_bits_is_written_anew(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    bench("attention_8bit_error", "--out", str(tmp_path), QUERIES=8, OWN=256, LENT=128, tiny_wan=lambda: iter(()))
    text = (tmp_path / "attention-8bit.md").read_text()
    assert text.startswith("# 8-bit attention") and text.count("\n| gaussian q, k, v") == 2


def test_the_report_of_the_kernels_is_written_anew(bench: Callable[..., ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from dualparal.kernels.offline import offline_cases, read_table

    op, case = offline_cases()[0]
    table = tmp_path / "kernels.md"
    table.write_text((DOCS / "kernels.md").read_text())
    no_nvcc = SimpleNamespace(which=lambda name: None)
    bench(
        "kernel_report", "--out", str(table), offline_cases=lambda: [(op, case._replace(archs=(90,)))], shutil=no_nvcc
    )
    (line,) = read_table(table.read_text())
    assert (line["op"], line["case"], line["sm"]) == (op, case.name, "90")


def test_the_gpu_suite_names_what_is_there(bench: Callable[..., ModuleType]) -> None:
    import gpu_suite

    named = [part for _, _, command in gpu_suite.PARTS for part in command if part.endswith(".py")]
    assert len(named) > 10 and [name for name in named if not (ROOT / name).exists()] == []


SCRIPTS = [*sorted(path.stem for path in BENCH.glob("*.py")), "meter.scene_classifier"]


def test_flags_mean_the_same_and_every_script_is_described(
    bench: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every one starts, those that need a GPU too; what they do is in the tests above, or is named here.

    bench_attention: test_calibrate.py. quality: test_quality.py. bench_graphs and
    gpu_suite need a GPU. soak, kill_and_resume and the training of scene_classifier take minutes.
    """
    readme = (BENCH / "README.md").read_text()
    for name in SCRIPTS:
        assert name.replace("meter.", "") in readme
        with pytest.raises(SystemExit) as ended:
            bench(name, "--help")
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert "--help" in text
        assert not name.startswith("bench_") or ("--only" in text and "--no-record" in text)
