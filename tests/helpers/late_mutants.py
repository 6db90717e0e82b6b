"""Mutants of the engine: in each, one thing is missing that keeps accesses apart or the host from waiting."""

from __future__ import annotations

from typing import Any, NamedTuple

from late_runs import Case

PT = Case("pt")
LONG: dict[str, Any] = {"height": 8, "width": 12, "num_frames": 23, "num_inference_steps": 4}
GRAPHS = Case(options={"stages": 2, "graphs": True}, call=LONG)
RESUMED = Case("uint8", break_after=3, options={"stages": 2, "context": "paper"})
WAN = Case(call={"height": 32, "width": 32, "num_frames": 21, "num_inference_steps": 3})

_PARTS = "dualparal.decoding.parts"
_DELIVERY = "dualparal.decoding.delivery:Delivery"
_KEEPER = "dualparal.checkpoint.checkpointer:Checkpointer"
_GRAPHED = "dualparal.runtime.graphs:Graphed"
_OWN_STREAM = """self.side = torch.cuda.Stream()
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            fill(self.name, self._buffers[slot], tensor, mark)
            tensor.record_stream(self.side), mark.record_stream(self.side)
            self.done = getattr(self, "done", {}) | {slot: torch.cuda.Event()}
            self.done[slot].record()"""
_ITS_READER = """header, self._reading = self._full.popleft()
    torch.cuda.current_stream().wait_event(self.done[self._reading])"""


# The host waits at EMIT, where it looks at the latents, and so knows that they are made.
_NO_LOOK = "dualparal.runtime.executor:StageExecutor._emit", "if not torch.isfinite(latents).all():", "if False:"


class Mutant(NamedTuple):
    """A change of one function's source.

    Attributes:
        name: what is missing.
        function, old, new: see ``late_runs.mutated``.
        case: the run in which it shows.
        found_by: "sync", "bits", "race" and "order" as ``late_runs.findings`` has them, separated by blanks.
        second_card: the run is on the second card of the process.
        wan: the run is of a Wan model, not of the toy.
        also: another change: of what would protect the same accesses.
        warmed: the run has its warm-up, after which some of this is done and does no harm.
    """

    name: str
    function: str
    old: str
    new: str
    case: Case
    found_by: str
    second_card: bool = False
    wan: bool = False
    also: tuple[str, str, str] | None = None
    warmed: bool = True


MUTANTS = [
    Mutant(
        "decoding waits for the latents",
        f"{_PARTS}:PartDecoder._beside",
        "self.stream.wait_event(ready)",
        "pass",
        PT,
        "race order",
        also=_NO_LOOK,
    ),
    Mutant(
        "their event is recorded",
        f"{_PARTS}:LocalPart._submit",
        "ready.record()",
        "pass",
        PT,
        "race order",
        also=_NO_LOOK,
    ),
    Mutant(
        "the thread waits for its stream",
        f"{_PARTS}:PartDecoder._beside",
        "self.stream.synchronize()",
        "pass",
        PT,
        "race order",
    ),
    Mutant(
        "frames are recorded on the consumer's stream",
        f"{_DELIVERY}._take",
        "part.record_stream(torch.cuda.current_stream(part.device))",
        "pass",
        PT,
        "race order",
    ),
    Mutant(
        "a resumed decoder stays on its stream",
        f"{_DELIVERY}.resume",
        "self._result([part.push(video, seen) for part in self._parts or ()])",
        "self._parts[0]._decoder._decoders[video].push(seen)",
        RESUMED,
        "race order",
    ),
    Mutant(
        "snapshots wait for the latents", f"{_KEEPER}._beside", "ready.synchronize()", "pass", RESUMED, "race order"
    ),
    Mutant("their event is recorded (snapshots)", f"{_KEEPER}._event", "event.record()", "pass", RESUMED, "race order"),
    Mutant(
        "an edge copies on the stages' stream",
        "dualparal.distributed.edges:LocalEdge.send",
        "fill(self.name, self._buffers[slot][: self._length(header.unit)], tensor, mark)",
        _OWN_STREAM,
        GRAPHS,
        "race order",
        also=(
            "dualparal.distributed.edges:LocalEdge.receive",
            "header, self._reading = self._full.popleft()",
            _ITS_READER,
        ),
    ),
    Mutant(
        "latents are copied into the graph's",
        f"{_GRAPHED}._fill",
        "static.hidden.copy_(inputs.hidden)",
        "pass",
        GRAPHS,
        "bits",
    ),
    Mutant(
        "a velocity is a copy",
        "dualparal.runtime.latents:LatentQueue.take",
        "velocity.clone()",
        "velocity",
        Case(guidance=True, options={"stages": 2, "depth": 1}),
        "bits",
    ),
    Mutant(
        "the run's card is the current one",
        "dualparal.engine.run:Run.chunks",
        "with current(self._mesh.device):\n                chunk",
        "with contextlib.nullcontext():\n                chunk",
        RESUMED,
        "race order",
        second_card=True,
    ),
    Mutant(
        "captures have the card's stream",
        "dualparal.runtime.graphs:cuda_capture",
        "stream=pool[1], ",
        "",
        GRAPHS,
        "bits",
        second_card=True,
    ),
    Mutant(
        "all is captured before the first unit",
        "dualparal.engine.build:Builder.warm_up",
        "if device.type not in _WARMED:",
        "if True:",
        GRAPHS,
        "sync",
    ),
    Mutant(
        "copies to the device go on without the host",
        "dualparal.device:to_device",
        "tensor.pin_memory().to(device, non_blocking=True)",
        "tensor.to(device)",
        PT,
        "sync",
    ),
    Mutant("they leave pinned memory", "dualparal.device:to_device", "tensor.pin_memory()", "tensor", PT, "sync"),
    Mutant(
        "a sampler's numbers stay on the host",
        "dualparal.sampling.sampler:BlockSampler.step",
        "_ScalarsOnHost()",
        "nullcontext()",
        WAN,
        "sync",
        wan=True,
    ),
    Mutant(
        "marks copy no numbers",
        "dualparal.runtime.nonfinite:mark",
        "(~finite).to(tensor.dtype) * (1 + own)",
        "torch.where(finite, 0.0, float(1 + own)).to(tensor.dtype)",
        PT,
        "sync",
    ),
    Mutant(
        "modulations copy no indices",
        "dualparal.models.wan.transformer:WanSlice.time",
        "layers[:, scale] += 1",
        "layers[:, [scale]] += 1",
        WAN,
        "sync",
        wan=True,
        warmed=False,
    ),
    Mutant(
        "a timestep is filled in",
        "dualparal.models.wan.transformer:WanSlice._frequencies",
        "torch.full((1,), timestep.item(), dtype=timestep.dtype, device=self.device)",
        "timestep.reshape(1).to(self.device)",
        WAN,
        "sync",
        wan=True,
        warmed=False,
    ),
]
