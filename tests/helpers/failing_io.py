"""A whole ``dualparal generate`` with one of its writing calls failing, torn or the last: then it is called once more.

    python tests/helpers/failing_io.py [--every 1] [--kinds fail,kill,tear,power] [--out pictures] [--resume] [--seed 0]

Every open for writing, write, sync, rename, link removed and folder made or removed below the run's folder is a call,
numbered as they come. For each number and kind a process of its own (forked, since imports take seconds) runs into it
there; then the same command runs again, with nothing in its way. What it leaves must be the bytes of a run that nobody
disturbed, and nothing besides. "power" is a power cut: of what was not synced by then a seeded choice is lost
(``power_cut``); a quarter of the runs that go on meet another one, and no snapshot or segment that was safe is lost.
Prints what happened, and ends with 1 when anything else did.
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
import random
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

from power_cut import PowerCut

KINDS = ("fail", "kill", "tear", "power")
_KILLED = 128 + signal.SIGKILL
_SLOW = {"dualparal", "torch", "diffusers", "transformers", "tokenizers", "av", "matplotlib", "numpy", "PIL", "rich"}
_SECONDS = 180.0  # after which a run hangs


class Disk:
    """Counts the calls below a folder, and disturbs one of them.

    Args:
        folder: the run's.
        number: of the call, from 0 on; -1: none.
        kind: "fail" raises OSError (no space), "kill" ends the process before the call, "tear" after the first
            half of a write, and "power" loses what is not synced besides.
        log: descriptor to which a line per call is written.
        seed: of what a power cut loses.
    """

    def __init__(self, folder: Path, number: int, kind: str, log: int, seed: str = "") -> None:
        self.folder, self.number, self.kind, self.log, self.seed = str(folder.resolve()), number, kind, log, seed
        self.count = 0
        self.power = PowerCut(self.folder) if kind == "power" and number >= 0 else None
        self._lock = threading.RLock()  # one call at a time: a power cut looks at all of the folder
        self._dark = False

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
            if isinstance(file, int) or not set(mode) & set("wax+") or not self._below(file, None):
                return opened(file, mode, *args, **kwargs)
            with self._lock:
                self._meet("open", file, None)
                result = opened(file, mode, *args, **kwargs)
                self._note("open", (file,), {})
                return result

        builtins.open = watched  # type: ignore[assignment]

    def _wrap(self, owner: Any, name: str, wanted: Callable[..., Any], tear: Callable[..., None] | None = None) -> None:
        do = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._dark or not wanted(*args, **kwargs):
                return do(*args, **kwargs)
            with self._lock:
                self._meet(name, args[0], None if tear is None else lambda: tear(do, *args))
                result = do(*args, **kwargs)
                self._note(name, args, kwargs)
                return result

        setattr(owner, name, watched)

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tells the power cut of a call that was made."""
        if self.power is None or "write" in name or name == "ftruncate":
            return
        if name == "fsync":
            self.power.synced(args[0])
            return
        for path in args[:2] if name in ("replace", "rename") else args[:1]:
            self.power.renamed(os.path.dirname(self._full(path, kwargs.get("dir_fd"))))

    def end(self) -> None:
        """The end of the run, at which the power may go out, too."""
        if self.power is not None and self.number >= self.count:
            self._cut()

    def _cut(self) -> None:
        assert self.power is not None
        self._dark = True
        self.power.happen(self.seed)
        os.kill(os.getpid(), signal.SIGKILL)

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
        if self.kind == "power":
            self._cut()
        if self.kind == "tear" and tear is not None:
            tear()
        os.kill(os.getpid(), signal.SIGKILL)

    def _below(self, path: Any, folder: int | None) -> bool:
        return self._below_open(path) if isinstance(path, int) else self._full(path, folder).startswith(self.folder)

    @staticmethod
    def _full(path: Any, folder: int | None) -> str:
        where = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
        return os.path.join(where, os.fspath(path))

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


def run(folder: Path, arguments: list[str], number: int = -1, kind: str = "fail", seed: str = "") -> Ended:
    """``dualparal generate`` in a process forked from this one, in ``folder``, disturbed at a call."""
    read, write = os.pipe()
    said = folder.with_name(folder.name + ".said")
    child = os.fork()
    if child == 0:
        os.close(read)
        _become(folder, arguments, Disk(folder, number, kind, write, seed), said)
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
        disk.end()
        _say(disk.log, "".join(f"module {name}\n" for name in list(sys.modules)).encode())
    finally:
        os._exit(code)


