"""Rows of a picture between its decoders, or of a unit between the places of a stage: inside a process, or between
ranks, from CPU to CPU or over NCCL.

Both are a ``RowExchange`` of ``models.base`` and a ``ShareExchange`` of ``runtime.shares``. All parts make the same
exchanges in the same order, so no message needs a header, and the parts wait for nothing of each other but these.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dualparal.distributed.after_device import event_on
from dualparal.distributed.messages import PeerLost, guard


class _Boxes:
    """Tensors on their way between the parts of a process, by sender and receiver."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: dict[tuple[int, int], deque[tuple[torch.Tensor, Any]]] = {}
        self.lost: int | None = None  # the part that has failed


class LocalRows:
    """One of the parts of a process, each on a thread of its own. Made by ``local_rows``.

    Attributes:
        index: of this part, 0 at the top.
        count: number of parts.
    """

    def __init__(self, boxes: _Boxes, index: int, count: int, name: str) -> None:
        self.index, self.count = index, count
        self._boxes, self._name = boxes, name

    def swap(self, sends: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]) -> None:
        """Sends tensors to other parts and fills those that come from them. ``sends`` may be changed afterwards.

        On a card both are done in the order of the caller's current stream; the host does not wait for it.

        Raises:
            PeerLost: a part was aborted, before or while waiting for it.
        """
        self.begin(sends, wanted)()

    def begin(self, sends: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]) -> Callable[[], None]:
        """Begins a swap, and returns what ends it. Several may be under way; they end in the order of their begin.

        Raises (the end, too):
            PeerLost: as ``swap``.
        """
        # Copies: a row may be a view of what its owner changes in place when it goes on.
        copies = {part: tensor.clone() for part, tensor in sends.items()}
        with self._boxes.changed:
            for part, tensor in copies.items():
                box = self._boxes.waiting.setdefault((self.index, part), deque())
                box.append((tensor, event_on(tensor.device)))
            self._boxes.changed.notify_all()
        return lambda: self._end(wanted)

    def _end(self, wanted: Mapping[int, torch.Tensor]) -> None:
        with self._boxes.changed:
            found = {part: self._take(part) for part in wanted}
        for part, (tensor, event) in found.items():
            if event is not None:
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_event(event)
                tensor.record_stream(stream)
            wanted[part].copy_(tensor)

    def abort(self) -> None:
        """Tells all parts that this one goes no further: whoever waits for another, or will, gets an error."""
        with self._boxes.changed:
            self._boxes.lost = self.index
            self._boxes.changed.notify_all()

    def _take(self, part: int) -> tuple[torch.Tensor, Any]:
        """Waits for the next tensor of a part, holding the lock."""
        box = self._boxes.waiting.setdefault((part, self.index), deque())
        self._boxes.changed.wait_for(lambda: box or self._boxes.lost is not None)
        if not box:  # what a part has sent before it stopped still counts
            name = self._name
            raise PeerLost(f"rows of {name} {part} for {name} {self.index}: {name} {self._boxes.lost} has stopped")
        return box.popleft()


def local_rows(count: int, name: str = "decoder") -> list[LocalRows]:
    """The ways between ``count`` parts of one process, by part; each is for one thread.

    A part that fails must ``abort``, or the others wait for it for ever.

    Args:
        count: number of parts.
        name: of a part, for error messages.
    """
    boxes = _Boxes()
    return [LocalRows(boxes, index, count, name) for index in range(count)]


class RankRows:
    """One of the parts, each on a rank of its own.

    Args:
        group: a process group with the ranks of all parts, used for nothing else: between CPUs, or NCCL's for tensors
            on cards.
        ranks: the parts' ranks, from the first rows on.
        index: of this part.
        name: of a part, for error messages.

    Attributes:
        index: of this part, 0 at the top.
        count: number of parts.
    """

    def __init__(self, group: Any, ranks: Sequence[int], index: int, name: str = "part") -> None:
        self.index, self.count = index, len(ranks)
        self._group, self._ranks, self._name = group, list(ranks), name

    def swap(self, sends: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]) -> None:
        """Sends tensors to other parts and fills those that come from them; one launch of NCCL's for all of them.

        Between CPUs it is done on return. With NCCL the current stream waits for it and the host does not: what this
        stream does next finds the tensors filled, and may change or free what was sent. The transfers themselves wait
        for what the stream was given before, and hold the card until the other parts have got there too; since all
        parts make the same exchanges in the same order, that is no circle, as long as no part waits for another
        outside of them.

        Raises:
            PeerLost: another part's rank is gone.
        """
        self.begin(sends, wanted)()

    def begin(self, sends: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.Tensor]) -> Callable[[], None]:
        """Begins a swap, and returns what ends it; both may raise as ``swap`` does. Several may be under way."""
        operations = [
            dist.P2POp(function, tensor, self._ranks[part], self._group)
            for function, tensors in ((dist.isend, sends), (dist.irecv, wanted))
            for part, tensor in sorted(tensors.items())
        ]
        name = f"rows of {self._name} {self.index} with {', '.join(map(str, sorted({*sends, *wanted})))}"
        works = guard(name, dist.batch_isend_irecv, operations) if operations else []

        def end() -> None:
            # The handles, and in them the tensors, live until the current stream waits for them.
            for work in works:
                guard(name, work.wait)
            operations.clear()

        return end
