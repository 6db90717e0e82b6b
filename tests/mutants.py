"""Guards of the project as data, and the command that removes each of them and sees whether its tests notice.

    python tests/mutants.py                      # all of them, in a quarter of an hour
    python tests/mutants.py handshake snapshot   # those whose name or file holds one of these
    python tests/mutants.py --changed            # those of files that differ from the last commit
    python tests/mutants.py --write              # and put the verdicts into docs/reliability.md

Every mutant lives in a copy of the checkout. Its tests must pass there before it is changed, and fail afterwards.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- mutants -->", "<!-- end of mutants -->"
SECONDS = 120  # for the tests of one mutant
NOTICED, SURVIVED, BROKEN, NOT_RUN = "noticed", "SURVIVED", "BROKEN", "not run yet"
_HEAVY = ("torch", "torch.distributed", "diffusers", "transformers", "hypothesis", "av", "psutil")


class Guard(NamedTuple):
    """A guard: what it keeps, where it is, what stands there without it, and which tests must notice.

    Attributes:
        tests: arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _off(name: str, file: str, condition: str, *tests: str) -> Guard:
    """A guard that is a condition of an ``if``: without it, it never holds."""
    return Guard(name, file, f"if {condition}:", "if False:", tests)


def _gone(name: str, file: str, statement: str, *tests: str) -> Guard:
    """A guard that is a statement: without it nothing happens there."""
    return Guard(name, file, statement, "pass", tests)


SUPERVISOR = "tests/launch/test_supervisor.py"
BLAME = SUPERVISOR, "-k", "blame"
HANDSHAKE = "tests/distributed/test_handshake.py"
TRANSPORT = "tests/distributed/test_transport.py"
PRIVATE = "tests/distributed/test_private.py"
WATCH = "tests/distributed/test_watch.py"
RESUME = "tests/checkpoint/test_resume.py"
POWER = "tests/io/test_power_cut.py"
FILES, VIDEO, OUTPUT = "tests/io/test_files.py", "tests/io/test_video.py", "tests/io/test_output.py"
SECURITY = "tests/repository/test_security.py"
MODEL = f"{SECURITY}::test_a_model_that_brings_code_or_traps_is_refused"
LOADING = "tests/models/test_loading.py"
SURROUNDINGS = "tests/cli/test_surroundings.py"
ROUTES, HOSTILE = "tests/server/test_routes.py", "tests/server/test_hostile.py"