def left(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a run, by name; none of a timeline and its picture, whose times differ."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: b"" if name.startswith("trace") else path.read_bytes() for name, path in found.items()}


class Form(NamedTuple):
    """A command and how it is gone on with: ``--resume-or-start`` as it is, else by ``--resume``."""

    model: Path
    out: str
    resume: bool

    def first(self) -> list[str]:
        """The arguments of a small run with all that writes: segments or pictures, latents, snapshots, a trace."""
        made = ["--out", self.out, "--latents-out", "a.safetensors"]
        size = ["--height", "32", "--width", "32", "--steps", "2", "--num-frames", "25", "--frames-per-block", "2"]
        video = ["--prompt", "a cat", "--context", "paper", "--context-frames", "1", "--model", str(self.model), *size]
        kept = ["--checkpoint" if self.resume else "--resume-or-start", "kept"]
        return [*video, *made, *kept, *self._here(), "--timeline", "trace.json", "--device", "cpu"]

    def again(self, folder: Path) -> list[str]:
        """The arguments that a folder needs; empty: nothing is left to do."""
        if not self.resume:
            return self.first()
        if any((folder / "kept").glob("snapshot-*.safetensors")):
            return ["--resume", "kept", *self._here()]  # a trace of its own would not go over the one that is there
        done = (folder / self.out).exists() and (folder / "a.safetensors").exists()
        return [] if done and not (folder / f"{self.out}.blocks").exists() else [*self.first(), "--overwrite"]

    def _here(self) -> list[str]:
        return ["--checkpoint-every", "1", "--threads", "1"]


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


def cases(form: Form, folder: Path, every: int, kinds: Sequence[str], start: int = 0, seed: int = 0) -> Iterator[Case]:
    """Runs a command undisturbed, then into every ``every``-th of its calls from ``start``, and yields what came of it.

    For "tear" only writes count. The power goes out after the last call, too.
    """
    whole = folder / "whole"
    whole.mkdir()
    first = run(whole, form.first())
    assert first.code == 0, first.said
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("none")  # kept by it: a quarter of a child's time
    gc.freeze()  # a child looks for garbage among its own objects only
    wanted = left(whole)
    for kind in kinds:
        numbers = [n for n, (name, _) in enumerate(first.calls) if kind != "tear" or "write" in name]
        for number in [*numbers, *([len(first.calls)] if kind == "power" else [])][start::every]:
            yield _case(folder / "broken", form, wanted, kind, number, f"{seed} {number}")


def _case(place: Path, form: Form, wanted: dict[str, bytes], kind: str, number: int, seed: str) -> Case:
    place.mkdir()
    rng = random.Random(seed)
    try:
        ended = run(place, form.first(), number, kind, seed)
        reached = number < len(ended.calls)
        call = " ".join(ended.calls[number]) if reached else "none: this run had fewer calls"
        expected = (_KILLED,) if kind != "fail" and (reached or kind == "power") else (0, 2, 5, 143)
        fault = "" if ended.code in expected else f"exit code {ended.code}: {ended.said[-500:]}"
        at_once = left(place)
        if ended.code == 0 and any(at_once.get(name) != data for name, data in wanted.items() if not _may(name)):
            fault = "said that it was done, and was not"
        safe = _snapshot_that_is_safe(ended.calls[:number]) if kind == "power" else 0
        if kind == "power" and rng.random() < 0.25 and (arguments := form.again(place)):
            cut = run(place, arguments, rng.randrange(len(ended.calls) + 1), kind, seed + " again")
            fault = fault or ("" if cut.code == _KILLED else f"exit code {cut.code}: {cut.said[-500:]}")
        arguments = form.again(place)
        again = run(place, arguments) if arguments else Ended(0, [], "")
        anew = any(name == "open" and file.startswith("snapshot-0000000000-") for name, file in again.calls)
        how = "done" if ended.code == 0 or not arguments else "begun anew" if anew else "gone on"
        # A lock file locks nobody out; one that a killed run left goes with the next, if there is one.
        got = {name: data for name, data in left(place).items() if arguments or not name.endswith(".lock")}
        if again.code:
            fault = fault or f"then exit code {again.code}: {again.said[-500:]}"
        if safe and (anew or "made again" in again.said):
            fault = fault or f"what was safe was lost: {again.said[-500:]}"
        different = sorted(name for name in {*got, *wanted} if got.get(name) != wanted.get(name) and not _may(name))
        if different and not fault:
            fault = f"other files: {different}"
        return Case(kind, number, call, f"{ended.code}, {how}", fault)
    finally:
        shutil.rmtree(place)


def _snapshot_that_is_safe(calls: Sequence[tuple[str, str]]) -> int:
    """The iteration of the newest snapshot whose name was synced within some calls; 0: there is none to lose."""
    safe = renamed = 0
    for name, file in calls:
        if name == "replace" and (found := re.match(r"snapshot-(\d{10})-", file)):
            renamed = int(found[1])
        elif name == "fsync" and file == "kept":
            safe = renamed
    return safe


def _may(name: str) -> bool:
    """True for files that may differ: the snapshot which says that the run is done has an id of its own."""
    return re.fullmatch(r"kept/snapshot-.*|trace\..*", name) is not None


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--every", type=int, default=1, help="of the calls (default: all)")
    options.add_argument("--start", type=int, default=0, help="the first of them (default: %(default)s)")
    options.add_argument("--kinds", default=",".join(KINDS))
    options.add_argument("--out", default="a.mp4", help="a.mp4, or a folder for pictures (default: %(default)s)")
    options.add_argument("--resume", action="store_true", help="go on by --resume, not by the same command")
    options.add_argument("--seed", type=int, default=0, help="of what power cuts lose (default: %(default)s)")
    given = options.parse_args()
    import torch

    torch.set_num_threads(1)  # a thread would not survive the fork
    began, ends, faults = time.monotonic(), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="failing-io-") as name:
        form = Form(tiny_model(Path(name) / "model"), given.out, given.resume)
        for case in cases(form, Path(name), given.every, given.kinds.split(","), given.start, given.seed):
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
