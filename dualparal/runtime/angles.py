"""Rotary angles of the windows of blocks in flight, made once for each."""

from __future__ import annotations

from dualparal.models.base import Grid, Rotary, Slice


class Angles:
    """The rotary angles of windows, the last ones of which are kept.

    Args:
        slice_: makes them.
        grid: size of a latent frame.
        windows: number of windows, of all blocks in flight.
    """

    def __init__(self, slice_: Slice, grid: Grid, windows: int) -> None:
        self._slice, self._grid, self._windows = slice_, grid, windows
        self._made: dict[tuple[int, int], Rotary] = {}  # by window

    def of(self, window: range, rows: range | None) -> Rotary:
        """The angles of a window, or of the tokens ``rows`` of it, which are the same at every call."""
        key = window.start, len(window)
        found = self._made.get(key)
        if found is None:
            found = self._slice.rotary(*key, self._grid)
            if rows is not None:
                found = Rotary(*(angles[rows.start : rows.stop].clone() for angles in found))
            self._made[key] = found
            if len(self._made) > self._windows:
                del self._made[min(self._made)]  # its block has left before the others
        return found

    def forget(self) -> None:
        """Forgets all windows."""
        self._made.clear()