GUARDS = (
    # Who is to blame -----------------------------------------------------------------------------------------------
    _off("a death by signal beats all other causes", "dualparal/launch/blame.py", "killed", *BLAME),
    Guard(
        "a rank's own error waits for a death that explains it", "dualparal/launch/blame.py",
        "if now - first.told_at >= limits.error_hold else None", "", BLAME,
    ),
    _off("a lost peer waits for its own story", "dualparal/launch/blame.py",
         "now - report.at < limits.peer_error_hold", *BLAME),
    Guard("who waits is innocent", "dualparal/launch/blame.py",
          "if not (s.waiting or _held(s, states))]", "if not _held(s, states)]", BLAME),
    Guard("a place is innocent while another waits for what comes before", "dualparal/launch/blame.py",
          "not (s.waiting or _held(s, states))", "not s.waiting", BLAME),
    Guard("a place is not innocent for one that waits for what comes after", "dualparal/launch/blame.py",
          "s.action < state.action", "True", BLAME),
    Guard("patience with a rank that starts", "dualparal/launch/blame.py",
          "return max(limit, limits.startup) if state.starting else limit", "return limit", BLAME),
    Guard("silence is noticed", "dualparal/launch/blame.py", "if not quiet:", "if True:", BLAME),
    Guard("no progress is noticed", "dualparal/launch/blame.py",
          "if not busy and not (late and deadlock):", "if True:", BLAME),
    Guard("a rank's first word counts", "dualparal/launch/blame.py",
          "self.error = self.error or report", "self.error = report", (SUPERVISOR, "-k", "first_word")),
    # The supervisor ------------------------------------------------------------------------------------------------
    Guard("a signal in start-up ends it at once", "dualparal/launch/supervisor.py",
          "starting = any(state.starting for state in alive)", "starting = False",
          (SUPERVISOR, "-k", "signal_in_start_up")),
    _gone("a signal to the ranks is meant for the run", "dualparal/launch/supervisor.py",
          "self._told = self._told or signal.Signals(number)", SUPERVISOR, "-k", "signal_to_the_ranks"),
    Guard("a second signal kills", "dualparal/launch/supervisor.py",
          "len(self._signals) < 2 and ", "", (SUPERVISOR, "-k", "second_signal")),
    Guard("grace has an end", "dualparal/launch/supervisor.py",
          " and now < self._stop_by:", ":", (SUPERVISOR, "-k", "ignores_the_request")),
    _off("time in which the parent slept counts for nobody", "dualparal/launch/supervisor.py",
         "away_since is not None", SUPERVISOR, "-k", "parent_slept_with"),
    _gone("an old error.json goes away", "dualparal/launch/supervisor.py",
          "self._error_path.unlink(missing_ok=True)", SUPERVISOR, "-k", "error_json_tells"),
    Guard("what a rank started goes with it", "dualparal/launch/process.py",
          "                self.signal_group(signal.SIGKILL)\n", "", (SUPERVISOR, "-k", "started_goes_with_it")),
    Guard("the end of the life pipe ends a rank", "dualparal/launch/heartbeat.py",
          "            pipes.die()\n", "            raise SystemExit\n", (SUPERVISOR, "-k", "life_pipe")),
    Guard("a rank that cannot run dies with its parent", "dualparal/launch/heartbeat.py",
          "        _die_with_parent()\n", "", (SUPERVISOR, "-k", "outlives_its_parent")),
    Guard("a rank's children do not take its pipes for theirs", "dualparal/launch/heartbeat.py",
          "os.environ.pop(STATUS_FD, None), os.environ.pop(LIFE_FD, None)",
          "os.environ.get(STATUS_FD), os.environ.get(LIFE_FD)", (SUPERVISOR, "-k", "get_their_place")),
    _gone("a living run's folder stays", "dualparal/launch/folder.py",
          "flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", SUPERVISOR, "-k", "killed_run_s_folder"),
    _off("folders of others stay", "dualparal/launch/folder.py",
         "found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o700",
         SUPERVISOR, "-k", "killed_run_s_folder"),
    Guard("a killed run's folder goes", "dualparal/launch/folder.py",
          "    remove_abandoned(base, flock)\n    path, lock", "    path, lock",
          (SUPERVISOR, "-k", "killed_run_s_folder")),
    # Ranks among each other ----------------------------------------------------------------------------------------
    _gone("who hosts the store lingers until others have read", "dualparal/distributed/handshake.py",
          'wait_for(store, [_key("read", r) for r in reports], min(timeout, _LINGER_SECONDS))',
          HANDSHAKE, "-k", "hosts_the_store"),
    Guard("ranks that differ do not go on", "dualparal/distributed/handshake.py",
          "    if not differences:\n", "    if True:\n", (HANDSHAKE, "-k", "every_difference")),
    Guard("another number of ranks is no wait", "dualparal/distributed/handshake.py",
          'expected = min([expected, *(report["world_size"] for report in reports.values())])', "pass",
          (HANDSHAKE, "-k", "wrong_world_size")),
    Guard("a header's checksum", "dualparal/distributed/messages.py",
          " or values[-1] != zlib.crc32(fields[:-1].numpy().tobytes()):", ":", (TRANSPORT, "-k", "flipped_bit")),
    _off("a message's size", "dualparal/distributed/messages.py",
         "values[7] != elements or not 0 <= elements <= lengths.most", TRANSPORT, "-k", "another_size"),
    _off("a message's dtype", "dualparal/distributed/messages.py", "values[8] != _DTYPES.index(dtype)",
         TRANSPORT, "-k", "another_dtype"),
    _off("what does not fit is not sent", "dualparal/distributed/edges.py",
         "tensor.dtype != buffer.dtype or tensor.numel() > room", TRANSPORT, "-k", "does_not_fit"),
    _off("a parcel's header", "dualparal/distributed/parcels.py",
         "magic != _MAGIC or checksum != _checksum(header) or not known", "tests/distributed/test_parcels.py"),
    _off("another user's process is shown the door", "dualparal/distributed/private.py", "user != os.geteuid()",
         PRIVATE, "-k", "open_folder"),
    Guard("ranks of one machine listen on no port", "dualparal/distributed/mesh.py",
          "dist.init_process_group(private.NAME, store", 'dist.init_process_group("gloo", store',
          (PRIVATE, "-k", "gets_no_tensor")),
    _off("a message of another length", "dualparal/distributed/private.py", "length != len(data)",
         PRIVATE, "-k", "another_size"),
    Guard("nothing is read behind a broken message", "dualparal/distributed/private.py",
          "error = error or self._fill(", "error = self._fill(", (PRIVATE, "-k", "another_size")),
    Guard("a small message does not overtake a large one", "dualparal/distributed/private.py",
          "sent = 0 if self._unsent else self._connection", "sent = self._connection",
          (PRIVATE, "-k", "rest_of_a_large_one")),
    Guard("a run does not fail for figures", "dualparal/distributed/figures.py",
          "except (TimeoutError, RuntimeError, OSError) as error:", "except KeyboardInterrupt as error:",
          ("tests/distributed/test_figures.py",)),
    Guard("a beat must be a new one", "dualparal/distributed/watch.py",
          'elif beat.get("beat") != last.get("beat"):', "else:", (WATCH, "-k", "silent_rank")),
    Guard("who is done may be silent", "dualparal/distributed/watch.py",
          ' or beat.get("done"):', ":", (WATCH, "-k", "may_be_silent")),
    # Snapshots -----------------------------------------------------------------------------------------------------
    _off("a snapshot's checksum", "dualparal/checkpoint/sealed.py",
         'not path.stem.endswith("-" + checksum(data))', RESUME, "-k", "bytes_of_a_snapshot"),
    _off("no snapshot of NaN", "dualparal/checkpoint/snapshot.py",
         "tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite()",
         RESUME, "-k", "goes_on_from_nan"),
    _off("a snapshot's format", "dualparal/checkpoint/snapshot.py", 'metadata.get("format") != FORMAT',
         RESUME, "-k", "not_ours"),
    _off("a snapshot's version", "dualparal/checkpoint/snapshot.py", 'metadata.get("version") != str(VERSION)',
         RESUME, "-k", "not_ours"),
    Guard("snapshots are files of this user alone", "dualparal/checkpoint/sealed.py", "mode=0o600", "mode=0o666",
          (FILES, "-k", "this_user_alone")),
    Guard("and so is their folder", "dualparal/checkpoint/snapshot.py", "make_folder(folder, mode=0o700)",
          "make_folder(folder)",
          (FILES, "-k", "this_user_alone")),
    # Files ---------------------------------------------------------------------------------------------------------
    _off("a file that another process replaced is not committed", "dualparal/io/files.py",
         "not _is_still(file, aside)", VIDEO, "-k", "second_writer"),
    _gone("a file is synced before it is renamed", "dualparal/io/files.py", "os.fsync(file.fileno())",
          VIDEO, "-k", "order_of_sync"),
    _off("a folder is synced after a rename", "dualparal/io/files.py", "sync_directory",
         VIDEO, "-k", "order_of_sync"),
    _gone("a new folder is synced into the one above", "dualparal/io/files.py", "sync_folder(folder.parent)",
          POWER, "-k", "made_for_it"),
    Guard("a snapshot waits for the block that is being written", "dualparal/cli/results.py",
          "        self.settle()\n        return [[video[block]", "        return [[video[block]",
          ("tests/cli/test_results.py", "-k", "snapshot_waits")),
    _gone("older snapshots are gone before the last one goes", "dualparal/checkpoint/snapshot.py",
          "sync_folder(folder)", POWER, "-k", "removes_at_its_end"),
    _gone("segments are gone before the last snapshot goes", "dualparal/io/output.py", "sync_folder(path.parent)",
          POWER, "-k", "removes_at_its_end"),
    _off("an error of writing that was swallowed counts", "dualparal/io/files.py", "file.failure is not None",
         VIDEO, "-k", "swallowed"),
    _off("a folder that was removed is named", "dualparal/io/files.py", "not path.parent.is_dir()",
         FILES, "-k", "was_removed"),
    _gone("what a killed writer left goes", "dualparal/io/video.py",
          "remove_leftovers(self._directory, _OUR_NAMES)", VIDEO, "-k", "clears_leftovers"),
    _gone("and what an ended run had begun", "dualparal/io/output.py", "remove_leftovers(folder, names)",
          FILES, "-k", "had_begun"),
    _off("a video is not joined onto its own segment", "dualparal/io/video.py",
         "any(out.resolve() == path.resolve() for path in paths)", VIDEO, "-k", "join_refuses"),
    _off("a damaged segment is found by its boxes", "dualparal/io/video.py", "not _has_whole_boxes(file)",
         VIDEO, "-k", "damaged"),
    _off("blocks of another run are not dropped unasked", "dualparal/io/output.py",
         'path.suffix == ".mp4" and blocks.exists() and not overwrite and '
         "not (blocks.is_dir() and _holds_nothing(blocks))", OUTPUT, "-k", "only_on_request"),
    # Models --------------------------------------------------------------------------------------------------------
    _off("a config that names code", "dualparal/models/json_files.py",
         '(key in _CODE_KEYS and value) or (chooses_code and "/" in key)', MODEL, "-k", "auto_map"),
    _off("nested JSON", "dualparal/models/json_files.py", "depth > _MAX_DEPTH", MODEL, "-k", "implementations"),
    _off("large JSON", "dualparal/models/json_files.py", "path.stat().st_size > _MAX_JSON_BYTES",
         MODEL, "-k", "large and JSON and not number"),
    _off("quantized weights", "dualparal/models/headers.py", "odd", MODEL, "-k", "int8"),
    _off("shards outside their folder", "dualparal/models/headers.py", "Path(name).name != name",
         LOADING, "-k", "lead_out"),
    _off("indices of two variants", "dualparal/models/headers.py", "len(indices) > 1", LOADING, "-k", "two_variants"),
    _off("a sampler without noise levels", "dualparal/sampling/sampler.py", "odd",
         "tests/sampling/test_sampler.py", "-k", "no_noise_levels"),
    _off("a tokenizer that runs for ever", "dualparal/models/tokenizing.py", "ended.returncode < 0",
         "tests/models/test_tokenizing.py"),
    # The command line and requests ---------------------------------------------------------------------------------
    Guard("nobody reads stderr any more", "dualparal/cli/stderr.py", "        except OSError:  # a closed",
          "        except KeyboardInterrupt:  # a closed", (SURROUNDINGS, "-k", "closed_pipe")),
    Guard("modules of the current folder", "dualparal/cli/__init__.py", "\n\n_leave_out_the_current_folder()\n", "\n",
          (SURROUNDINGS, "-k", "pythonpath")),
    _off("a huge header of latents", "dualparal/io/latents.py", "size > _MAX_HEADER_BYTES",
         SECURITY, "-k", "huge_header"),
    Guard("norms of another processor's torch are left to it", "dualparal/models/wan/norms.py",
          " and is_exact()", "", ("tests/models/test_norms.py", "-k", "only_where_torch_is_slow")),
    Guard("a length of channels in another order is torch's", "dualparal/models/wan/norms.py",
          " and x.stride(1) != 1", "", ("tests/models/test_norms.py", "-k", "only_where_torch_is_slow")),
    _off("noise that is not finite", "dualparal/engine/request.py", "not torch.isfinite(latents).all()",
         "tests/engine/test_engine.py", "-k", "bad_requests"),
    _off("numbers out of range", "dualparal/config/blocks.py",
         "isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high",
         "tests/config/test_config.py", "-k", "refusals"),
    _off("more context than a block has", "dualparal/config/blocks.py",
         "self.context_frames > self.frames_per_block", "tests/config/test_config.py", "-k", "refusals"),
    # Callers from Python and over HTTP -----------------------------------------------------------------------------
    Guard("an answer of an earlier request is not taken for this one's", "dualparal/workers/engine.py",
          'if message[0]["id"] == self._id:', "if True:", ("tests/engine/test_workers.py", "-k", "earlier_request")),
    Guard("a killed parent's folder goes at once", "dualparal/launch/machine.py",
          "run_folder() as path, swept(path):", "run_folder() as path:", (SUPERVISOR, "-k", "outlives_its_parent")),
    _off("a full queue takes nothing more", "dualparal/server/jobs.py",
         "len(self.waiting()) >= self.settings.max_queue", ROUTES, "-k", "queue_and_its_list"),
    _off("who has no token is not served", "dualparal/server/guard.py",
         "self._token is not None and not is_open and not self._knows(headers)", ROUTES, "-k", "the_door"),
    _off("a page of another site is not served", "dualparal/server/guard.py",
         'origin is not None and origin.partition("://")[2].lower() != host.lower()', ROUTES, "-k", "the_door"),
    Guard("a stop ends the run that nobody wants", "dualparal/server/jobs.py",
          "            run.stop()\n        self._count()\n", "            pass\n        self._count()\n",
          (ROUTES, "-k", "queue_and_its_list")),
    Guard("a stop ends ranks whose unit takes long", "dualparal/server/jobs.py",
          "                self.engine.close(now=True)\n", "", (HOSTILE, "-k", "late_end_of_ranks")),
    _off("an id is looked up among those made here", "dualparal/server/jobs.py",
         "video is None or video.deleted", ROUTES, "-k", "queue_and_its_list"),
    _off("a record whose names lead out of the folder is left out", "dualparal/server/store.py",
         "video.id != name or not (known and run and whole and video.prompts and video.place < _MOST_TOGETHER)",
         HOSTILE, "-k", "damaged_record"),
    Guard("images are of few kinds", "dualparal/server/reference.py", "Image.open(file, formats=_FORMATS)",
          "Image.open(file)", ("tests/server/test_references.py", "-k", "images_have_limits")),
    _off("a body has a limit, whatever its header says", "dualparal/server/guard.py", "taken > most",
         ROUTES, "-k", "bodies_and_models"),
    # The schedule's proof ------------------------------------------------------------------------------------------
    _off("a read of other features than those named", "dualparal/schedule/validate.py", "found != wanted",
         "tests/schedule/test_schedule.py", "-k", "wrong_reads"),
    _off("a read of latents at another step", "dualparal/schedule/validate.py",
         "wanted is not None and before != wanted", "tests/schedule/test_schedule.py", "-k", "wrong_reads"),
)  # fmt: skip


