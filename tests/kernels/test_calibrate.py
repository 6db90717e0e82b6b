"""Calibration: the table on disk and who may read it, and the measuring with made-up backends on the CPU."""

import csv
import json
import logging
import math
import re
import sys

import pytest
import torch

from dualparal.kernels import environment
from dualparal.kernels.attention import attention, calibrate, choice, table
from dualparal.kernels.attention.cases import Case

CPU = torch.device("cpu")
FACTS = {"card": "A Card (80 GB)", "architecture": 90, "driver": "580.1", "torch": "2.11.0", "cudnn": 91900}
CHOICES = [
    {"dtype": "bfloat16", "head_dim": 128, "length": "long", "backend": "cudnn"},
    {"dtype": "bfloat16", "head_dim": 128, "length": "short", "backend": "triton"},
]
READ = {("bfloat16", 128, "long"): "cudnn", ("bfloat16", 128, "short"): "triton"}
CASES = [Case("long", 40, 2100, 2, 16), Case("short", 33, 20, 2, 16, padding=16)]


@pytest.fixture
def root(monkeypatch, tmp_path):
    """An empty cache folder, and choices that are made anew."""
    monkeypatch.setenv(environment.CACHE_ROOT, str(tmp_path / "cache"))
    choice.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    choice.forget()


# The file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(root, caplog):
    path = table.measured_path(FACTS["card"])
    assert path == root / "attention-a-card-80-gb.json"
    assert table.read_measured(path, FACTS) == {}
    table.write_measured(path, FACTS, CHOICES[:1], [])
    table.write_measured(path, FACTS, CHOICES, [{"case": "x"}])
    assert table.read_measured(path, FACTS) == READ
    assert [p.name for p in root.iterdir()] == [path.name]
    assert not caplog.records


@pytest.mark.parametrize("name", FACTS)
def test_another_machine_is_not_this_one(root, caplog, name):
    path = root / "table.json"
    table.write_measured(path, FACTS, CHOICES, [])
    now = {**FACTS, name: "other"}
    assert table.read_measured(path, now) == {}
    assert f"measured elsewhere ({name} {FACTS[name]} then, other now); run 'dualparal calibrate' again" in caplog.text
    assert table.read_measured(path, {k: v for k, v in FACTS.items() if k != name}) == {}
    assert table.read_measured(path, {**FACTS, "new fact": 1}) == {}


def written(**changes):
    return json.dumps({"format": table.FORMAT, "machine": FACTS, "choices": CHOICES, "rows": [], **changes})


