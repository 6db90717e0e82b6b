"""Tensors of the late device: each is a CPU tensor that says it is on a card, and notes what is done with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from late_device import Block, LateDevice, Op, Ref

aten = torch.ops.aten
# The host waits for their results.
_READS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten._linalg_check_errors.default,
}
_TRANSFERS = {aten._to_copy.default, aten.copy_.default}
_PINS = {aten.pin_memory.default}
_UNWRITTEN = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class Late(torch.Tensor):
    """A tensor "on a card".

    Attributes:
        inner: the CPU tensor that holds what the host would see if it waited.
        block: its memory.
    """

    inner: torch.Tensor
    block: Block
    dispatcher: Dispatch

    @staticmethod
    def __new__(cls, inner: torch.Tensor, block: Block, dispatcher: Dispatch) -> Late:
        with torch.inference_mode(False):  # a view of it may be made in either mode
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
            )
        made.inner, made.block, made.dispatcher = inner, block, dispatcher
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.block.stream.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def record_stream(self, stream: Any) -> None:  # type: ignore[override]
        self.block.used_on.add(stream)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dispatcher = next(leaf for leaf in _leaves((args, kwargs or {})) if isinstance(leaf, Late)).dispatcher
        return dispatcher.call(func, args, kwargs or {})


class Moves(TorchFunctionMode):
    """Takes the moves between host and device in hand before torch does: below Python, all tensors are the CPU's."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__()
        self._call = dispatch.call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            return self._call(aten.pin_memory.default, args[:1], {})
        if func is torch.Tensor.cpu:
            return self._move(args[0], torch.device("cpu"), None, False, False)
        if func is torch.Tensor.to:
            copy, others = bool(kwargs.get("copy")), {k: v for k, v in kwargs.items() if k != "copy"}
            if len(args) > 1 and isinstance(args[1], torch.Tensor):
                args = (args[0], args[1].device, args[1].dtype, *args[2:])
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **others)
            return self._move(args[0], device, dtype, non_blocking, copy)
        return func(*args, **kwargs)

    def _move(self, tensor: torch.Tensor, device: Any, dtype: Any, non_blocking: bool, copy: bool) -> torch.Tensor:
        late, device, dtype = isinstance(tensor, Late), device or tensor.device, dtype or tensor.dtype
        there = late == (device.type == "cuda") and device.index in (None, tensor.device.index)
        if there and dtype == tensor.dtype and not copy:
            return tensor
        options = {"dtype": dtype, "device": device, "non_blocking": non_blocking}
        made: torch.Tensor = self._call(aten._to_copy.default, (tensor,), options)
        return made


