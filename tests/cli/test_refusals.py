"""Mistakes on the command line: one line each, in one style, before torch is imported; and files of flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from cli_runs import Outcome
from dualparal.cli.refusals import in_flags
from dualparal.schedule.layout import split_layers

START = ["generate", "--prompt", "x", "--device", "cpu", "--num-frames", "5", "--steps", "1"]
MISTAKES: list[tuple[list[str], str]] = [
    ([*START, "--out", "/proc/a.mp4"], "--out /proc/a.mp4: /proc is not a folder that can be written to; choose"),
    ([*START, "--guidance-scale", "5,0"], "--guidance-scale 5,0: use a number, such as 5.0"),
    ([*START, "--stages", "two"], "--stages two: use a whole number"),
    ([*START, "--lora", "x"], "--lora x: not a .safetensors file"),
    ([*START, "--lora", "x.safetensors"], "--lora x.safetensors: there is no such file"),
    ([*START, "--transformer", "x.gguf"], "--transformer x.gguf: "),
    (["plan", "--gpus", "1x24GB", "--lora", "x"], "--lora: 'dualparal plan' has no such flag; see"),
    ([*START, "--stages", "99"], "--stages 99 with a model of 8 layers: every stage owns at least one layer; use 1 to"),
    ([*START, "--dtype", "fp16"], "--dtype fp16 is not supported; use one of float32, bfloat16, float16"),
    ([*START, "--sampler", "ddim"], "--sampler ddim: use one of unipc, euler, dpm++, lcm"),
    ([*START, "--latents-in", "nope"], "--latents-in nope: no such file"),
    ([*START, "--hieght", "64"], "--hieght: 'dualparal generate' has no such flag; did you mean --height?"),
    ([*START, "--height", "40"], "--height 40 is not divisible by 16"),
    ([*START, "--num-inference-steps", "0"], "--num-inference-steps 0: denoising steps of a block"),
    (
        [*START, "--timesteps", "9,8"],
        "--steps 1 with 2 timesteps: a list has every step, 1 to 10000 of them; leave --st",
    ),
    ([*START, "--decode-in-place", "--decode-gpus", "1"], "--decode-in-place with --decode-gpus 1: "),
    ([*START, "--seed"], "--seed: a value is missing"),
    ([*START, "extra"], "got unexpected extra argument"),
    (["genrate"], "no such command 'genrate'"),
    ([*START, "--config", "nope.yaml"], "--config nope.yaml: No such file or directory; use a file that can be read"),
]
PROGRAM = """
import contextlib, io, json, sys
from dualparal.cli.main import main
found = []
for arguments in json.load(sys.stdin):
    sys.argv = ["dualparal", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code
    found.append([code, said.getvalue(), "torch" in sys.modules])
print(json.dumps(found))
"""


def test_mistakes_are_answered_by_one_line_before_slow_imports(tmp_path: Path) -> None:
    given = json.dumps([arguments for arguments, _ in MISTAKES])
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=given, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    for (arguments, words), (code, said, slow) in zip(MISTAKES, json.loads(ended.stdout), strict=True):
        assert said.startswith(f"error: {words}") and said.count("\n") == 1, (arguments, said)
        assert code in (2, 5) and "'dtype=" not in said and "╭" not in said
        if "--latents-in" not in arguments:  # safetensors' reader for torch, which says what is in the file
            assert not slow, arguments
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "world", "words"),
    [
        ("--stages 99", None, "--stages 99 with a model of 8 layers"),
        ("--gpus 99", None, "--gpus 99 with a model of 8 layers"),
        ("--gpus=100 --decode-gpus 1", None, "--gpus 100, which makes 99 stages, with a model of 8 layers"),
        ("--stages 99 --gpus 99", None, "--stages 99 with a model of 8 layers"),
        ("", "99", "a run of 99 processes with a model of 8 layers"),
    ],
)
def test_too_many_stages_are_named_as_they_were_typed(
    monkeypatch: pytest.MonkeyPatch, argv: str, world: str | None, words: str
) -> None:
    monkeypatch.setattr("sys.argv", ["dualparal", "generate", *argv.split()])
    monkeypatch.delenv("RANK", raising=False)
    if world is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError) as caught:
        split_layers(8, 99)
    said = in_flags(str(caught.value))
    assert said.startswith(words) and said.endswith(": every stage owns at least one layer; use 1 to 8 stages")


def test_a_hub_id_without_a_network_is_one_line(
    dualparal: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ended = dualparal(*START, "--model", "nobody/nothing")
    assert ended.code == 2 and ended.stderr.count("\n") == 1 and "\\n" not in ended.stderr
    assert ended.stderr.startswith("error: model 'nobody/nothing' is no directory here and could not be had from the h")
    assert ended.stderr.endswith("; download it where there is a network, and give its folder\n")


def test_a_timeline_is_written_without_matplotlib(
    dualparal: Callable[..., Outcome], wan21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualparal.trace.picture.importlib.util.find_spec", lambda name: None)
    small = ["--height", "32", "--width", "32", "--latents-out", "l.safetensors"]
    ended = dualparal(*START, "--model", wan21, *small, "--timeline", "run.json")
    assert ended.code == 0 and "run.json: open it at ui.perfetto.dev; no picture: the picture" in ended.stderr
    assert "pip install 'dualparal[timeline]'" in ended.stderr
    assert json.loads(Path("run.json").read_text()) and not Path("run.png").exists()


CONFIG = """
storyboard: {0: a cat, 0.25: "a dog: -running"}
size: 64x32
num_frames: 17
steps: 2
seed: 7
frames-per-block: 1
context_frames: 1
layers_per_stage: [3, 5]
device: cpu
overwrite: true
"""
FLAGS = [
    *("--prompt", "a cat", "--prompt-at", "4:a dog: -running", "--width", "64", "--height", "32"),
    *("--num-frames", "17", "--steps", "2", "--seed", "7", "--frames-per-block", "1", "--context-frames", "1"),
    *("--device", "cpu", "--overwrite", "--layers-per-stage", "3,5"),
]


def test_a_file_of_flags_is_the_flags(dualparal: Callable[..., Outcome]) -> None:
    Path("a.yaml").write_text(CONFIG)
    by_file = dualparal("generate", "--config", "a.yaml", "--dry-run")
    by_flags = dualparal("generate", *FLAGS, "--dry-run")
    assert by_file.code == by_flags.code == 0 and by_file.stdout == by_flags.stdout
    told = yaml.safe_load(by_file.stdout)
    assert told["request"]["prompts"] == [{0: "a cat", 4: "a dog: -running"}]
    assert told["request"]["engine"]["layers_per_stage"] == [3, 5] and told["plan"]["processes"] == 2
    assert told["plan"]["blocks"] == 5 and os.listdir() == ["a.yaml"]

    won = yaml.safe_load(dualparal("generate", "--seed=9", "--config=a.yaml", "--prompt", "a cow", "--dry-run").stdout)
    assert (won["request"]["video"]["seed"], won["request"]["prompts"]) == (9, [{0: "a cow"}])
    faster = yaml.safe_load(dualparal("generate", "--config=a.yaml", "--fps", "32", "--dry-run").stdout)
    assert faster["request"]["prompts"] == [{0: "a cat", 8: "a dog: -running"}]  # seconds of this video


def test_a_run_by_a_file_of_flags(dualparal: Callable[..., Outcome], wan21: Path) -> None:
    Path("a.yaml").write_text(CONFIG.replace("[3, 5]", "null"))
    for out, arguments in (("f", ["--config", "a.yaml"]), ("g", FLAGS[:-2])):
        ended = dualparal("generate", *arguments, "--model", wan21, "--latents-out", f"{out}.safetensors")
        assert ended.code == 0, ended.stderr
    assert load_file("f.safetensors")["latents"].equal(load_file("g.safetensors")["latents"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("hieght: 64", "no flag is called 'hieght'; did you mean height?"),
        ("prompt: [a, b]\nseed: [1, 2]\nstoryboard: {0: a}", "storyboard and prompt"),
        ("guidance_scale: [a, b]", "guidance_scale: 2 values, and this flag takes one"),
        ("graphs: maybe", "graphs: 'maybe': use true or false"),
        ("seed: yes", "seed: True is not a text or a number"),
        ("prompt: 2026-01-01", "is not a text or a number; put it into quotes"),
        ("steps: 2\nnum_inference_steps: 3", "says the same as another key"),
        ("seed: 1\nseed: 2", "seed is there twice"),
        ("size: 64", "size: use WIDTHxHEIGHT"),
        ("storyboard: {1: a}", "storyboard: use second: text, from 0 on"),
        ("storyboard: {0: a, -1: b}", "storyboard: -1: use seconds from 0 on"),
        ("storyboard: {0: a, .nan: b}", "storyboard: nan: use seconds from 0 on"),
        ("storyboard: {0: a, 2: }", "storyboard: 2: None is not a text"),
        ("storyboard: {0: a, 2: no}", "storyboard: 2: False is not a text"),
        ("storyboard: {0: a, 0.01: b}", "storyboard: 0.01: frame 0 has a text already"),
        ("fps: .inf\nstoryboard: {0: a, 1: b}", "fps: inf: use a number"),
        ("fps: yes\nstoryboard: {0: a, 1: b}", "fps: True: use a number"),
        ("- a", "use a mapping of flags to values"),
        ("a: &x [1]\nb: *x", "aliases (*name) are not read"),
        ("a: [[[[[[[[1]]]]]]]]", "nested deeper than 6"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [1", "line 1: expected"),
        ("\x00", "special characters are not allowed"),
        ("x" * 300_000, "larger than 256 KiB"),
    ],
)
def test_bad_files_of_flags_are_refused(dualparal: Callable[..., Outcome], text: str, words: str) -> None:
    Path("a.yaml").write_text(text)
    ended = dualparal("generate", "--prompt", "x", "--config", "a.yaml")
    assert ended.code == 2 and ended.stderr.startswith("error: --config a.yaml"), ended.stderr
    assert words in ended.stderr and ended.stderr.count("\n") == 1


def test_shell_completion_is_there(dualparal: Callable[..., Outcome]) -> None:
    assert "--install-completion" in dualparal("--help").stdout
