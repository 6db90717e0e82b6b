"""What SECURITY.md promises: no code from data, nobody listening, nothing written through a link, prompts kept in.

One real run of two ranks is watched from outside while it lasts; the rest are traps that must not go off.
"""

from __future__ import annotations

import ast
import json
import marshal
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import dualparal
from dualparal.cli import main as cli
from dualparal.cli.leader import RANK_PROGRAM
from dualparal.distributed import mesh
from dualparal.io import latents as latents_file
from dualparal.io.latents import read_latents, write_latents
from dualparal.io.output import OutputError, check_file, check_out, open_output
from dualparal.io.pictures import PngWriter
from dualparal.io.video import SegmentWriter
from dualparal.launch.supervisor import supervise
from dualparal.models.files import ModelFiles
from dualparal.models.json_files import ModelError
from dualparal.models.source import resolve_model
from dualparal.models.weights import WeightFiles
from dualparal.trace import picture
from dualparal.trace.timeline import Recorder, merge, parts_of
from places import ROOT, WORKERS

AUDIT = WORKERS / "audit"
SECRET = "xylophone quokka"
SMALL = ["--device", "cpu", "--height", "32", "--width", "32", "--steps", "2"]
FRAMES = np.zeros((4, 32, 32, 3), dtype=np.uint8)


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _audited(folder: Path) -> dict[str, str]:
    folder.mkdir()
    roots = {sys.prefix, sys.base_prefix, str(ROOT), str(Path(torch.__file__).parents[1])}
    return {
        "PYTHONPATH": str(AUDIT),
        "AUDIT_FOLDER": str(folder),
        "AUDIT_ROOTS": os.pathsep.join(os.path.realpath(root) for root in roots),
    }


def _events(folder: Path) -> dict[int, list[str]]:
    return {int(path.stem): path.read_text().splitlines() for path in folder.iterdir()}


# A run of two ranks, watched ---------------------------------------------------------------------------------------


class Socket(NamedTuple):
    listens: bool
    here: str
    there: str


class Watched(NamedTuple):
    """What could be seen of a run."""

    folder: Path
    stderr: str
    events: dict[int, list[str]]  # of each process
    lead: int
    ranks: dict[int, str]  # pid -> command line
    sockets: set[Socket]
    marks: list[str]  # of the traps that went off


def _sockets(process: psutil.Process) -> set[Socket]:
    return {
        Socket(c.status == psutil.CONN_LISTEN, c.laddr.ip if c.laddr else "", c.raddr.ip if c.raddr else "")
        for c in process.net_connections(kind="inet")
    }


def _outside(sockets: set[Socket]) -> list[Socket]:
    """Those that another machine could reach, or that reach another one."""
    local = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "")
    return [s for s in sockets if s.there not in local or (s.listens and s.here not in local)]


def _plant_traps(model: Path, folder: Path, marks: Path) -> None:
    """Beside what is used: code and pickles that a careless loader would take."""
    code = "open({!r}, 'w')\n"
    for name in ("pipeline.py", "transformer/wan.py", "transformer/__init__.py", "tokenizer/tokenization.py"):
        (model / name).write_text(code.format(str(marks / name.replace("/", "-"))))
    for name in ("transformer", "vae", "text_encoder"):
        (model / name / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(marks / name)))
    for name in ("numpy", "av", "ftfy", "psutil"):  # in the current folder
        (folder / f"{name}.py").write_text(code.format(str(marks / f"{name}.py")))


