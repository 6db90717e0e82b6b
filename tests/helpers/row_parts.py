"""Decoders of parts of the picture, each on a thread of its own, as ranks would run them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from dualparal.distributed.rows import local_rows


def in_parts(make: Callable[[Any], Any], latents: torch.Tensor, count: int, cuts: list[int]) -> list[torch.Tensor]:
    """The frames of each part, from the top down.

    Args:
        make: decoder of a ``RowExchange``.
        latents: [1, C, f, H, W], of the whole picture.
        count: number of parts.
        cuts: frames of each push.
    """

    def decode(rows: Any) -> torch.Tensor:
        decoder = make(rows)
        return torch.cat([decoder.push(piece) for piece in latents.split(cuts, dim=2)])

    return on_threads(decode, count)


def on_threads(work: Callable[[Any], Any], count: int) -> list[Any]:
    """The results of each part's ``work``, called with its exchange; raises what the first part to fail has raised."""
    rows, found, errors = local_rows(count), dict[int, Any](), list[BaseException]()
    threads = torch.get_num_threads()

    def run(part: int) -> None:
        torch.set_num_threads(threads)  # of the test; a thread begins with one for each core
        try:
            found[part] = work(rows[part])
        except BaseException as error:
            errors.append(error)
            rows[part].abort()

    workers = [threading.Thread(target=run, args=(part,), daemon=True) for part in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive(), "a part hangs"
    if errors:
        raise errors[0]
    return [found[part] for part in range(count)]
