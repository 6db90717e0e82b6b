"""Replays of a recorded run in other orders, and the search for accesses that nothing keeps apart."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import torch

from late_device import Clock, LateDevice, Op, Ref


class Different(AssertionError):
    """The host read something else than in the recorded order."""


class Program:
    """The operations of a recorded run, on memory of its own."""

    def __init__(self, device: LateDevice) -> None:
        self._blocks = [torch.empty(size, dtype=torch.uint8) for size in device.sizes]
        self._tensors: dict[Ref, torch.Tensor] = {}
        self._queues: dict[int, list[tuple[Op, Any, Any, list[torch.Tensor]]]] = defaultdict(list)
        self._waits: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(dict)  # by stream and place in it
        known: dict[int, Clock] = defaultdict(dict)
        for op in device.ops:
            new = [(s, n) for s, n in op.after.items() if s != op.stream and known[op.stream].get(s, 0) < n]
            if new:
                self._waits[op.stream][op.number - 1] = new
                known[op.stream].update(new)
            prepared = self._real(op.args), self._real(op.kwargs), [self._tensor(out) for out in op.outs]
            self._queues[op.stream].append((op, *prepared))

    def _tensor(self, ref: Ref) -> torch.Tensor:
        if ref not in self._tensors:
            storage = self._blocks[ref.block].untyped_storage()
            empty = torch.empty(0, dtype=ref.dtype)
            self._tensors[ref] = empty.set_(storage, ref.offset, ref.size, ref.stride)  # type: ignore[call-overload]
        return self._tensors[ref]

    def _real(self, tree: Any) -> Any:
        if isinstance(tree, Ref):
            return self._tensor(tree)
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._real(item) for item in tree)
        if isinstance(tree, dict):
            return {name: self._real(item) for name, item in tree.items()}
        return tree

    @torch.inference_mode()
    def run(self, seed: int) -> None:
        """Does all operations in an order of the seed's. Raises Different when the host reads something else."""
        chance = random.Random(seed)
        for block in self._blocks:
            block.fill_(255)
        at = dict.fromkeys(self._queues, 0)
        eagerness = {stream: chance.choice((1e-3, 0.1, 1.0, 10.0)) for stream in self._queues}
        while True:
            ready = [stream for stream in self._queues if self._is_due(stream, at)]
            if not ready:
                break
            [stream] = chance.choices(ready, [eagerness[s] for s in ready])
            for _ in range(chance.choice((1, 3, 30))):
                if not self._is_due(stream, at):
                    break
                self._do(*self._queues[stream][at[stream]])
                at[stream] += 1
        assert all(at[stream] == len(queue) for stream, queue in self._queues.items()), "a wait for itself"

    def _is_due(self, stream: int, at: Clock) -> bool:
        """True when a stream has another operation, and all that it waits for has happened."""
        place = at[stream]
        waits = self._waits[stream].get(place, ())
        return place < len(self._queues[stream]) and all(at.get(other, 0) >= number for other, number in waits)

    def _do(self, op: Op, args: Any, kwargs: Any, outs: list[torch.Tensor]) -> None:
        if op.function is None:
            outs[0].fill_(255)
            return
        try:
            made = op.function(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:  # such as an index of nowhere
            raise Different(f"{op.function} in {op.phase!r}: {error}") from None
        made_list = made if isinstance(made, (tuple, list)) else [made]
        if outs:
            for out, result in zip(outs, made_list, strict=True):
                out.copy_(result)
        if op.seen is not None and not _same(op.seen, made):
            raise Different(f"{op.function} in {op.phase!r} reads {made}, not {op.seen}")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def races(device: LateDevice) -> list[str]:
    """Pairs of accesses to the same bytes, one of them a write, that nothing orders; each in words.

    As ``torch.cuda._sanitizer`` has it, on ranges of bytes instead of whole tensors.
    """
    found: list[str] = []
    accesses: dict[int, list[tuple[Op, int, int, bool]]] = defaultdict(list)
    for op in (*device.ops, *device.given_back):
        for refs, writes in ((op.reads, False), (op.writes, True)):
            for ref in refs:
                first, last = ref.bytes()
                for other, begin, end, wrote in accesses[ref.block]:
                    if other.stream == op.stream or not (writes or wrote) or begin >= last or first >= end:
                        continue
                    if other.number > op.after.get(other.stream, 0):
                        found.append(f"{_words(other, wrote)} and {_words(op, writes)}")
        for refs, writes in ((op.reads, False), (op.writes, True)):
            for ref in refs:
                accesses[ref.block].append((op, *ref.bytes(), writes))
    return found


def _words(op: Op, writes: bool) -> str:
    name = "the memory's next owner" if op.function is None else str(op.function)
    return f"{name} ({op.phase or 'outside'}, stream {op.stream}) {'writes' if writes else 'reads'}"