@pytest.fixture(scope="module")
def watched(wan21: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    base = tmp_path_factory.mktemp("watched")
    model, folder, marks = Path(shutil.copytree(wan21, base / "model")), base / "run", base / "marks"
    folder.mkdir()
    marks.mkdir()
    _plant_traps(model, folder, marks)
    command = ["generate", "--prompt", SECRET, "--prompt-at", f"130:{SECRET}", *SMALL, "--model", str(model)]
    command += ["--num-frames", "257", "--stages", "2", "--threads", "1", "--out", "a.mp4", "--timeline", "run.json"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME")}
    with open(base / "stderr.txt", "w") as log:
        lead = subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, *command, "--latents-out", "latents.safetensors"],
            cwd=folder,
            env={**clean, **_audited(base / "events"), "DUALPARAL_LOG_LEVEL": "DEBUG"},
            stdout=log,
            stderr=log,
        )
        ranks: dict[int, str] = {}
        sockets: set[Socket] = set()
        while lead.poll() is None:
            _look(lead.pid, ranks, sockets)
            time.sleep(0.02)
    stderr = (base / "stderr.txt").read_text()
    assert lead.returncode == 0, stderr
    found = sorted(path.name for path in marks.iterdir())
    return Watched(folder, stderr, _events(base / "events"), lead.pid, ranks, sockets, found)


def _look(lead: int, ranks: dict[int, str], sockets: set[Socket]) -> None:
    try:
        for process in [psutil.Process(lead), *psutil.Process(lead).children(recursive=True)]:
            sockets |= _sockets(process)
            if process.pid != lead and "RANK" in process.environ():
                ranks[process.pid] = " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass  # it has just ended


def test_no_rank_unpickles_runs_foreign_code_or_connects_elsewhere(watched: Watched) -> None:
    assert len(watched.ranks) == 2
    assert {watched.lead, *watched.ranks} <= set(watched.events)
    assert {pid: events for pid, events in watched.events.items() if events} == {}
    assert watched.marks == []


