"""The progress display of the command line: a bar on a terminal, one line per block elsewhere. No torch."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Blocks and frames done, frames per second, time to first frame, and the bubble of stage 0 so far.

    Args:
        total_frames: frames of all videos; None: endless.
    """

    def __init__(self, total_frames: int | None) -> None:
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
            self._task = self._bar.add_task("starting", total=total_frames)

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

    def update(self, state: dict[str, Any]) -> None:
        """Shows a new state, the fields of ``decoding.chunks.Progress`` by name."""
        rate = state["frames"] / state["seconds"] if state["seconds"] else 0.0
        text = (  # short: with the time left it fits a narrow terminal
            f"block {state['blocks']}/{state['total_blocks'] or '-'}, {state['frames']} frames, {rate:.2f} frames/s, "
            f"first {state['first']:.1f} s, bubble {100 * state['bubble']:.0f} %"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=state["frames"], description=text)
        else:
            self._console.print(text, highlight=False, soft_wrap=True)
