"""A folder as the power going out would leave it: what was not synced is lost, kept or torn, in any order.

A file's bytes are safe after a sync of the file, and a name (made, renamed or removed) after a sync of its folder. Of
what came since, a seeded choice is lost. File systems promise more, each of them something else; POSIX does not.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from typing import NamedTuple

_SECTOR = 64  # bytes that are written or not; small, since the files are


class _File:
    """A file that was seen, held open so that its number is nobody else's."""

    def __init__(self, path: str, new: bool) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        self.mode = stat.S_IMODE(os.fstat(self.descriptor).st_mode)
        self.durable = b"" if new else self.content()

    def content(self) -> bytes:
        return os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)

    def after(self, rng: random.Random, synced: bool) -> bytes:
        """The bytes after a cut; ``synced``: only those that are safe."""
        old, new = self.durable, self.content()
        if synced or old == new:
            return old
        kind = rng.choice(["old", "new", "torn", "torn"])
        if kind != "torn":
            return old if kind == "old" else new
        size = rng.choice([len(new), rng.randint(0, len(new))])
        sectors = range(0, size, _SECTOR)
        zeros = bytes(size)
        mixed = [rng.choice([new, old.ljust(size, b"\0"), zeros])[at : at + _SECTOR] for at in sectors]
        return b"".join(mixed)[:size]


class _Folder:
    """A folder that was seen: its names as they are, as they are safe, and what came between."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.mode = stat.S_IMODE(os.fstat(self.descriptor).st_mode)
        self.names: dict[str, _File | _Folder] = {}
        self.durable: dict[str, _File | _Folder] = {}
        self.changes: list[_Change] = []

    def commit(self) -> None:
        self.durable, self.changes = dict(self.names), []


class _Change(NamedTuple):
    """Names that changed together (a rename has two), in the order of all changes; None: the name is gone."""

    number: int
    names: dict[str, _File | _Folder | None]


class PowerCut:
    """The durable state of a folder, kept beside the real one.

    Args:
        root: the folder; what is in it now is safe.
    """

    def __init__(self, root: str) -> None:
        self.root, self._count = root, 0
        self._seen: dict[tuple[int, int], _File | _Folder] = {}
        self._see(root, new=False)

    def _see(self, path: str, new: bool) -> _File | _Folder:
        status = os.lstat(path)
        key = status.st_dev, status.st_ino
        if key not in self._seen:
            found = _Folder(path) if stat.S_ISDIR(status.st_mode) else _File(path, new)
            self._seen[key] = found
            if isinstance(found, _Folder):
                found.names = {name: self._see(os.path.join(path, name), new) for name in os.listdir(path)}
                if not new:
                    found.commit()
        return self._seen[key]

    def renamed(self, folder: str) -> None:
        """Notes that names in a folder have changed."""
        if not os.path.isdir(folder):
            return
        known = self._see(folder, new=True)
        assert isinstance(known, _Folder)
        now = {name: self._see(os.path.join(folder, name), new=True) for name in os.listdir(folder)}
        changed: dict[str, _File | _Folder | None] = {
            name: now.get(name) for name in {*now, *known.names} if now.get(name) is not known.names.get(name)
        }
        if changed:
            known.changes.append(_Change(self._count, changed))
            known.names, self._count = now, self._count + 1

    def synced(self, descriptor: int) -> None:
        """Notes that an open file or folder was synced."""
        status = os.fstat(descriptor)
        found = self._seen.get((status.st_dev, status.st_ino))
        if isinstance(found, _Folder):
            found.commit()
        elif found is not None:
            found.durable = found.content()

    def happen(self, seed: str) -> None:
        """Puts the folder into a state that a cut may leave.

        Of all names that changed since they were safe, the seed keeps none, all, the first ones, or any; of
        bytes the same, or those that are safe only.
        """
        rng = random.Random(seed)
        way = rng.choice(["none", "all", "first", "any", "any"])
        last = rng.randint(0, self._count)
        synced = rng.random() < 0.5

        def stays(change: _Change) -> bool:
            return {"none": False, "all": True, "first": change.number < last, "any": rng.random() < 0.5}[way]

        top = self._see(self.root, new=False)
        assert isinstance(top, _Folder)
        plan = self._left(top, stays, rng, synced)
        for entry in os.scandir(self.root):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        for path, mode, content in plan:
            if content is None:
                os.mkdir(os.path.join(self.root, path), mode)
                continue
            descriptor = os.open(os.path.join(self.root, path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "wb") as file:
                file.write(content)

    def _left(
        self, folder: _Folder, stays: object, rng: random.Random, synced: bool, prefix: str = ""
    ) -> list[tuple[str, int, bytes | None]]:
        """The paths, modes and bytes (None: a folder) of what is left below a folder, a folder before its files."""
        names: dict[str, _File | _Folder | None] = {**folder.durable}
        for change in folder.changes:
            if stays(change):  # type: ignore[operator]
                names.update(change.names)
        plan: list[tuple[str, int, bytes | None]] = []
        for name, found in sorted(names.items()):
            if isinstance(found, _Folder):
                plan.append((prefix + name, found.mode, None))
                plan += self._left(found, stays, rng, synced, f"{prefix}{name}/")
            elif found is not None:
                plan.append((prefix + name, found.mode, found.after(rng, synced)))
        return plan