def test_the_hook_sees_what_it_should(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.py"
    foreign.write_text("x = 1\n")
    program = (
        f"import marshal, pickle, runpy, socket\npickle.loads({pickle.dumps(_Touch(tmp_path / 'mark'))!r})\n"
        f"marshal.loads({marshal.dumps(1)!r})\nrunpy.run_path({str(foreign)!r})\n"
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('0.0.0.1', 9))"
    )
    environment = {**os.environ, **_audited(tmp_path / "events")}
    subprocess.run([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL, check=False)
    (events,) = _events(tmp_path / "events").values()
    assert {"marshal.loads <string>", f"exec {foreign}", "socket.connect 0.0.0.1"} <= set(events)
    assert any(event.startswith("pickle.find_class ") for event in events)
    assert (tmp_path / "mark").exists()


def test_no_socket_of_the_internet_is_open(watched: Watched) -> None:
    assert watched.sockets == set(), "ranks of one machine need none, not even on loopback"


def test_ranks_of_one_node_are_told_to_stay_on_loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a machine's name leads to loopback anyway, its sockets do not show whether they were told."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in ((mesh.RENDEZVOUS, str(tmp_path / "store")), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("FileStore", "PrefixStore"):
        monkeypatch.setattr(mesh.dist, name, lambda *_: None)
    monkeypatch.setattr(mesh.private, "register", lambda: None)
    monkeypatch.setattr(mesh, "handshake", lambda *_: None)
    monkeypatch.setattr(mesh.dist, "init_process_group", lambda *_, **__: None)
    mesh.Mesh._init()
    assert {os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")} <= {"lo", "lo0"}


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1"])
def test_an_open_socket_would_be_seen(address: str) -> None:
    program = f"import socket; s = socket.create_server(({address!r}, 0)); print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None
        child.stdout.readline()
        sockets = _sockets(psutil.Process(child.pid))
        child.communicate(b"\n")
    assert any(socket.listens for socket in sockets)
    assert bool(_outside(sockets)) == (address == "0.0.0.0")


def test_a_prompt_stays_out_of_logs_files_and_process_lists(watched: Watched) -> None:
    assert sorted(path.suffix for path in watched.folder.iterdir() if path.suffix != ".py") == [
        ".json", ".mp4", ".png", ".safetensors"
    ]  # fmt: skip
    assert "frames in" in watched.stderr
    holds = [path.name for path in watched.folder.iterdir() if SECRET.encode() in path.read_bytes()]
    assert holds == [] and SECRET not in watched.stderr
    assert len(watched.ranks) == 2 and not [line for line in watched.ranks.values() if "quokka" in line]


def test_a_failure_does_not_tell_the_prompt(tmp_path: Path) -> None:
    program = "import sys; assert sys.argv[1]; sys.exit(7)"
    result = supervise([sys.executable, "-c", program, SECRET], 1, error_path=tmp_path / "error.json")
    assert result.exit_code == 3
    text = (tmp_path / "error.json").read_text()
    assert "exited with code 7" in text and "quokka" not in text


@pytest.mark.parametrize(
    "flags",
    [["--prompt-at", SECRET], ["--prompt-at", f"99:{SECRET}"], ["--prompt-at", "8:b", "--prompt-at", f"8:{SECRET}"]],
)
def test_a_refusal_does_not_tell_the_prompt(refused: Callable[..., str], wan21: Path, flags: list[str]) -> None:
    assert "quokka" not in refused("--prompt", SECRET, *flags, "--num-frames", 33, "--model", wan21)


# Models ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., str]]:
    """Runs the command line in an empty folder; returns the one line it is refused with. No trap may go off."""
    run, marks = tmp_path / "run", tmp_path / "marks"
    run.mkdir()
    marks.mkdir()
    monkeypatch.chdir(run)
    for part in ("slices", "text_encoder", "vae"):
        name = f"dualparal.models.files.ModelFiles.load_{part}"
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("weights were read"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments: object, command: Sequence[str] = ("generate", *SMALL)) -> str:
        monkeypatch.setattr(sys, "argv", ["dualparal", *command, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        error = capfd.readouterr().err
        assert ended.value.code == 2, error
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 10_000, error
        assert not list(marks.iterdir())
        return error

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def _config(name: str, **changes: Any) -> Callable[[Path, Path], None]:
    return lambda model, marks: _edit(model / name, **changes)


def _pickle_only(suffix: str) -> Callable[[Path, Path], None]:
    def damage(model: Path, marks: Path) -> None:
        for weights in model.rglob("*.safetensors"):
            weights.with_suffix(suffix).write_bytes(pickle.dumps(_Touch(marks / weights.parent.name)))
            weights.unlink()

    return damage


def _code(name: str, **changes: Any) -> Callable[[Path, Path], None]:
    """A module that makes a mark, and an index that names it."""

    def damage(model: Path, marks: Path) -> None:
        (model / name).write_text(f"open({str(marks / 'code')!r}, 'w')\nclass Evil: ...\n")
        _edit(model / "model_index.json", **changes)

    return damage


def _shard(name: str) -> Callable[[Path, Path], None]:
    return _config("transformer/model.safetensors.index.json", weight_map={"proj_out.weight": name})


def _text(name: str, text: str) -> Callable[[Path, Path], None]:
    return lambda model, marks: (model / name).write_text(text) and None


def _pipe(name: str) -> Callable[[Path, Path], None]:
    def damage(model: Path, marks: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return damage


def _quantized(part: str) -> Callable[[Path, Path], None]:
    """Weights of a part as int8, of which safetensors and torch make floats without a word."""

    def damage(model: Path, marks: Path) -> None:
        (path,) = (model / part).glob("*.safetensors")
        save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)

    return damage


WAN = "WanTransformer3DModel"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
AUTO_MAP = {"AutoTokenizer": ["evil.Evil", None]}
MODELS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    **{f"only {end}": (_pickle_only(end), "pickles and never read") for end in (".bin", ".pt", ".pth", ".ckpt")},
    "pipeline.py": (_code("pipeline.py", _class_name=["pipeline", "Evil"]), "pipeline class"),
    "pipeline by name": (_code("pipeline.py", _class_name="pipeline.Evil"), "pipeline class"),
    "component .py": (_code("transformer/evil.py", transformer=["evil", WAN]), "of diffusers"),
    "foreign library": (_config("model_index.json", scheduler=["os", "UniPCMultistepScheduler"]), "of diffusers"),
    "library that is no text": (_config("model_index.json", vae=[["os"], "AutoencoderKLWan"]), "of diffusers"),
    "component outside": (_config("model_index.json", **{"../x": ["diffusers", "AutoencoderKL"]}), "'../x' is none"),
    "a component more": (_code("None.py", evil=["evil", "Evil"]), "'evil' is none"),
    "custom_pipeline": (_config("model_index.json", custom_pipeline="evil/evil"), "custom_pipeline"),
    "auto_map of the tokenizer": (_config("tokenizer/tokenizer_config.json", auto_map=AUTO_MAP), "auto_map"),
    "auto_map beside it": (_config("tokenizer/config.json", auto_map=AUTO_MAP), "auto_map"),
    "auto_map of the text encoder": (_config("text_encoder/config.json", auto_map=AUTO_MAP), "auto_map"),
    "auto_map of the transformer": (_config("transformer/config.json", auto_map=AUTO_MAP), "auto_map"),
    "auto_map inside": (_config("text_encoder/config.json", sub=[{"auto_map": AUTO_MAP}]), "auto_map"),
    "trust_remote_code": (_config("text_encoder/config.json", trust_remote_code=True), "trust_remote_code"),
    "attention from the hub": (_config("text_encoder/config.json", attn_implementation="evil/kernels"), "evil/kernels"),
    "the same, inside": (_config("text_encoder/config.json", _attn_implementation_internal="evil/k:x"), "evil/k:x"),
    "tokenizer class": (_config("tokenizer/tokenizer_config.json", tokenizer_class="Evil"), "tokenizer_class='Evil'"),
    "shard above": (_shard("../../secret.safetensors"), "outside its folder"),
    "shard anywhere": (_shard("/etc/passwd"), "outside its folder"),
    "shard with a NUL byte": (_shard("a\0.safetensors"), r"a\x00.safetensors"),
    "shard with a long name": (_shard("a" * 5000 + ".safetensors"), "(5014 characters)"),
    "shard with a long path": (_shard("/a" * 5000 + ".safetensors"), "characters) outside"),
    "shard that is a pickle": (_shard("pytorch_model.bin"), "no .safetensors file"),
    "shard that is a pipe": (_pipe(WEIGHTS), "is no file"),
    "config that is a pipe": (_pipe("transformer/config.json"), "is missing"),
    "deep JSON": (_text("transformer/config.json", '{"a":' * 10**5), "cannot be read as JSON"),
    "implementations in one another": (
        _text("transformer/config.json", '{"a_implementation":' * 900 + f'["{"b" * 4_000_000}"]' + "}" * 900),
        "nested more than",
    ),
    "int8 weights": (_quantized("transformer"), "tensors are I8"),
    "int8 weights of the text encoder": (_quantized("text_encoder"), "tensors are I8"),
    "flow_shift that is no number": (_config("scheduler/scheduler_config.json", flow_shift=float("nan")), "flow_shift"),
    "a negative number of timesteps": (
        _config("scheduler/scheduler_config.json", num_train_timesteps=-5),
        "num_train_timesteps=-5",
    ),
    "deep lists": (_text("model_index.json", "[" * 10**6 + "]" * 10**6), "cannot be read as JSON"),
    "JSON with a large number": (_text("vae/config.json", '{"z_dim": ' + "9" * 5000 + "}"), "cannot be read as JSON"),
    "large JSON": (_text("vae/config.json", " " * (1 << 25)), "bytes"),
    "many layers": (_config("transformer/config.json", num_layers=10**9), "num_layers=1000000000"),
    "many layers of text": (_config("text_encoder/config.json", num_layers=10**9), "num_layers=1000000000"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.timeout(60)
def test_a_model_that_brings_code_or_traps_is_refused(
    refused: Callable[..., str], wan21: Path, tmp_path: Path, name: str
) -> None:
    model = Path(shutil.copytree(wan21, tmp_path / "model"))
    (tmp_path / "secret.safetensors").write_bytes((model / WEIGHTS).read_bytes())
    damage, expected = MODELS[name]
    damage(model, tmp_path / "marks")
    assert expected in refused("--prompt", "a cat", "--model", model, "--out", "a.mp4")


@pytest.mark.parametrize(
    "name",
    ["config that is a pipe", "large JSON", "deep JSON", "auto_map of the transformer", "auto_map inside",
     "attention from the hub", "many layers", "many layers of text", "pipeline.py"],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_a_plan_reads_configs_under_the_same_caps(
    refused: Callable[..., str], wan21: Path, tmp_path: Path, name: str
) -> None:
    model = Path(shutil.copytree(wan21, tmp_path / "model"))
    damage, expected = MODELS[name]
    damage(model, tmp_path / "marks")
    assert expected in refused("--model", model, "--gpus", "2xh100", command=["plan"])


def test_links_within_a_model_are_read(wan21: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links to files elsewhere: only what is written must not follow one."""
    model = Path(shutil.copytree(wan21, tmp_path / "model"))
    shutil.move(model / WEIGHTS, tmp_path / "blob")
    (model / WEIGHTS).symlink_to(tmp_path / "blob")
    ModelFiles(model).check_weights()


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 300, "nul\0byte", "../" * 2000 + "x", "loop"])
def test_a_model_name_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelError) as error:
        resolve_model(name)
    assert len(str(error.value)) < 1000


def _safetensors(path: Path, padding: int) -> Path:
    """A legal file whose header is that much longer than it needs to be."""
    entry = {"latents": {"dtype": "F32", "shape": [1, 1, 1, 1, 1], "data_offsets": [0, 4]}}
    header = json.dumps(entry).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return path


def test_a_huge_header_of_latents_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_latents(_safetensors(tmp_path / "a.safetensors", latents_file._MAX_HEADER_BYTES - 1000)).numel() == 1
    large = _safetensors(tmp_path / "b.safetensors", latents_file._MAX_HEADER_BYTES)
    monkeypatch.setattr(safetensors, "safe_open", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(ValueError, match=r"a header of 10[0-9]+ bytes, at most 1048576"):
        read_latents(large)


def test_the_library_refuses_a_header_beyond_its_limit(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    with open(folder / "a.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 10**9) + b"{")
        file.truncate(10**9 + 100)  # sparse
    with pytest.raises(ModelError, match="header too large"):
        WeightFiles(folder)


def test_latents_from_a_pipe_are_not_waited_for(refused: Callable[..., str], wan21: Path) -> None:
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    flags = ["--prompt", "a cat", "--model", wan21, "--stages", 2, "--num-frames", 5]
    for name in ("pipe", "link", "/dev/zero"):
        assert "not a safetensors file" in refused(*flags, "--latents-in", name)


# Outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--out", "--latents-out", "--timeline"])
@pytest.mark.parametrize("name", ["n" * 5000, "link"])
def test_a_name_that_no_output_can_have(refused: Callable[..., str], wan21: Path, flag: str, name: str) -> None:
    end = {"--out": ".mp4", "--latents-out": ".safetensors", "--timeline": ".json"}[flag]
    Path(f"link{end}").symlink_to("nowhere")
    error = refused("--prompt", "a cat", "--model", wan21, "--num-frames", 5, flag, name + end)
    assert flag[2:] in error
    assert not Path("nowhere").exists()


def test_a_name_with_a_nul_byte_is_refused(tmp_path: Path) -> None:
    """Not by way of a command line, which ends there, but from Python."""
    with pytest.raises(OutputError, match="NUL byte"):
        check_out(tmp_path / "a\0b.mp4", overwrite=False)
    with pytest.raises(OutputError, match="NUL byte"):
        check_file(tmp_path / "a\0b", "--latents-out", overwrite=True)


def test_a_folder_of_blocks_that_is_a_link_is_refused(refused: Callable[..., str], wan21: Path) -> None:
    Path("elsewhere").mkdir()
    (Path("elsewhere") / "block-000000.mp4.tmp").touch()
    Path("a.mp4.blocks").symlink_to("elsewhere")
    flags = ["--prompt", "a cat", "--model", wan21, "--num-frames", 5]
    for more in ([], ["--overwrite"]):
        assert "a.mp4.blocks is a link" in refused(*flags, "--out", "a.mp4", *more)
    assert (Path("elsewhere") / "block-000000.mp4.tmp").exists()


def test_a_line_break_in_a_name_does_not_forge_a_line(refused: Callable[..., str], wan21: Path) -> None:
    error = refused(
        "--prompt", "a cat", "--model", wan21, "--num-frames", 5, "--out", "a\nWARNING all is well\x1b[2J.b"
    )
    assert r"a\nWARNING" in error and "\x1b" not in error


def _segment(folder: Path) -> None:
    SegmentWriter(folder, 16).write(0, FRAMES)


def _join(folder: Path) -> None:
    video = open_output(folder / "a.mp4", 16)
    video.write(0, FRAMES)
    video.close()


def _merge(folder: Path) -> None:
    Recorder(folder / "run.json").close()
    merge(folder / "run.json")


def _picture(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    (folder / "run.json").write_text(
        '{"traceEvents":[\n{"ph":"X","pid":1,"tid":10,"cat":"compute","name":"run b0s0","ts":0,"dur":5,'
        '"args":{"block":0}}\n]}\n'
    )
    picture.draw(folder / "run.json")


def _error(folder: Path) -> None:
    supervise([sys.executable, "-c", "raise SystemExit(7)"], 1, error_path=folder / "error.json")
    raise OSError  # told in the log, because it must not hide the failure


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "segment": ("block-000000.mp4", _segment),
    "playlist": ("playlist.m3u", _segment),
    "video": ("a.mp4", _join),
    "picture": ("frame-00000001.png", lambda folder: PngWriter(folder).write(0, FRAMES) and None),
    "latents": ("a.safetensors", lambda folder: write_latents(folder / "a.safetensors", torch.zeros(1, 1, 1, 1, 1))),
    "timeline": ("run.json", _merge),
    "drawing": ("run.png", _picture),
    "error": ("error.json", _error),
}


@pytest.mark.parametrize("kind", ["file", "nothing"])
@pytest.mark.parametrize("name", WRITERS)
def test_no_output_is_written_through_a_link(tmp_path: Path, name: str, kind: str) -> None:
    file, write = WRITERS[name]
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    folder.mkdir()
    if kind == "file":
        victim.write_text("mine")
    (folder / f"{file}.tmp").symlink_to(victim)
    with pytest.raises(OSError):
        write(folder)
    assert victim.read_text() == "mine" if kind == "file" else not victim.exists()

    (folder / f"{file}.tmp").unlink()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / file).symlink_to(victim)  # a link under the final name is replaced, not followed
    if name not in ("segment", "picture", "error"):  # these find what an earlier run left, or unlink it first
        write(folder)
        assert not (folder / file).is_symlink()
    assert victim.read_text() == "mine" if kind == "file" else not victim.exists()


def test_a_rank_s_part_of_a_timeline_is_not_written_through_a_link(tmp_path: Path) -> None:
    folder = parts_of(tmp_path / "run.json")
    folder.mkdir()
    (folder / "rank-00000-of-00001.json").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        Recorder(tmp_path / "run.json")
    assert not (tmp_path / "victim").exists()


def test_the_package_has_no_way_to_a_pickle() -> None:
    """Not even one that is never taken."""
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
    calls = {"eval", "exec", "torch.load", "torch.save", "np.load", "hub.load"}
    found = []
    for folder in (Path(dualparal.__file__).parent, ROOT / "kernels"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                    bad = bool(names & modules)
                elif isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    flags = {k.arg for k in node.keywords if ast.unparse(k.value) != "False"}
                    bad = name in calls or "_object" in name or bool(flags & {"trust_remote_code", "allow_pickle"})
                else:
                    continue
                if bad:
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []
