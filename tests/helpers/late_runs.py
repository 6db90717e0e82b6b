"""Runs of the engine on the late device, and mutants of the engine."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from dualparal.checkpoint import checkpointer
from dualparal.checkpoint.checkpointer import Checkpoint
from dualparal.decoding import parts
from dualparal.decoding.chunks import NonFiniteError
from dualparal.engine.engine import Engine
from engine_calls import embeds
from late_device import HostSync, LateDevice, recording
from late_replay import Different, Program, races

# What the engine tells of before it does it; between these and the next chunk the main thread may not wait. It does at
# EMIT, where the latents of a block are looked at before they are given out: once per block.
UNITS = frozenset({"run", "update", "wait_recv", "wait_send", "decode"})
TOY: dict[str, Any] = {"height": 8, "width": 12, "num_frames": 15, "num_inference_steps": 3}


Made = list[tuple[tuple[int, str], torch.Tensor]]  # by block and kind


class Case(NamedTuple):
    """A run of the engine.

    Attributes:
        output: the type of its frames, or "latent".
        guidance: two branches, or one.
        break_after: chunks after which it is given up and resumed from its last snapshot; 0: no snapshots are taken.
        options: the engine's.
    """

    output: str = "latent"
    guidance: bool = False
    break_after: int = 0
    options: dict[str, Any] = {}  # noqa: RUF012
    call: dict[str, Any] = TOY


def make(model: Path, case: Case, device: str, folder: Path, late: LateDevice | None = None) -> Made:
    """Makes a video; all that a consumer has of it, on the CPU. A resumed one has some blocks twice."""

    def tell(phase: str, **_: Any) -> None:
        if late is not None:
            late.phase = phase

    def engine() -> Engine:
        options = {"frames_per_block": 2, "context_frames": 1, "dtype": "float32", **case.options}
        options["graphs"] = bool(options.get("graphs")) and device != "cpu"
        return Engine.from_pretrained(model, device=device, report=tell, **options)

    made: Made = []

    def consume(chunks: Iterator[Any], most: int) -> None:
        for chunk in chunks:
            tell("")
            made.append(((chunk.block, "latents"), chunk.latents * 1))
            if chunk.frames is not None:  # used on the consumer's stream and let go, while others are decoded
                frames = chunk.frames if case.output == "pt" else torch.from_numpy(chunk.frames)
                made.append(((chunk.block, "frames"), frames * 1))
                del frames
            del chunk
            most -= 1
            if most == 0:
                chunks.close()  # type: ignore[attr-defined]
                return
        tell("")

    first = engine()
    prompt = embeds(first, case.guidance)
    call = {"guidance_scale": 4.0 if case.guidance else 1.0, "output_type": case.output, **case.call}
    keep = Checkpoint(folder / device, every=1) if case.break_after else None
    consume(first.stream(**prompt, **call, checkpoint=keep), case.break_after)
    if keep is not None:
        consume(engine().resume(keep), 0)
    return [(key, tensor.cpu()) for key, tensor in made]


def record(
    model: Path,
    case: Case,
    folder: Path,
    device: str = "cuda",
    before: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[LateDevice, Made]:
    """Records a run. Raises HostSync where the engine waits for the device and should not.

    Args:
        before: called first, on the device.
        options: of the ``LateDevice``.
    """
    late = LateDevice(**options)
    late.strict = UNITS
    with recording(late, (parts, checkpointer)):
        before()
        made = make(model, case, device, folder, late)
    return late, made


def findings(
    model: Path, case: Case, folder: Path, expected: Mapping[tuple[int, str], torch.Tensor], orders: int, **options: Any
) -> dict[str, str]:
    """What is wrong with a run: by "sync", "bits", "race" and "order", the first of each in words; empty if nothing.

    Args:
        expected: the unbroken video of the CPU.
        orders: number of orders to try.
        options: as ``record`` has them.
    """
    try:
        late, made = record(model, case, folder, **options)
    except HostSync as error:
        return {"sync": str(error)}
    except NonFiniteError as error:
        return {"bits": str(error)}
    found = {}
    if dict(made).keys() != expected.keys() or not all(torch.equal(tensor, expected[key]) for key, tensor in made):
        found["bits"] = "the order in which the host issued everything gives other bits than the CPU"
    unordered = races(late)
    if unordered:
        found["race"] = unordered[0]
    program = Program(late)
    for seed in range(0 if "bits" in found else orders):
        try:
            program.run(seed)
        except Different as error:
            found["order"] = f"order {seed}: {error}"
            break
    return found


@contextmanager
def mutated(function: str, old: str, new: str) -> Iterator[None]:
    """Inside, a function or method of a loaded module ("module:Class.method") has other source."""
    module_name, _, path = function.partition(":")
    module = sys.modules[module_name]
    owner: Any = module
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    original = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(old) == 1, f"{function} has {source.count(old)} times {old!r}: the mutant is out of date"
    names = dict(vars(module))
    owners = [owner] if classes else [m for m in list(sys.modules.values()) if vars(m).get(name) is original]
    exec("from __future__ import annotations\n" + source.replace(old, new), names)
    with ExitStack() as patches:
        for each in owners:
            patches.enter_context(mock.patch.object(each, name, names[name]))
        yield