def main() -> int:
    """Runs the mutants that were asked for. Returns 0 when all were noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only guards whose name or file holds one of these")
    parser.add_argument("--changed", action="store_true", help="only guards of files that differ from the last commit")
    parser.add_argument("--write", action="store_true", help=f"put the verdicts into {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    chosen = [g for g in GUARDS if not asked.words or any(word in g.name + g.file for word in asked.words)]
    if asked.changed:
        changed = _git("diff", "--name-only", "HEAD").splitlines()
        chosen = [guard for guard in chosen if guard.file in changed]
    verdicts: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="dualparal-mutants-") as name:
        copy = Path(name)
        _copy(copy)
        for module in _HEAVY:  # once for all: every mutant's tests run in a fork of this process
            importlib.import_module(module)
        sound: dict[tuple[str, ...], bool] = {}
        for guard in chosen:
            begin = time.monotonic()
            if guard.tests not in sound:
                sound[guard.tests] = _passes(copy, guard.tests) is True
            verdicts[guard.name] = _verdict(copy, guard) if sound[guard.tests] else BROKEN
            print(f"{verdicts[guard.name]:9} {time.monotonic() - begin:6.1f} s  {guard.name}", flush=True)
            if asked.write:
                write_table(verdicts)
    bad = {name: verdict for name, verdict in verdicts.items() if verdict != NOTICED}
    print(f"{len(verdicts) - len(bad)} of {len(verdicts)} noticed, {len(GUARDS)} known")
    return 1 if bad else 0


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _copy(folder: Path) -> None:
    """Copies what git knows or would take, and the built extension."""
    names = _git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    names += [str(path.relative_to(ROOT)) for path in ROOT.glob("dualparal/_C*.so")]
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def _verdict(copy: Path, guard: Guard) -> str:
    path = copy / guard.file
    text = path.read_text(encoding="utf-8")
    assert text.count(guard.old) == 1, f"{guard.name}: not once in {guard.file}"
    path.write_text(text.replace(guard.old, guard.new), encoding="utf-8")
    try:
        passed = _passes(copy, guard.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    return {True: SURVIVED, False: NOTICED, None: BROKEN}[passed]


def _passes(copy: Path, tests: tuple[str, ...]) -> bool | None:
    """Runs tests in a fork of this process; None: they could not be run."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            os._exit(_child(copy, tests))
        finally:
            os._exit(99)
    try:
        return _end_of(child)
    finally:
        _end_what_is_left(copy)


