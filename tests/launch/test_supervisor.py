"""Faults are injected for real: signals, crashes, hangs, the death of the parent, each with a transport that
notices a dead peer and with one that does not. The rule of blame is also tested alone, as a table."""

import contextlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dualparal.launch.blame import Failure, Limits, RankState, Report, blame
from dualparal.launch.folder import run_folder
from dualparal.launch.heartbeat import Heartbeat
from dualparal.launch.supervisor import Kept, Supervisor, supervise
from pairwise import pairwise
from places import ROOT, WORKERS

WORKER = WORKERS / "toy_pipeline.py"
ARGV = [sys.executable, str(WORKER)]
# The tests must find this checkout also where it is not installed.
PATH = {"PYTHONPATH": str(ROOT)}
RANKS = 3
LIMITS = Limits(heartbeat=1.2, progress=1.5, startup=20.0, grace=1.0, peer_error_hold=0.5)

pytestmark = pytest.mark.alone  # who was heard when
both_transports = pytest.mark.parametrize("deaf", [False, True], ids=["hearing", "deaf"])


class Run:
    """One supervised run: acts once every rank has reached block 3, then says what happened and when."""

    def __init__(self, *, act=None, hear=None, limits=LIMITS, world_size=RANKS, error_path=None, **env):
        self.act, self.hear = act, hear
        self.acted_at = self.known_at = 0.0
        self.pids: dict[int, int] = {}
        self.messages: list[tuple[int, dict]] = []
        self._blocks: dict[int, int] = {}
        self._world_size = world_size
        handler = logging.Handler()
        handler.addFilter(self._log)
        self.logged: list[logging.LogRecord] = []
        logger = logging.getLogger("dualparal")
        logger.addHandler(handler)
        try:
            self.result = supervise(
                ARGV,
                world_size,
                env={**PATH, **{f"TOY_{name.upper()}": str(value) for name, value in env.items() if value}},
                limits=limits,
                on_message=self._note,
                error_path=error_path,
            )
        finally:
            logger.removeHandler(handler)
        self.ended_at = time.monotonic()
        assert not psutil.Process().children(recursive=True)
        assert not [pid for pid in self.pids.values() if psutil.pid_exists(pid)]

    @property
    def failure(self) -> Failure:
        assert self.result.failure is not None
        return self.result.failure

    @property
    def text(self) -> str:
        return str(self.failure)

    def _log(self, record):
        self.logged.append(record)
        if record.levelno == logging.ERROR:
            self.known_at = time.monotonic()
        return False  # heard; nothing to print

    def _note(self, rank, message):
        self.messages.append((rank, message))
        if self.hear:
            self.hear(rank, message)
        if "pid" in message:
            self.pids[rank] = message["pid"]
        self._blocks[rank] = message.get("block", self._blocks.get(rank, 0))
        everyone = len(self._blocks) == self._world_size and min(self._blocks.values()) >= 3
        if everyone and not self.acted_at:
            self.acted_at = time.monotonic()
            if self.act:
                self.act(self.pids)


def send(number, rank):
    return lambda pids: os.kill(pids[rank], number)


# --- a good run ---


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_good_run_ends_with_zero(world_size):
    run = Run(world_size=world_size, blocks=8)
    assert (run.result.exit_code, run.result.failure, run.result.interrupted) == (0, None, None)
    assert [message for rank, message in run.messages if rank == 1][-1] == {"done": True}
    assert not any("tick" in message for _, message in run.messages)


def test_ranks_get_their_place_and_a_private_folder_that_is_removed(tmp_path):
    script = (
        "import json, os, stat, sys\n"
        "from dualparal.launch.heartbeat import Heartbeat\n"
        "heartbeat = Heartbeat.from_env()\n"
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'EXTRA', 'DUALPARAL_RENDEZVOUS']\n"
        "path = os.environ['DUALPARAL_RENDEZVOUS']\n"
        "mode = stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode)\n"
        "open(path, 'w').close()\n"
        "left = [name for name in os.environ if name.endswith('_FD')]\n"
        "env = [os.environ[name] for name in names]\n"
        "heartbeat.message(env=env, mode=mode, left=left, torch='torch' in sys.modules)\n"
        "heartbeat.done()\n"
    )
    seen: dict[int, dict] = {}
    result = supervise(
        [sys.executable, "-c", script],
        2,
        env={**PATH, "EXTRA": "x"},
        on_message=lambda rank, message: seen.setdefault(rank, message),
    )
    assert result.exit_code == 0
    paths = {message["env"].pop() for message in seen.values()}
    assert seen[1] == {"env": ["1", "1", "2", "2", "x"], "mode": 0o700, "left": [], "torch": False}
    assert len(paths) == 1 and not Path(paths.pop()).parent.exists()