class Dispatch(TorchDispatchMode):
    """Sees every operation of a run, and notes those on the device."""

    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self.device = device
        self._blocks: dict[int, Any] = {}  # weak references by the address of the CPU memory
        self._pinned: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        lates = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Late)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        to_card = wanted is not None and wanted.type == "cuda"
        if not lates and not to_card:
            return self._on_host(func, args, kwargs)
        if wanted is not None and wanted.type == "meta":
            plain_args, plain_kwargs = _map((args, kwargs), lambda late: late.inner)
            return func(*plain_args, **plain_kwargs)
        if func in _TRANSFERS:
            source = args[1] if func is aten.copy_.default else args[0]
            target_is_late = isinstance(args[0], Late) if func is aten.copy_.default else to_card or wanted is None
            if isinstance(source, Late) != (target_is_late and source is not None):
                return self._transfer(func, args, kwargs, source, target_is_late)
        return self._on_device(func, args, kwargs, lates, wanted)

    # The host --------------------------------------------------------------------------------------------------

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _PINS or kwargs.get("pin_memory"):
            made = args[0].clone() if func in _PINS else func(*args, **{**kwargs, "pin_memory": False})
            self._pinned[made.untyped_storage().data_ptr()] = made
            return made
        if func._schema.is_mutable and self._pinned:
            for written in _written(func, args, kwargs):
                assert written.untyped_storage().data_ptr() not in self._pinned, "a copy may be reading it"
        return func(*args, **kwargs)

    def _transfer(self, func: Any, args: Any, kwargs: dict[str, Any], source: torch.Tensor, to_card: bool) -> Any:
        kwargs = dict(kwargs)
        direct = bool(kwargs.get("non_blocking")) or (func is aten.copy_.default and len(args) > 2 and bool(args[2]))
        if to_card:
            index = self.device.index(args[0].device if func is aten.copy_.default else kwargs["device"])
            stream = self.device.current_stream(index)
            pinned = source.untyped_storage().data_ptr() in self._pinned
            if not (direct and pinned):
                self.device.host_waits("copy of pageable memory to the device", stream.clock)
            lates = [args[0]] if func is aten.copy_.default else []
            return self._on_device(func, args, kwargs, lates, torch.device("cuda", index))
        assert isinstance(source, Late)
        stream = self.device.current_stream(source.device)
        inner = source.inner
        if func is aten.copy_.default:
            args[0].copy_(inner)
            seen, result = inner.clone(), args[0]
        else:
            result = inner.to("cpu", kwargs.get("dtype") or inner.dtype, copy=True)
            seen = inner.clone()
        ref = self._ref(source)
        self.device.note(Op(aten.clone.default, (ref,), {}, [], [ref], [], self.device.phase, seen), stream)
        self.device.host_waits("copy from the device", stream.clock)
        return result

    # The device ------------------------------------------------------------------------------------------------

    def _on_device(
        self, func: Any, args: Any, kwargs: dict[str, Any], lates: list[Late], wanted: torch.device | None
    ) -> Any:
        index = self.device.index(wanted) if wanted is not None else lates[0].device.index
        assert all(late.device.index == index for late in lates), f"{func} on tensors of several cards"
        stream = self.device.current_stream(index)
        self._check_host_operands(func, args, kwargs, lates)
        if stream.graph is not None and func not in _UNWRITTEN:
            return self._capture(func, args, kwargs, lates, stream)
        written = _written(func, args, kwargs)
        plain_args, plain_kwargs = _map((args, kwargs), lambda late: late.inner)
        for name in ("device", "pin_memory", "non_blocking"):
            plain_kwargs.pop(name, None)
        made = func(*plain_args, **plain_kwargs)
        outs = self._wrapped(made, stream, lates, written)
        fresh = [out for out in _leaves(outs) if isinstance(out, Late) and not _shares(out, lates)]
        if func in _UNWRITTEN:
            for out in fresh:
                _poison(out.inner)
            return outs
        if not written and not fresh and any(isinstance(out, Late) for out in _leaves(outs)):
            return outs  # a view
        op = self._op(func, args, kwargs, lates, written, fresh)
        if func in _READS:
            op.seen = made
        self.device.note(op, stream)
        if func in _READS:
            self.device.host_waits(str(func), stream.clock)
        return outs

    def _op(self, func: Any, args: Any, kwargs: Any, lates: list[Late], written: list[Any], fresh: list[Late]) -> Op:
        refs = _map((args, kwargs), self._ref)
        noted = _map(refs, lambda host: host.clone(), torch.Tensor)
        for name in ("device", "pin_memory", "non_blocking"):
            noted[1].pop(name, None)
        outs = [self._ref(out) for out in fresh]
        reads = [self._ref(late) for late in lates]
        return Op(func, *noted, outs, reads, [*map(self._ref, written), *outs], self.device.phase)

    def _capture(self, func: Any, args: Any, kwargs: dict[str, Any], lates: list[Late], stream: Any) -> Any:
        """Notes an operation for the replays of a graph; what it would write to stays as it is."""
        assert func not in _READS, f"{func} in a capture"
        written = _written(func, args, kwargs)
        copies: dict[int, torch.Tensor] = {}

        def plain(late: Late) -> torch.Tensor:
            if any(late is each for each in written):
                copies[id(late)] = late.inner.clone()
                return copies[id(late)]
            return late.inner

        plain_args, plain_kwargs = _map((args, kwargs), plain)
        for name in ("device", "pin_memory", "non_blocking"):
            plain_kwargs.pop(name, None)
        made = func(*plain_args, **plain_kwargs)
        if written and not isinstance(made, (tuple, list)) and any(made is copy for copy in copies.values()):
            outs, fresh = next(late for late in written if copies[id(late)] is made), []
        else:
            outs = self._wrapped(made, stream, lates, [])
            fresh = [out for out in _leaves(outs) if isinstance(out, Late) and not _shares(out, lates)]
            if not written and not fresh:
                return outs
        op = self._op(func, args, kwargs, lates, written, fresh)
        real_args, real_kwargs = _map((args, kwargs), lambda late: late.inner)
        for name in ("device", "pin_memory", "non_blocking"):
            real_kwargs.pop(name, None)
        targets = [out.inner for out in fresh]

        def perform() -> None:
            results = [t for t in _leaves(func(*real_args, **real_kwargs)) if isinstance(t, torch.Tensor)]
            for target, result in zip(targets, results if targets else [], strict=True):
                target.copy_(result)

        stream.graph.nodes.append((op, perform))
        return outs

    def _check_host_operands(self, func: Any, args: Any, kwargs: Any, lates: list[Late]) -> None:
        """A number of the host's goes with a launch; any other tensor of its has to be copied first."""
        if func in _TRANSFERS or not lates:
            return
        for leaf in _leaves((args, kwargs)):
            if not isinstance(leaf, torch.Tensor) or isinstance(leaf, Late):
                continue
            if leaf.ndim or torch.Tag.pointwise not in func.tags or "where" in str(func):
                clock = self.device.current_stream(lates[0].device).clock
                self.device.host_waits(f"{func} of a tensor on the host", clock)

    def _wrapped(self, made: Any, stream: Any, lates: list[Late], written: list[Any]) -> Any:
        def wrap(tensor: torch.Tensor) -> torch.Tensor:
            for late in written:
                if late.inner is tensor:
                    return late  # type: ignore[no-any-return]
            for late in lates:
                if late.inner.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                    return Late(tensor, late.block, self)
            return Late(tensor, self.device.allocate(tensor.untyped_storage().nbytes(), stream), self)

        return _map(made, wrap, torch.Tensor)

    def _ref(self, late: Late) -> Ref:
        inner = late.inner
        return Ref(late.block.number, inner.dtype, tuple(inner.shape), inner.stride(), inner.storage_offset())


def _poison(tensor: torch.Tensor) -> None:
    """Fills memory with what reads as NaN, or as an index that does not exist."""
    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(255)  # type: ignore[call-overload]


def _shares(out: Late, lates: list[Late]) -> bool:
    return any(out.block is late.block for late in lates)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _leaves(item)
    else:
        yield tree


def _map(tree: Any, function: Callable[[Any], Any], kind: Any = Late) -> Any:
    if isinstance(tree, Ref):
        return tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map(item, function, kind) for item in tree)
    if isinstance(tree, dict):
        return {name: _map(item, function, kind) for name, item in tree.items()}
    return function(tree) if isinstance(tree, kind) else tree


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that an operation writes to, by its schema."""
    if not func._schema.is_mutable:
        return []
    found: list[Any] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]
    return found
