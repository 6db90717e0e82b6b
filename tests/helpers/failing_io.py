"""A whole ``dualparal generate`` with one of its writing calls failing, torn or the last: then it is called once more.

    python tests/helpers/failing_io.py [--every 1] [--kinds fail,kill,tear] [--out pictures]

Every open for writing, write, sync, rename, link removed and folder made or removed below the run's folder is a call,
numbered as they come. For each number and kind a process of its own (forked, since imports take seconds) runs into it
there; then the same command runs again, with nothing in its way. What it leaves must be the bytes of a run that nobody
disturbed, and nothing besides. Prints what happened, and ends with 1 when anything else did.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import gc
import importlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("fail", "kill", "tear")
_KILLED = 128 + signal.SIGKILL
_SLOW = {"dualparal", "torch", "diffusers", "transformers", "tokenizers", "av", "matplotlib", "numpy", "PIL", "rich"}
_SECONDS = 180.0  # after which a run hangs


class Disk:
    """Counts the calls below a folder, and disturbs one of them.

    Args:
        folder: the run's.
        number: of the call, from 0 on; -1: none.
        kind: "fail" raises OSError (no space), "kill" ends the process before the call, and "tear" after the first
            half of a write.
        log: descriptor to which a line per call is written.
    """

    def __init__(self, folder: Path, number: int, kind: str, log: int) -> None:
        self.folder, self.number, self.kind, self.log = str(folder.resolve()), number, kind, log
        self.count = 0
        self._lock = threading.Lock()

    def patch(self) -> None:
        """Puts itself between Python and the calls, for the rest of this process."""
        for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir"):
            self._wrap(os, name, lambda path, *args, **kwargs: self._below(path, kwargs.get("dir_fd")))
        self._wrap(os, "fsync", lambda target: self._below_open(target))
        self._wrap(os, "ftruncate", lambda target, size: self._below_open(target))
        self._wrap(os, "open", lambda path, flags, *args, **kwargs: flags & os.O_CREAT and self._below(path, None))
        for owner, name in ((os, "write"), (os, "pwrite")):
            self._wrap(owner, name, lambda target, *args: self._below_open(target), tear=self._tear_write)
        from dualparal.io.files import WholeFile

        self._wrap(WholeFile, "write", lambda file, data: self._below_open(file.fileno()), tear=self._tear_file)
        opened = builtins.open

        def watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, int) and set(mode) & set("wax+") and self._below(file, None):
                self._meet("open", file, None)
            return opened(file, mode, *args, **kwargs)

        builtins.open = watched  # type: ignore[assignment]

    def _wrap(self, owner: Any, name: str, wanted: Callable[..., Any], tear: Callable[..., None] | None = None) -> None:
        do = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if wanted(*args, **kwargs):
                self._meet(name, args[0], None if tear is None else lambda: tear(do, *args))
            return do(*args, **kwargs)

        setattr(owner, name, watched)

    @staticmethod
    def _tear_write(do: Callable[..., Any], target: int, data: bytes, *rest: int) -> None:
        do(target, data[: len(data) // 2], *rest)

    @staticmethod
    def _tear_file(do: Callable[..., Any], file: io.FileIO, data: Any) -> None:
        view = memoryview(data).cast("B")
        do(file, view[: len(view) // 2])

    def _meet(self, name: str, what: Any, tear: Callable[[], None] | None) -> None:
        with self._lock:
            number, self.count = self.count, self.count + 1
        shown = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else getattr(what, "name", what)
        _say(self.log, f"{number} {name} {os.path.basename(os.fspath(shown))}\n".encode())
        if number != self.number:
            return
        if self.kind == "fail":
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(shown))
            if isinstance(what, io.FileIO):
                what.failure = error  # type: ignore[attr-defined]  # as the write itself keeps it
            raise error
        if self.kind == "tear" and tear is not None:
            tear()
        os.kill(os.getpid(), signal.SIGKILL)

    def _below(self, path: Any, folder: int | None) -> bool:
        if isinstance(path, int):
            return self._below_open(path)
        where = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
        return os.path.join(where, os.fspath(path)).startswith(self.folder)

    def _below_open(self, target: int) -> bool:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{target}").startswith(self.folder)
        return False


_say = os.write  # before it is watched


class Ended(NamedTuple):
    """The end of a run: its exit code, its calls as (name, file), and what it said."""

    code: int
    calls: list[tuple[str, str]]
    said: str


def run(folder: Path, arguments: list[str], number: int = -1, kind: str = "fail") -> Ended:
    """``dualparal generate`` in a process forked from this one, in ``folder``, disturbed at a call."""
    read, write = os.pipe()
    said = folder.with_name(folder.name + ".said")
    child = os.fork()
    if child == 0:
        _become(folder, arguments, Disk(folder, number, kind, write), said)
    os.close(write)
    kill = threading.Timer(_SECONDS, os.kill, (child, signal.SIGKILL))
    kill.start()
    with open(read, encoding="utf-8") as log:
        lines = log.read().splitlines()
    _, status = os.waitpid(child, 0)
    hung = not kill.is_alive()
    kill.cancel()
    code = os.waitstatus_to_exitcode(status)
    calls = [tuple(line.split(" ", 2)[1:]) for line in lines if not line.startswith("module ")]
    for name in [line.removeprefix("module ") for line in lines if line.startswith("module ")]:
        if name not in sys.modules and name.partition(".")[0] in _SLOW:
            with contextlib.suppress(Exception):
                importlib.import_module(name)  # the next child has it already
    return Ended(-1 if hung else code % 256 if code >= 0 else 128 - code, calls, said.read_text())  # type: ignore[arg-type]


def _become(folder: Path, arguments: list[str], disk: Disk, said: Path) -> None:
    """The child: never returns."""
    code = 99
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)
        sys.argv = ["dualparal", "generate", *arguments]
        from dualparal.cli import main

        disk.patch()
        try:
            main.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        _say(disk.log, "".join(f"module {name}\n" for name in list(sys.modules)).encode())
    finally:
        os._exit(code)


def left(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a run, by name; none of a timeline and its picture, whose times differ."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: b"" if name.startswith("trace") else path.read_bytes() for name, path in found.items()}


def command(model: Path, out: str = "a.mp4") -> list[str]:
    """The arguments of a small run with all that writes: segments or pictures, latents, snapshots, a trace."""
    made = ["--out", out, "--latents-out", "a.safetensors", "--timeline", "trace.json"]
    size = ["--height", "32", "--width", "32", "--steps", "2", "--num-frames", "25", "--frames-per-block", "2"]
    video = ["--prompt", "a cat", "--context", "paper", "--context-frames", "1", "--model", str(model), *size]
    kept = ["--resume-or-start", "kept", "--checkpoint-every", "1"]
    return [*video, *made, *kept, "--device", "cpu", "--threads", "1"]


class Case(NamedTuple):
    """A disturbed call and what came of it; ``fault`` is empty where all is well."""

    kind: str
    number: int
    call: str
    ended: str
    fault: str


def tiny_model(folder: Path) -> Path:
    """A model to make videos with. It is made in a process of its own: one that computed is not to be forked."""
    from dualparal.models.wan.tiny import build_tiny_pipeline

    child = os.fork()
    if child == 0:
        build_tiny_pipeline(folder, layers=2)
        os._exit(0)
    os.waitpid(child, 0)
    return folder


def cases(model: Path, folder: Path, every: int, kinds: Sequence[str], out: str, start: int = 0) -> Iterator[Case]:
    """Runs a command undisturbed, then into every ``every``-th of its calls from ``start``, and yields what came of it.

    For "tear" only writes count.
    """
    arguments = command(model, out)
    whole = folder / "whole"
    whole.mkdir()
    first = run(whole, arguments)
    assert first.code == 0, first.said
    gc.freeze()  # a child looks for garbage among its own objects only
    wanted = left(whole)
    for kind in kinds:
        numbers = [n for n, (name, _) in enumerate(first.calls) if kind != "tear" or "write" in name]
        for number in numbers[start::every]:
            yield _case(folder / "broken", arguments, wanted, kind, number)


def _case(place: Path, arguments: list[str], wanted: dict[str, bytes], kind: str, number: int) -> Case:
    place.mkdir()
    try:
        ended = run(place, arguments, number, kind)
        call = " ".join(ended.calls[number]) if number < len(ended.calls) else "none: this run had fewer calls"
        expected = (_KILLED,) if kind != "fail" and number < len(ended.calls) else (0, 2, 5, 143)
        fault = "" if ended.code in expected else f"exit code {ended.code}: {ended.said[-500:]}"
        at_once = left(place)
        if ended.code == 0 and any(at_once.get(name) != data for name, data in wanted.items() if not _may(name)):
            fault = "said that it was done, and was not"
        again = run(place, arguments)
        anew = any(file.startswith("snapshot-0000000000-") for _, file in again.calls)
        how = "done" if ended.code == 0 else "begun anew" if anew else "gone on"
        got = left(place)
        if again.code:
            fault = fault or f"then exit code {again.code}: {again.said[-500:]}"
        different = sorted(name for name in {*got, *wanted} if got.get(name) != wanted.get(name) and not _may(name))
        if different and not fault:
            fault = f"other files: {different}"
        return Case(kind, number, call, f"{ended.code}, {how}", fault)
    finally:
        shutil.rmtree(place)


def _may(name: str) -> bool:
    """True for files that may differ: the snapshot which says that the run is done has an id of its own."""
    return re.fullmatch(r"kept/snapshot-.*|trace\..*", name) is not None


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--every", type=int, default=1, help="of the calls (default: all)")
    options.add_argument("--start", type=int, default=0, help="the first of them (default: %(default)s)")
    options.add_argument("--kinds", default=",".join(KINDS))
    options.add_argument("--out", default="a.mp4", help="a.mp4, or a folder for pictures (default: %(default)s)")
    given = options.parse_args()
    import torch

    torch.set_num_threads(1)  # a thread would not survive the fork
    began, ends, faults = time.monotonic(), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="failing-io-") as name:
        model = tiny_model(Path(name) / "model")
        for case in cases(model, Path(name), given.every, given.kinds.split(","), given.out, given.start):
            ends[f"{case.kind}: exit {case.ended}"] += 1
            if case.fault:
                faults += 1
                print(f"{case.kind} {case.number} ({case.call}): {case.fault}", flush=True)
    for end, count in sorted(ends.items()):
        print(f"{count:5d}  {end}")
    print(f"{sum(ends.values())} calls disturbed, {faults} faults, {time.monotonic() - began:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