def _end_of(child: int) -> bool | None:
    deadline = time.monotonic() + SECONDS
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return {0: True, 1: False}.get(os.waitstatus_to_exitcode(status))
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False  # a hang is noticed
        time.sleep(0.05)


def _end_what_is_left(copy: Path) -> None:
    """Ends processes that a mutant's tests have left, which know the copy by their environment."""
    import psutil

    for process in psutil.process_iter():
        try:
            if process.environ().get("PYTHONPATH") == str(copy):
                process.kill()
        except psutil.Error:  # it has ended, or is another user's
            continue


def _child(copy: Path, tests: tuple[str, ...]) -> int:
    import pytest

    with open(copy / "mutant.log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))


def write_table(verdicts: dict[str, str]) -> None:
    """Replaces the table in the documentation; a guard without a verdict here keeps the one that it has there."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    old, after = rest.split(END)
    known = dict(re.findall(r"^\| ([^|]+?) \| [^|]+ \| [^|]+ \| ([^|]+?) \|$", old, re.MULTILINE))
    rows = ["| guard | in | its tests | without it |", "|---|---|---|---|"]
    for guard in GUARDS:
        tests = " ".join(guard.tests).replace("tests/", "").replace(" -k ", ": ")
        verdict = verdicts.get(guard.name) or known.get(guard.name, NOT_RUN)
        rows.append(f"| {guard.name} | `{guard.file.removeprefix('dualparal/')}` | `{tests}` | {verdict} |")
    table = "\n".join(rows)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
