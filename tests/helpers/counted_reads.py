"""safetensors files whose reads are noted: opening one and asking for shapes reads the header only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def noting(real: Callable[..., Any], note: Callable[[Any, str], None]) -> type:
    """A class in place of ``real`` (a ``safe_open``), which calls ``note`` with the path and every tensor's name."""

    class Noting:
        def __init__(self, path: Any, *args: Any, **options: Any) -> None:
            self.path, self.handle = path, real(path, *args, **options)

        def __enter__(self) -> Noting:
            self.handle.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.handle.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handle, name)

        def get_tensor(self, name: str) -> Any:
            note(self.path, name)
            return self.handle.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            return _NotingSlice(self.handle.get_slice(name), lambda: note(self.path, name))

    return Noting


class _NotingSlice:
    """A tensor of a file of which parts are read, and that notes it."""

    def __init__(self, part: Any, note: Callable[[], None]) -> None:
        self.part, self.note = part, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __getitem__(self, rows: Any) -> Any:
        self.note()
        return self.part[rows]