BROKEN = {
    "empty": "",
    "cut": written()[:100],
    "not JSON": "choices: none",
    "not a table": "[]",
    "nothing in it": "{}",
    "number": "7",
    "other format": written(format=99),
    "machine": written(machine=[1]),
    "choices": written(choices={"a": 1}),
    "row": written(choices=[{"dtype": "bfloat16"}]),
    "head_dim": written(choices=[{**CHOICES[0], "head_dim": "wide"}]),
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_ignored(tmp_path, caplog, content):
    path = tmp_path / "table.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert table.read_measured(path, FACTS) == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{path} is ignored" in caplog.text and "run 'dualparal calibrate' again" in caplog.text


def test_a_failed_write_leaves_the_old_table(root, monkeypatch):
    path = root / "table.json"
    table.write_measured(path, FACTS, CHOICES, [])

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(table.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        table.write_measured(path, FACTS, CHOICES[:1], [])
    assert [p.name for p in root.iterdir()] == ["table.json"]
    assert table.read_measured(path, FACTS) == READ


def test_a_table_is_read_once(root, caplog):
    facts = table.machine(CPU)
    assert {"card", "architecture", "driver", "torch", "cudnn", "triton"} <= set(facts)
    path = table.measured_path(facts["card"])
    table.write_measured(path, facts, CHOICES, [])
    assert table.measured_for(CPU) == READ
    path.unlink()
    assert table.measured_for(CPU) == READ
    choice.forget()
    assert table.measured_for(CPU) == {}


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(environment.CACHE_ROOT, raising=False)
    monkeypatch.setattr(environment.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_root() == tmp_path / "dualparal"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache_root() == tmp_path / ".cache" / "dualparal"
    monkeypatch.setattr(environment.sys, "platform", "darwin")
    assert environment.cache_root() == tmp_path / "Library" / "Caches" / "dualparal"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(environment.Path, "home", homeless)
    with pytest.raises(ValueError, match="set DUALPARAL_CACHE_ROOT to a folder"):
        environment.cache_root()


@pytest.mark.parametrize(
    "text, version",
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC version: 12.2.0",
            "570.86.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.65.06  Release Build", "580.65.06"),
        ("something else", "unknown"),
    ],
)
def test_driver_version(monkeypatch, text, version):
    monkeypatch.setattr(table.Path, "read_text", lambda self, encoding: text)
    assert table.driver_version() == version


# Measuring --------------------------------------------------------------------------------------------------------


def right(q, k, v, heads):
    return attention(q, k, v, heads=heads, backend="sdpa")


def slightly_wrong(q, k, v, heads):
    out = right(q, k, v, heads)
    out[-1, 3] += 0.1
    return out


def unwritten(q, k, v, heads):
    return torch.full_like(q, math.nan)


def refusing(q, k, v, heads):
    raise RuntimeError("no kernel\nfor this shape")


def too_large(q, k, v, heads):
    raise torch.OutOfMemoryError("tried to allocate a lot")


def test_measuring():
    backends = {
        "right": right,
        "slightly-wrong": slightly_wrong,
        "unwritten": unwritten,
        "refusing": refusing,
        "large": too_large,
    }
    rows = calibrate.measure(CASES[1], torch.bfloat16, CPU, backends, repeats=2)
    assert [row.backend for row in rows] == list(backends)
    by_name = {row.backend: row for row in rows}
    assert by_name["right"].milliseconds > 0 and by_name["right"].tflops > 0 and not by_name["right"].problem
    assert (by_name["right"].dtype, by_name["right"].head_dim, by_name["right"].length) == ("bfloat16", 16, "short")
    for name, says in (
        ("slightly-wrong", "checked queries: largest error"),
        ("unwritten", "are not finite"),
        ("refusing", "RuntimeError: no kernel"),
        ("large", "out of memory"),
    ):
        assert by_name[name].milliseconds is None and says in by_name[name].problem
        assert "not timed" in calibrate.describe(by_name[name]) and "\n" not in calibrate.describe(by_name[name])
    assert "TFLOP/s" in calibrate.describe(by_name["right"])


def test_every_row_is_checked_where_there_are_few_and_the_ends_where_there_are_many():
    for rows, spoiled, found in ((5, 4, True), (1000, 3, True), (1000, 999, True), (1000, 500, False)):
        q, k, v = calibrate.inputs(Case("", rows, 20, 1, 16), torch.float32, CPU)
        plain = right(q, k, v, 1)
        out = plain.clone()
        out[spoiled] += 1
        assert bool(calibrate.Check(q, k, v, 1, plain).problem(out)) == found


def row(case, backend, milliseconds, length="long"):
    return calibrate.Row(case, backend, "bfloat16", 128, length, milliseconds, None, "")


def best(rows):
    return {chosen["length"]: chosen["backend"] for chosen in calibrate.fastest(rows)}


def test_the_fastest():
    assert best([row("a", "sdpa", 2.0), row("a", "flash", 1.0)]) == {"long": "flash"}
    assert best([row("a", "sdpa", 1.01), row("a", "flash", 1.0)]) == {"long": "sdpa"}  # a tie
    # 4 x slower at a short shape weighs more than 2 x faster at a long one.
    pair = [row("a", "x", 1.0), row("a", "y", 4.0), row("b", "x", 100.0), row("b", "y", 50.0)]
    assert best(pair) == {"long": "x"}
    assert best([*pair, row("c", "x", None), row("c", "y", 1.0)]) == {"long": "y"}  # x fails at one shape
    assert best([row("a", "x", 1.0), row("b", "y", 1.0, "short")]) == {"long": "x", "short": "y"}
    assert best([row("a", "x", None)]) == {}


def test_calibration_on_the_cpu(root):
    lines = []
    path = calibrate.calibrate(CPU, CASES, torch.float32, report=lines.append)
    assert path.parent == root
    chosen = table.measured_for(CPU)
    assert set(chosen) == {("float32", 16, "long"), ("float32", 16, "short")}
    assert set(chosen.values()) <= {"sdpa", "flash"}
    stored = json.loads(path.read_text())
    assert {(r["case"], r["backend"]) for r in stored["rows"]} == {
        (c, b) for c in ("long", "short") for b in ("sdpa", "flash")
    }
    assert len(lines) == 6 and re.match(r"long +sdpa .*ms.*TFLOP/s", lines[0])


def test_shapes_that_do_not_fit_are_left_out(root, monkeypatch):
    measure = calibrate.measure

    def small_card(case, *rest):
        if case.name == "long":
            raise torch.OutOfMemoryError("too much")
        return measure(case, *rest)

    monkeypatch.setattr(calibrate, "measure", small_card)
    lines = []
    path = calibrate.calibrate(CPU, CASES, torch.float32, report=lines.append)
    assert "long" in lines[0] and "left out" in lines[0]
    assert {c["length"] for c in json.loads(path.read_text())["choices"]} == {"short"}
    monkeypatch.setattr(calibrate, "callable_backends", lambda *args: {"refusing": refusing})
    with pytest.raises(ValueError, match="no backend ran at any shape; nothing was kept"):
        calibrate.calibrate(CPU, CASES[1:], torch.float32)


def test_auto_reads_what_calibrate_wrote(root, monkeypatch, caplog):
    """The whole way, on a card that is made up."""
    card = torch.device("cuda", 0)
    monkeypatch.setattr(choice, "architecture", lambda device: 90 if device.type == "cuda" else 0)
    monkeypatch.setattr(choice, "absent", lambda *args: "")
    monkeypatch.setattr(table, "machine", lambda device: FACTS)
    table.write_measured(table.measured_path(FACTS["card"]), FACTS, CHOICES, [])
    choice._auto.cache_clear()
    with caplog.at_level(logging.INFO, "dualparal"):
        assert choice.choose(card, torch.bfloat16, 128, 9000, "auto") == "cudnn"
        assert choice.choose(card, torch.bfloat16, 128, 512, "auto") == "triton"
    assert "cudnn (measured on this machine)" in caplog.text
    choice._auto.cache_clear()


def test_without_a_gpu(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="calibrate: torch sees no GPU"):
        calibrate.calibrate()
    assert not root.exists()


def test_the_command(root, monkeypatch, capsys):
    from dualparal.cli import main as cli

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cli.sys, "argv", ["dualparal", "calibrate"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: calibrate: torch sees no GPU") and errors.count("\n") == 1

    monkeypatch.setattr(calibrate, "calibrate", lambda report: report("a row") or root / "table.json")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out == f"a row\nkept in {root}/table.json; remove it to go back to the built-in table\n"


# A kernel that nobody has seen run ----------------------------------------------------------------------------------


def test_a_trial_in_a_process_of_its_own(root, caplog):
    assert calibrate.trial("sdpa", CPU, torch.bfloat16, 64) == ""
    assert not caplog.records
    problem = calibrate.trial("cudnn", CPU, torch.bfloat16, 64)
    assert "takes tensors on cuda, not on cpu" in problem and "cudnn is left out, its trial failed" in caplog.text


def test_a_trial_that_hangs(root, monkeypatch):
    monkeypatch.setattr(calibrate, "TRIAL_SECONDS", 0.01)
    assert calibrate.trial("flash", CPU, torch.float32, 64) == "it did not end within 0.01 s"


def leaking(q, k, v, heads):
    """Reads a key too many, with a weight of zero."""
    behind = v.as_strided((len(v) + 1, v.shape[1]), v.stride())[-1]
    return right(q, k, v, heads) + 0 * behind


def half_written(q, k, v, heads):
    out = torch.empty(q.shape, dtype=q.dtype)
    out[:, :-1] = right(q, k, v, heads)[:, :-1]
    return out


def test_what_a_trial_finds():
    def found(function):
        return calibrate.ragged_problem(function, CPU, torch.bfloat16, 64)

    assert found(right) == ""
    assert found(slightly_wrong).startswith("ragged-1-1: checked queries: largest error")
    for function in (leaking, half_written, unwritten):
        assert "are not finite" in found(function)
    # Right wherever the sizes are those of tiles.
    assert found(lambda q, k, v, heads: (right if len(k) % 64 == 0 else unwritten)(q, k, v, heads))


def test_calibrate_refuses_what_fails_its_trial(root, monkeypatch):
    monkeypatch.setattr(choice, "UNTRIED", ("hopper",))
    monkeypatch.setattr(choice, "absent", lambda backend, *kind: "" if backend in ("sdpa", "hopper") else "not here")
    for problem, names in (("wrong", ["sdpa"]), ("", ["sdpa", "hopper"])):
        monkeypatch.setattr(calibrate, "trial", lambda *kind, problem=problem: problem)
        assert list(calibrate.callable_backends(CPU, torch.bfloat16, 64)) == names


# The benchmark that shares the measuring ----------------------------------------------------------------------------


def test_the_benchmark_runs_and_keeps_what_it_found(monkeypatch, tmp_path, capsys):
    import bench_attention
    from harness import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(bench_attention, "CPU_CASES", [Case("tiny", 20, 50, 2, 16)])
    monkeypatch.setattr(bench_attention, "callable_backends", lambda *args: {"sdpa": right, "wrong": slightly_wrong})
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", "--cpu"])
    bench_attention.main()
    rows = list(csv.DictReader((tmp_path / "attention_cpu.csv").read_text().splitlines()))
    assert [row["backend"] for row in rows] == ["sdpa", "wrong", "sdpa, 3 places"]
    assert float(rows[0]["times_sdpa"]) == 1 and float(rows[0]["of_peak"]) > 0
    assert rows[1]["ms"] == "" and "largest error" in rows[1]["problem"]
    assert "1.00x sdpa" in capsys.readouterr().out
