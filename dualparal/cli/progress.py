"""The progress display of the command line: a bar on a terminal, one line per block elsewhere. No torch."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Blocks and frames done, frames per second, time to first frame, and the bubble of stage 0 so far.

    The bar counts units, whose number the schedule knows: the first blocks take most of a short video's time.

    Args:
        total_frames: frames of all videos; None: endless.
    """

    def __init__(self, total_frames: int | None) -> None:
        self._total_frames = total_frames
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=None),  # takes what the text leaves of the line
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
            self._task = self._bar.add_task("starting", total=None)

    def start(self) -> None:
        """Shows the bar, on a terminal."""
        if self._bar is not None:
            self._bar.start()

    def stop(self) -> None:
        """Ends the bar; its last state stays on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Display:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def units(self, done: int, total: int | None) -> None:
        """Moves the bar, on a terminal.

        Args:
            done: units that stage 0 has run.
            total: units of the run; None: endless.
        """
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def update(self, state: dict[str, Any]) -> None:
        """Shows a new state, the fields of ``decoding.chunks.Progress`` by name."""
        rate = state["frames"] / state["seconds"] if state["seconds"] else 0.0
        text = (  # short: with the time left it fits a narrow terminal
            f"block {state['blocks']}/{state['total_blocks'] or '-'}, {state['frames']} frames, {rate:.2f} frames/s, "
            f"first {state['first']:.1f} s, bubble {100 * state['bubble']:.0f} %"
        )
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            if state["frames"] == self._total_frames:  # the last unit has gone by too
                self._bar.update(self._task, completed=self._bar.tasks[0].total)
        else:
            self._console.print(text, highlight=False, soft_wrap=True)
