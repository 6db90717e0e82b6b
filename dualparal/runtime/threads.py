"""A stage of several places in one process: a thread for each, as ranks would be, and whole units to the outside."""

from __future__ import annotations

from collections.abc import Container, Sequence
from concurrent.futures import Future
from contextlib import nullcontext

import torch

from dualparal.decoding.worker import Worker
from dualparal.distributed.messages import PeerLost
from dualparal.distributed.rows import LocalRows
from dualparal.runtime.stage import Stage, StepShape, UnitPlan


class ThreadedStage:
    """The places of a stage, each on a thread of its own; its methods are those of ``Stage``.

    Args:
        stages: a ``Stage`` for each place, which share their layers.
        exchanges: theirs.
    """

    def __init__(self, stages: Sequence[Stage], exchanges: Sequence[LocalRows]) -> None:
        self._stages, self._exchanges = stages, exchanges
        self._workers = [Worker(f"dualparal-place-{index}") for index in range(len(stages))]
        first = stages[0]
        self.experts, self.spec, self.inner_dim = first.experts, first.spec, first.inner_dim

    def add_prompt(self, prompt: int, embeds: torch.Tensor) -> None:
        for stage in self._stages:
            stage.add_prompt(prompt, embeds)

    def keep_prompts(self, used: Container[int]) -> None:
        for stage in self._stages:
            stage.keep_prompts(used)

    def forget(self) -> None:
        for stage in self._stages:
            stage.forget()

    def knows_prompt(self, prompt: int) -> bool:
        return self._stages[0].knows_prompt(prompt)

    def shape(self, plan: UnitPlan) -> StepShape:
        return self._stages[0].shape(plan)

    @torch.inference_mode()
    def run(self, hidden: torch.Tensor, plan: UnitPlan) -> torch.Tensor:
        """Runs one unit through the layers; arguments and result are those of a stage of one place.

        Raises:
            Exception: what a place has raised; the others have stopped.
        """
        first = self._stages[0]
        if self.spec.first:
            hidden = self.experts[0].patches(hidden)
        rows = first.cut(len(plan.window), plan.fed_context).rows
        stream = torch.cuda.current_stream(hidden.device) if hidden.device.type == "cuda" else None
        calls = [
            worker.submit(self._run_place, place, stream, hidden[rows[place].start : rows[place].stop], plan)
            for place, worker in enumerate(self._workers)
        ]
        made = torch.cat(_results(calls))
        return self.experts[0].picture(made, self.spec.grid) if self.spec.last else made

    def close(self) -> None:
        """Ends the threads."""
        for worker in self._workers:
            worker.shutdown()

    def _run_place(
        self, place: int, stream: torch.cuda.Stream | None, hidden: torch.Tensor, plan: UnitPlan
    ) -> torch.Tensor:
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):  # the caller's, for all places
                return self._stages[place].run(hidden, plan)
        except BaseException:
            self._exchanges[place].abort()
            raise


def _results(calls: Sequence[Future[torch.Tensor]]) -> list[torch.Tensor]:
    """The results of all places, once all have ended. Raises the first error that is no consequence of another."""
    errors = [error for call in calls if (error := call.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, PeerLost)), errors[0])
    return [call.result() for call in calls]