@pytest.mark.parametrize("fault", ["linger", "late_segv"])
def test_trouble_after_the_work_is_done_is_a_warning(fault):
    run = Run(blocks=8, fault=f"{fault}:1")
    assert run.result.exit_code == 0
    assert "rank 1 did not exit cleanly" in [record.getMessage() for record in run.logged][-1]


# --- faults ---


@pytest.mark.parametrize("repeat, rank, deaf", pairwise(range(3), range(RANKS), [False, True]))
def test_killed_rank_is_named_within_a_second(rank, deaf, repeat):
    run = Run(act=send(signal.SIGKILL, rank), deaf=deaf)
    assert run.text.startswith(f"rank {rank} (stage {rank}) failed at block ")
    assert "killed by SIGKILL" in run.text and "step 3" in run.text and "hint: " in run.text
    assert run.result.exit_code == 3
    assert 0 < run.known_at - run.acted_at < 1.0
    assert run.ended_at - run.acted_at < 5.0


@both_transports
@pytest.mark.parametrize("rank", range(RANKS))
def test_stopped_rank_is_named_at_the_limit(rank, deaf):
    run = Run(act=send(signal.SIGSTOP, rank), deaf=deaf)
    assert run.failure.rank == rank
    assert "no heartbeat" in run.text
    assert run.result.exit_code == 4
    assert 0 < run.known_at - run.acted_at < LIMITS.heartbeat + 1.0
    assert run.ended_at - run.acted_at < LIMITS.heartbeat + 4.0


@both_transports
@pytest.mark.parametrize(
    ("fault", "words", "exit_code"),
    [
        ("raise", "RuntimeError: CUDA out of memory", 3),
        ("numerics", "latents are not finite", 6),
        ("zombie_raise", "RuntimeError: boom", 3),
        ("segv", "killed by SIGSEGV", 3),
        ("abort", "killed by SIGABRT", 3),
        ("exit0", "exited with code 0 before its work was done", 3),
        ("exit7", "exited with code 7 before its work was done", 3),
        ("hang", "no progress for", 4),
        ("gil", "no heartbeat for", 4),
    ],
)
def test_fault_is_named_with_its_place(fault, words, exit_code, deaf):
    run = Run(fault=f"{fault}:1", deaf=deaf)
    place = (run.failure.rank, run.failure.stage, run.failure.block, run.failure.step, run.failure.phase)
    assert place == (1, 1, 5, 3, "run")
    assert words in run.text
    assert run.result.exit_code == exit_code


def test_lost_message_names_the_longest_waiter(tmp_path):
    gate = tmp_path / "gate"

    def listen(rank, message):
        """The others go on once it is heard that rank 2 waits for good: they are heard later, on any machine."""
        if (rank, message.get("phase"), message.get("block")) == (2, "wait_recv", 5):
            gate.touch()

    run = Run(hear=listen, limits=replace(LIMITS, progress=3.0), fault="drop:1", deaf=True, gate=gate)
    assert run.failure.rank == 2
    assert "every other rank waits too" in run.text
    assert run.result.exit_code == 4


def test_work_that_ends_without_done_is_a_failure():
    run = Run(fault="silent_end:2", blocks=8)
    assert run.failure.rank == 2 and "exited with code 0 before" in run.text


def test_exit_code_after_done_is_a_failure():
    run = Run(fault="late_exit:2", blocks=8)
    assert run.failure.rank == 2 and "exited with code 9 after" in run.text


def test_rank_that_never_starts_is_named():
    sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
    result = supervise(sleeper, 1, limits=Limits(startup=0.5, heartbeat=0.5))
    assert str(result.failure).startswith("rank 0 failed at start-up: no heartbeat for 0.")


