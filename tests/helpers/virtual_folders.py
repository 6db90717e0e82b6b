"""Several runs on one folder, in one thread: within a run's call of flock, others do something, as a seed decides.

The locks are the kernel's, which knows them by open file and not by process. A run that is killed closes its files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import tempfile
from pathlib import Path

from dualparal.io.locks import Locks
from dualparal.io.output import OutputError
from dualparal.launch.folder import run_folder
from virtual_effects import Broken

RUNS = 3


class Folders:
    """Runs that hold one output, and runs that have private folders, in a real folder."""

    def __init__(self, seed: int, base: Path) -> None:
        self.rng, self.base = random.Random(seed), base
        self.out = base / "video.mp4"
        self.locks: list[Locks] = [Locks(self.flock) for _ in range(RUNS)]
        self.holds = [False] * RUNS
        self.busy: list[int] = []  # in the middle of hold, innermost last
        self.private = contextlib.ExitStack()
        self.mine: list[Path] = []
        self.others_folder = base / "dualparal-run-not-ours"
        self.others_folder.mkdir()
        self.others_folder.chmod(0o755)  # as ours never are

    def flock(self, descriptor: int, how: int) -> None:
        """The kernel's, with others before it and after it."""
        self.others()
        fcntl.flock(descriptor, how)
        self.others()

    def others(self) -> None:
        if len(self.busy) < RUNS and self.rng.random() < 0.4:
            self.act(self.rng.choice([run for run in range(RUNS) if run not in self.busy]))

    def act(self, run: int) -> None:
        """Lets a run take the output, give it back, or be killed."""
        if not self.holds[run]:
            self.take(run)
        elif self.rng.random() < 0.6:
            self.locks[run].release()
            self.holds[run] = False
        else:
            for descriptor in self.locks[run]._held.values():
                os.close(descriptor)
            self.locks[run], self.holds[run] = Locks(self.flock), False
        if sum(self.holds) > 1:
            raise Broken("two runs hold one output")
        for path in self.mine:
            if not path.exists():
                raise Broken("the folder of a living run is gone")

    def take(self, run: int) -> None:
        in_the_way = any(self.holds) or bool(self.busy)
        self.busy.append(run)
        try:
            self.locks[run].hold(self.out, "--out")
            self.holds[run] = True
        except OutputError:
            if not in_the_way and not any(self.holds):
                raise Broken("an output that nobody holds is refused") from None
        finally:
            self.busy.pop()

    def meet(self) -> None:
        """Lets a run have a private folder; one that was killed has left another."""
        if self.rng.random() < 0.3:
            tempfile.mkdtemp(prefix="dualparal-run-", dir=self.base)
        if self.rng.random() < 0.3 and self.mine:
            self.private.close()
            self.mine.clear()
        self.mine.append(self.private.enter_context(run_folder(self.base, self._flock_of_folder)))

    def _flock_of_folder(self, descriptor: int, how: int) -> None:
        """Before it is locked, another run may take a new folder for an abandoned one."""
        if not how & fcntl.LOCK_NB and self.rng.random() < 0.5:
            with run_folder(self.base):
                pass
        fcntl.flock(descriptor, how)

    def play(self) -> None:
        for _ in range(8):
            if self.rng.random() < 0.2:
                self.meet()
            else:
                self.act(self.rng.randrange(RUNS))
        self.private.close()
        if not self.others_folder.exists():
            raise Broken("a folder of somebody else is gone")
        self.others_folder.rmdir()
        for locks in self.locks:
            locks.release()
        self.holds = [False] * RUNS
        with run_folder(self.base), Locks() as last:
            last.hold(self.out, "--out")
        if list(self.base.iterdir()):
            raise Broken(f"left behind: {[path.name for path in self.base.iterdir()]}")


def check_folders(seed: int) -> None:
    """Plays a seed of runs on one folder. Raises Broken."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            Folders(seed, Path(folder)).play()
        except Broken as error:
            raise Broken(f"seed {seed}, folders: {error}") from None
