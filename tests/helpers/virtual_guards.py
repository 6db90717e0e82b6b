"""Guards of the supervisor, taken out of the running code one by one: which seed notices?"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, Protocol

from places import ROOT
from virtual_effects import Broken
from virtual_folders import check_folders
from virtual_judge import check

BLAME, SUPERVISOR = "dualparal/launch/blame.py", "dualparal/launch/supervisor.py"
FILES = tuple(f"dualparal/launch/{name}.py" for name in ("blame", "supervisor", "process", "heartbeat", "folder"))
FOLDERS = ("dualparal/launch/folder.py", "dualparal/io/locks.py")


class Guard(Protocol):
    """A guard of ``mutants.GUARDS``, or one of ``MORE``."""

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> str: ...

    @property
    def old(self) -> str: ...

    @property
    def new(self) -> str: ...


class Removed(NamedTuple):
    """A guard, and what stands there without it."""

    name: str
    file: str
    old: str
    new: str


MORE = (
    Removed("SIGABRT counts as a report", BLAME, "expected | {signal.SIGABRT}", "expected"),
    Removed("an early exit has a moment for its last words", BLAME,
            "_own_fault(first) if now - first.told_at >= limits.error_hold else None", "_own_fault(first)"),
    Removed("ranks may leave early while stopping", BLAME, "code >= 0 and not stopping", "code >= 0"),
    Removed("a signal's own deaths are no fault while stopping", BLAME,
            "if stopping else set()", "if False else set()"),
    Removed("a crash after the work is no fault", BLAME,
            "None if self.done and (self.exit or 0) <= 0 else self.exit", "self.exit"),
    Removed("an exit code above 0 after the work is one", BLAME, "self.done and (self.exit or 0) <= 0", "self.done"),
    Removed("silence is not held against who complains", BLAME,
            "self.exit is None and not (self.done or self.error or self.peer_error)", "self.exit is None"),
    Removed("who is silent is suspect before who lost it", BLAME, "suspect or _failure(state,", "_failure(state,"),
    Removed("silence beats no progress", BLAME,
            "_silent(states, limits, limits.heartbeat, now)\n        or _stalled", "_stalled"),
    Removed("words from before a sleep are not older for it", BLAME,
            "said if away_since is None else said + now - max(said, away_since)", "said"),
    Removed("exits are taken before messages", SUPERVISOR,
            "        for rank in self._ranks:\n            rank.reap()\n", ""),
    Removed("who lingers after its work has an end", SUPERVISOR,
            "if lingering and now - max(state.moved for state in self._states()) < self._limits.grace", "if lingering"),
    Removed("who lingers after its work has time", SUPERVISOR,
            "< self._limits.grace:\n            return None", "< 0:\n            return None"),
    Removed("ranks are asked to stop", SUPERVISOR, "                rank.ask_to_stop()\n", "                pass\n"),
    Removed("all are ended at the end", SUPERVISOR,
            "            rank.signal_group(signal.SIGKILL)\n", "            pass\n"),
    Removed("what a late phase says is sent with a tick", "dualparal/launch/heartbeat.py",
            "            self._send_late_phase()\n", "            pass\n"),
    Removed("a lock file that was removed meanwhile is none", "dualparal/io/locks.py",
            "if not os.path.samestat(os.fstat(descriptor), os.lstat(file))", "if not os.fstat(descriptor)"),
    Removed("a new folder that was taken for abandoned is made again", "dualparal/launch/folder.py",
            "        if path.exists():\n            return", "        if True:\n            return"),
)  # fmt: skip


@contextlib.contextmanager
def without(guard: Guard) -> Iterator[None]:
    """Takes a guard out of the functions that are loaded, for a while."""
    module = importlib.import_module(guard.file.removesuffix(".py").replace("/", "."))
    text = (ROOT / guard.file).read_text(encoding="utf-8")
    assert text.count(guard.old) == 1, f"{guard.name}: not once in {guard.file}"
    changed = ModuleType(module.__name__)
    exec(compile(text.replace(guard.old, guard.new), guard.file, "exec"), changed.__dict__)
    new = dict(_functions(changed))
    before = [(function, function.__code__) for _, function in _functions(module)]
    for name, function in _functions(module):
        if name in new and new[name].__code__.co_freevars == function.__code__.co_freevars:
            function.__code__ = new[name].__code__
    try:
        yield
    finally:
        for function, code in before:
            function.__code__ = code


def _functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """The functions and methods that a module defines, by their names."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) == module.__name__:
            members: Iterable[Any] = vars(value).values() if inspect.isclass(value) else (value,)
            for member in members:
                member = getattr(member, "fget", None) or getattr(member, "__func__", member)
                member = inspect.unwrap(member) if callable(member) else member
                if isinstance(member, FunctionType):
                    yield member.__qualname__, member


def noticed(guard: Guard, seeds: int) -> int | None:
    """The first seed that fails without a guard; None: none of the first ``seeds``."""
    play = check_folders if guard.file in FOLDERS else check
    with without(guard):
        for seed in range(seeds):
            try:
                play(seed)
            except Broken:
                return seed
    return None