def test_what_a_rank_started_goes_with_it():
    run = Run(fault="child:1", act=send(signal.SIGKILL, 1))
    child = next(message["child"] for _, message in run.messages if "child" in message)
    assert wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


def test_tracebacks_pass_through_and_error_json_tells_no_secrets(tmp_path, capfd):
    path = tmp_path / "error.json"
    path.write_text("old")
    argv = [*ARGV, "--prompt", "a private prompt"]
    result = supervise(argv, RANKS, env={**PATH, "TOY_FAULT": "raise:1"}, limits=LIMITS, error_path=path)
    assert "Traceback" in capfd.readouterr().err
    written = json.loads(path.read_text())
    assert written["message"] == str(result.failure)
    assert (written["rank"], written["block"], written["exit_code"]) == (1, 5, 3)
    assert "private" not in path.read_text()
    supervise(ARGV, RANKS, env={**PATH, "TOY_BLOCKS": "1"}, limits=LIMITS, error_path=path)
    assert list(tmp_path.iterdir()) == []


def test_what_outlives_a_failure_is_told_as_it_is_then(tmp_path):
    path, blocks = tmp_path / "error.json", []
    result = supervise(
        ARGV, RANKS, env={**PATH, "TOY_FAULT": "exit0:1"}, limits=LIMITS, error_path=path,
        on_message=lambda rank, message: blocks.append(message.get("block")) if rank == 0 else None,
        kept=lambda: Kept(max(block for block in blocks if block is not None), "go on"),
    )  # fmt: skip
    assert result.failure.last_committed_block >= 5
    assert str(result.failure).endswith(
        f"last block on disk: {result.failure.last_committed_block}\nresume with: go on"
    )
    written = json.loads(path.read_text())
    assert (written["last_committed_block"], written["resume_command"]) == (
        result.failure.last_committed_block,
        "go on",
    )


def test_unwritable_error_json_does_not_hide_the_failure(tmp_path):
    run = Run(fault="exit0:1", error_path=tmp_path / "no" / "error.json")
    assert run.failure.rank == 1


def test_failing_callback_leaves_no_process():
    def fail(rank, message):
        raise KeyError("progress bar")

    with pytest.raises(KeyError):
        supervise(ARGV, RANKS, env=PATH, on_message=fail)
    assert not psutil.Process().children(recursive=True)


def test_time_the_parent_slept_is_not_held_against_the_ranks():
    def block_terminal(pids):
        time.sleep(LIMITS.progress + 1)

    assert Run(act=block_terminal, blocks=40).result.exit_code == 0


def test_time_the_parent_slept_with_its_ranks_counts_for_nobody():
    """All of them were stopped, so that there is no word of that time."""
    supervisor, then = Supervisor(ARGV, 1), time.monotonic() - 100
    state = RankState(0, heard=then, moved=then)
    supervisor._ranks = [SimpleNamespace(state=state, open=False, reap=lambda: False)]
    supervisor._listened_at = then
    supervisor._listen()
    assert state.heard - then == state.moved - then == pytest.approx(100, abs=10)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="world_size=0"):
        supervise(ARGV, 0)
    with pytest.raises(ValueError, match="argv is empty"):
        supervise([], 1)
    with pytest.raises(ValueError, match="grace=-1"):
        Limits(grace=-1)
    with pytest.raises(FileNotFoundError):
        supervise(["/no/such/program"], 2)
    assert not psutil.Process().children()


# --- interruption ---


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


class Parent:
    """A supervisor in a process of its own, with its ranks at work."""

    def __init__(self, tmp_path, **env):
        pid_file = tmp_path / "pids"
        toy = {f"TOY_{name.upper()}": str(value) for name, value in env.items()}
        # Temporary files in a folder of its own: what a killed parent leaves there is the test's to remove.
        self.process = subprocess.Popen(
            [*ARGV, "parent", str(pid_file), str(RANKS)],
            env={**os.environ, **PATH, **toy, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests themselves may run under nohup
        )
        assert wait_until(pid_file.exists, 20)
        self.ranks = [psutil.Process(pid) for pid in json.loads(pid_file.read_text())]
        self.tmp_path = tmp_path
        self.signalled_at = time.monotonic()

    def send(self, number):
        self.process.send_signal(number)

    def finish(self):
        """Exit code, failure and seconds since the ranks were all at work."""
        out, self.errors = self.process.communicate(timeout=20)
        elapsed = time.monotonic() - self.signalled_at
        assert not self.alive()
        assert not list(self.tmp_path.glob("dualparal-*"))
        return self.process.returncode, json.loads(out)["failure"], elapsed

    def alive(self):
        return [rank for rank in self.ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_first_signal_stops_at_a_block_boundary(tmp_path, number, exit_code):
    parent = Parent(tmp_path)
    parent.send(number)
    code, failure, elapsed = parent.finish()
    assert (code, failure) == (exit_code, None)
    assert elapsed < 2.0


@pytest.mark.parametrize("everybody", [True, False], ids=["everybody", "ranks alone"])
def test_a_signal_to_the_ranks_is_meant_for_the_run(tmp_path, everybody):
    """Slurm, Kubernetes and systemd signal every process of a job."""
    parent = Parent(tmp_path, grace=60)
    for rank in parent.ranks:
        rank.send_signal(signal.SIGTERM)
    if everybody:
        parent.send(signal.SIGTERM)
    code, failure, _ = parent.finish()
    assert (code, failure) == (143, None)
    assert "were killed" not in parent.errors


def test_a_signal_in_start_up_ends_it_at_once():
    """Imports and loading hear no request: nobody waits for the end of grace."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
    supervisor = Supervisor(sleeper, 2, limits=Limits(grace=6))
    threading.Timer(0.3, supervisor.interrupt).start()
    begin = time.monotonic()
    assert supervisor.run().exit_code == 130
    assert time.monotonic() - begin < 0.3 + 2.0


def test_a_killed_run_s_folder_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import time\nfrom dualparal.launch.folder import run_folder\n"
        "with run_folder() as folder:\n    print(folder, flush=True)\n    time.sleep(1000)"
    )
    holder = [sys.executable, "-c", program]
    found = []
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            process = stack.enter_context(
                subprocess.Popen(holder, env={**os.environ, **PATH, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE)
            )
            stack.callback(process.kill)
            found.append((process, Path(process.stdout.readline().decode().strip())))
        (killed, left), (_, used) = found
        foreign = tmp_path / "dualparal-run-foreign"  # not one of ours: others may read it
        foreign.mkdir(mode=0o755)
        killed.kill()
        killed.wait()
        assert left.is_dir()
        with run_folder() as own:
            assert sorted(tmp_path.iterdir()) == sorted([own, used, foreign])
            assert stat.S_IMODE(own.stat().st_mode) == 0o700


def test_second_signal_kills_at_once(tmp_path):
    parent = Parent(tmp_path, fault="ignore_stop:1", grace=60)
    parent.send(signal.SIGINT)
    time.sleep(0.5)
    assert parent.process.poll() is None and parent.alive()
    parent.send(signal.SIGINT)
    code, failure, elapsed = parent.finish()
    assert (code, failure) == (130, None)
    assert elapsed < 2.0


@pytest.mark.parametrize("rank", range(RANKS))
def test_rank_that_ignores_the_request_is_killed_after_grace(tmp_path, rank):
    parent = Parent(tmp_path, fault=f"ignore_stop:{rank}", grace=1)
    parent.send(signal.SIGTERM)
    code, failure, elapsed = parent.finish()
    assert (code, failure) == (143, None)
    assert 1.0 <= elapsed < 3.0


def test_stopped_and_hung_ranks_do_not_outlive_grace(tmp_path):
    parent = Parent(tmp_path, grace=0.5, deaf=1)
    parent.ranks[0].suspend()
    parent.send(signal.SIGINT)
    code, _, elapsed = parent.finish()
    assert code == 130 and elapsed < 3.0


def test_rank_killed_while_stopping_is_named(tmp_path):
    parent = Parent(tmp_path, fault="ignore_stop:1", grace=60)
    parent.send(signal.SIGINT)
    time.sleep(0.2)
    parent.ranks[1].kill()
    code, failure, elapsed = parent.finish()
    assert code == 130 and elapsed < 5.0
    assert failure["rank"] == 1 and "SIGKILL" in failure["cause"]


@pytest.mark.parametrize("fault", ["", "ignore_stop:1", "gil:1", "stopped"])
def test_no_rank_outlives_its_parent(tmp_path, fault):
    parent = Parent(tmp_path, fault="" if fault == "stopped" else fault, deaf=1)
    if fault == "stopped":
        parent.ranks[1].suspend()
    time.sleep(0.2)
    parent.process.kill()
    parent.process.communicate()
    if fault in ("gil:1", "stopped") and sys.platform != "linux":
        for rank in parent.ranks:
            rank.kill()
        pytest.skip("only Linux ends a process that cannot run")
    assert wait_until(lambda: not parent.alive(), 5.0)
    assert wait_until(lambda: not list(tmp_path.glob("dualparal-*")), 10.0)


def test_interrupt_from_another_thread():
    supervisor = Supervisor(ARGV, RANKS, env=PATH, limits=LIMITS)
    results = []
    thread = threading.Thread(target=lambda: results.append(supervisor.run()))
    thread.start()
    time.sleep(0.3)
    supervisor.interrupt()
    thread.join(timeout=10)
    assert results[0].exit_code == 130


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    Run(blocks=2)
    assert signal.getsignal(signal.SIGINT) is before


# --- the rule of blame ---

NOW = 1000.0


def state(rank, *, quiet=0.1, idle=0.1, phase="wait_recv", **fields):
    """A rank heard `quiet` seconds ago, with its last message `idle` seconds ago."""
    fields = {"stage": rank, "block": 4, "step": 2, **fields}
    return RankState(rank, heard=NOW - quiet, moved=NOW - idle, phase=phase, **fields)


def report(text, ago):
    return Report(text, NOW - ago, exit_code=3)


def died(code, ago=0.5):
    return {"exit": code, "exited_at": NOW - ago}


PEER = {"peer_error": report("closed", 5)}
OWN = {"error": report("boom", 2)}

BLAME = {
    "nothing": ([state(0), state(1)], None),
    "a death by signal beats earlier reports": ([state(0, **OWN), state(1, **died(-9))], (1, "SIGKILL")),
    "a report beats an early exit": ([state(0, **died(0, ago=3)), state(1, **OWN)], (1, "boom")),
    "an early exit beats silence": ([state(0, quiet=99), state(1, **died(0))], (1, "code 0")),
    "silence beats no progress": ([state(0, idle=999, phase="run"), state(1, quiet=99)], (1, "heartbeat")),
    "no progress beats a lost peer": ([state(0, **PEER), state(1, idle=999, phase="run")], (1, "progress")),
    "a lost peer when nothing else": ([state(0, **PEER), state(1)], (0, "lost a peer: closed")),
    "the first of two deaths": ([state(0, **died(-9, 1)), state(1, **died(-11, 2))], (1, "SIGSEGV")),
    "the first of two reports": ([state(0, **OWN), state(1, error=report("first", 3))], (1, "first")),
    "the first of two lost peers": (
        [state(0, **PEER), state(1, peer_error=report("first", 9))],
        (1, "first"),
    ),
    "abort after another's report": ([state(0, **died(-6, 1)), state(1, **OWN)], (1, "boom")),
    "abort before another's report": ([state(0, **died(-6, 3)), state(1, **OWN)], (0, "SIGABRT")),
    "a reporter's own crash is not the cause": ([state(0, **OWN, **died(-11))], (0, "boom")),
    "a peer's crash is a consequence": ([state(0, **PEER, **died(-11)), state(1, **died(0))], (1, "code 0")),
    "a fresh report is held": ([state(0, error=report("boom", 0.1)), state(1, quiet=99)], None),
    "a fresh lost peer is held": ([state(0, peer_error=report("closed", 0.3)), state(1)], None),
    "a lost peer points at the quiet rank": ([state(0, **PEER), state(1, quiet=3)], (1, "heartbeat")),
    "a lost peer points at the busy rank": (
        [state(0, **PEER), state(1, idle=30, phase="run")],
        (1, "progress"),
    ),
    "waiting is no crime": ([state(0, idle=999), state(1, idle=1, phase="run")], None),
    "all wait: the longest": ([state(0, idle=700), state(1, idle=800)], (1, "every other rank waits")),
    "the busy one, however long others wait": (
        [state(0, idle=999), state(1, idle=601, phase="run")],
        (1, "no progress"),
    ),
    "a place of a stage that waits for another one in its unit": (
        [
            state(0, phase="run", idle=700),
            state(1, phase="run", idle=999, action=7),
            state(2, stage=1, idle=999, action=6),
        ],
        (0, "no progress"),
    ),
    "a place that another one of its stage has left behind": (
        [
            state(0, phase="run", idle=700),
            state(1, phase="run", idle=999, action=7),
            state(2, stage=1, idle=999, action=8),
        ],
        (1, "no progress"),
    ),
    "all wait, one of them within its unit": (
        [state(0, idle=998), state(1, phase="run", idle=999, action=7), state(2, stage=1, idle=700, action=6)],
        (0, "every other rank waits"),
    ),
    "start-up may be silent longer": ([state(0, quiet=60, phase=None), state(1)], None),
    "a phase of starting is start-up too": ([state(0, quiet=60, phase="start"), state(1)], None),
    "start-up has its limit": ([state(0, quiet=121, phase=None), state(1)], (0, "heartbeat")),
    "done ranks may be silent": ([state(0, quiet=99, done=True), state(1)], None),
    "done ranks do not hide a deadlock": (
        [state(0, done=True, **died(0)), state(1, idle=999)],
        (1, "progress"),
    ),
    "done and dead by signal": ([state(0, done=True, **died(-11)), state(1)], None),
}


@pytest.mark.parametrize(("states", "expected"), BLAME.values(), ids=BLAME.keys())
def test_blame(states, expected):
    failure = blame(states, Limits(), NOW)
    if expected is None:
        assert failure is None
    else:
        assert failure is not None and failure.rank == expected[0] and expected[1] in failure.cause


def test_a_rank_s_first_word_counts():
    """What follows is the clean-up talking."""
    state = RankState(0, heard=NOW, moved=NOW)
    for text in ("out of memory", "cannot close"):
        state.take({"error": text, "at": NOW}, NOW)
        state.take({"error": f"lost: {text}", "peer": True, "at": NOW}, NOW)
    assert (state.error.text, state.peer_error.text) == ("out of memory", "lost: out of memory")


def test_while_stopping_only_hard_faults_count():
    limits = Limits()
    for harmless in (
        {"quiet": 99},
        {"idle": 999, "phase": "run"},
        PEER,
        died(0),
        died(1),
        died(-2),
        died(-15),
    ):
        assert blame([state(0, **harmless), state(1)], limits, NOW, stopping=True) is None
    for fault in (OWN, died(-9), died(-11)):
        assert blame([state(0, **fault), state(1)], limits, NOW, stopping=True) is not None


def test_failure_text():
    text = str(Failure(1, 2, 20, 3, "run", "killed by SIGKILL", 3, "see dmesg"))
    assert text == "rank 1 (stage 2) failed at block 20, step 3, phase 'run': killed by SIGKILL\nhint: see dmesg"
    text = str(Failure(1, 2, 20, 3, "run", "boom", 3, "", 0, "dualparal generate --resume x"))
    assert text.splitlines()[1:] == ["last block on disk: 0", "resume with: dualparal generate --resume x"]


# --- the child's side ---


@pytest.fixture
def line():
    """A heartbeat with both ends in this process; the life pipe stays open, or this process would die."""
    status_read, status_write = os.pipe()
    life_read, life_write = os.pipe()
    heartbeat = Heartbeat(status_write, life_read)
    os.set_blocking(status_read, False)
    yield heartbeat, status_read, life_write


def read_lines(fd):
    data = b""
    while True:
        try:
            data += os.read(fd, 1 << 16)
        except BlockingIOError:
            return [json.loads(text) for text in data.splitlines()]


def test_without_a_parent_every_method_does_nothing(monkeypatch):
    for name in ("DUALPARAL_STATUS_FD", "DUALPARAL_LIFE_FD"):
        monkeypatch.delenv(name, raising=False)
    heartbeat = Heartbeat.from_env()
    heartbeat.phase("run", block=1)
    heartbeat.message(a=1)
    heartbeat.error("x")
    heartbeat.done()
    assert not heartbeat.stop_requested.is_set()


def test_phase_is_cheap_also_into_a_full_pipe(line):
    heartbeat, _, _ = line
    count = 20_000
    start = time.perf_counter()
    for block in range(count):
        heartbeat.phase("run", stage=1, block=block, step=3)
    assert (time.perf_counter() - start) / count < 20e-6


def test_last_phase_arrives_though_many_were_dropped(line):
    heartbeat, status, _ = line
    for block in range(5000):
        heartbeat.phase("run", block=block)
    time.sleep(0.7)
    lines = read_lines(status)
    assert len(lines) < 1000
    last = [entry for entry in lines if "phase" in entry][-1]
    assert (last["phase"], last["block"]) == ("run", 4999)


def test_errors_survive_a_full_pipe(line):
    heartbeat, status, _ = line
    for number in range(30_000):
        heartbeat.message(number=number)
    heartbeat.phase("run", block=7)
    thread = threading.Thread(target=lambda: (heartbeat.error(ValueError("bad"), exit_code=2), heartbeat.done()))
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive(), "gave up on a full pipe"
    lines = read_lines(status)
    thread.join(timeout=5)
    lines += read_lines(status)
    errors = [entry for entry in lines if "error" in entry]
    assert {**errors[0], "at": 0} == {
        "phase": "run",
        "block": 7,
        "error": "ValueError: bad",
        "peer": False,
        "at": 0,
        "exit_code": 2,
    }
    assert lines[-1] == {"done": True} or {"done": True} in lines


@pytest.mark.parametrize("text", ["x" * 100_000, "é\n\x00" * 10_000, "\ud800" * 5000])
def test_long_error_is_cut_to_one_atomic_write(line, text):
    heartbeat, status, _ = line
    heartbeat.error(text)
    entry = next(entry for entry in read_lines(status) if "error" in entry)
    assert entry["error"].endswith("...") and len(entry["error"]) > 100
    assert len(json.dumps(entry, ensure_ascii=False).encode()) < 4096


def test_oversized_message_is_refused(line):
    with pytest.raises(ValueError, match="use less than"):
        line[0].message(numbers=list(range(5000)))


def test_stop_request_arrives(line):
    heartbeat, _, life = line
    os.write(life, b"st")
    time.sleep(0.05)
    assert not heartbeat.stop_requested.is_set()
    os.write(life, b"op\n")
    assert heartbeat.stop_requested.wait(1.0)


def test_end_of_the_life_pipe_is_the_end_of_the_rank_and_its_children():
    # Without the environment there is no help from the kernel: this is how it goes outside Linux.
    script = (
        "import subprocess, sys, time\n"
        "from dualparal.launch.heartbeat import Heartbeat\n"
        "heartbeat = Heartbeat(*map(int, sys.argv[1:]))\n"
        "heartbeat.message(child=subprocess.Popen(['sleep', '1000']).pid)\n"
        "time.sleep(1000)\n"
    )
    status_read, status_write = os.pipe()
    life_read, life_write = os.pipe()
    rank = subprocess.Popen(
        [sys.executable, "-c", script, str(status_write), str(life_read)],
        pass_fds=(status_write, life_read),
        start_new_session=True,
        env={**os.environ, **PATH},
    )
    os.close(status_write)
    os.close(life_read)
    with os.fdopen(status_read, "rb") as lines:
        child = next(message["child"] for message in map(json.loads, lines) if "child" in message)
        os.close(life_write)
        assert rank.wait(timeout=5) == -signal.SIGKILL
    assert wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


def test_pipes_are_not_inherited(line):
    _, status, _ = line
    assert stat.S_ISFIFO(os.fstat(status).st_mode) and not os.get_inheritable(status)


@pytest.mark.parametrize("module", ["launch.supervisor", "launch.heartbeat", "distributed.handshake"])
def test_no_torch_at_import(module):
    code = f"import sys, dualparal.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **PATH})
