"""A run of layers with its neighbour features. It knows neither its rank nor the schedule.

Everything that does not change from unit to unit is made once: time conditions per step (``moments``), keys and values
of the text per prompt, rotary angles per window. Layers share one workspace for keys and values: own, next, previous.

``forward`` is a function of tensors and a ``StepShape`` alone: slot numbers are tensors too, so that a captured graph
of it (``graphs.py``) serves every block.

With 8-bit attention a block has a state in every layer and branch: the mean of its keys at the step before, which is
taken away from them at this one. It lies in the store, as features do. A refresh is in 16 bits: it may not read that
state, and after it the state begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import torch

from dualparal.kernels.attention_8bit import FP8, key_mean
from dualparal.kernels.qk_norm_rope import Lend
from dualparal.models.anchors import Weighed, turn
from dualparal.models.base import AttentionStrategy, Pending, Rotary, Slice, TimeCondition, attend_here
from dualparal.models.keys_values import Context8, Format, KeysValues, Packed, to_8bit, to_16bit
from dualparal.runtime.angles import Angles
from dualparal.runtime.features import FeatureStore
from dualparal.runtime.moments import Moments, Run
from dualparal.runtime.shares import Cut, Share, Ulysses
from dualparal.runtime.spec import StageSpec
from dualparal.runtime.workspace import Read, View, Workspace, Workspace8
from dualparal.schedule.actions import Features, Unit
from dualparal.schedule.layout import TOKEN_TILE, token_ranges

ANCHOR: Read = ("anchor", False)


class StepShape(NamedTuple):
    """Everything that decides the operations of a unit; two units of one shape differ in the values of tensors only."""

    expert: int
    branch: int
    frames: int
    fed_context: int  # leading frames that belong to the previous block (``paper``, refreshes)
    reads: tuple[Read, ...]  # features read, in the order in which their keys follow the own ones
    writes: tuple[str, ...]  # sides
    eight_bit: bool = False  # 8-bit attention is on, in the layers that take part
    needs_key_mean: bool = False  # for the first time in this block
    runs: tuple[int, ...] = ()  # frames at each timestep, where there are several


class StepInputs(NamedTuple):
    """The tensors of a unit. ``text`` and ``time`` are shared between units and never written to."""

    hidden: torch.Tensor  # as ``Stage.run`` takes them
    text: torch.Tensor  # [layers, 2, tokens, inner]
    time: TimeCondition
    rotary: Rotary
    read_at: tuple[torch.Tensor, ...]  # int64 [1] each: rows of the feature store
    write_at: tuple[torch.Tensor, ...]
    mean_at: tuple[torch.Tensor, ...] = ()  # the same, of the block's state; with 8-bit attention only
    shift: tuple[torch.Tensor, ...] = ()  # ``Slice.shift`` of the anchor, where it is read


Forward = Callable[[StepShape, StepInputs], torch.Tensor]


class UnitPlan(NamedTuple):
    """Everything that schedule and layout say about one unit; the stage itself knows neither."""

    unit: Unit
    prompt: int  # id, see ``Stage.add_prompt``
    place: int  # a number that the block has to itself while it is in flight
    window: range  # absolute indices of the frames that are fed
    fed_context: int  # leading frames that belong to the previous block (``paper``, refreshes)
    refresh: bool  # the unit is one of a refresh
    before: int | None  # the step of the block's last unit of this branch; None: none, or a refresh came after it
    reads: Sequence[Features]  # in the order in which their keys follow the own ones
    writes: Sequence[Features]
    fed_step: int  # that the frames of the previous block have come to; the number of steps: they are finished
    anchor_shift: int = 0  # latent frames by which the anchor is moved, where it is read


class Stage:
    """One rank's layers of every expert.

    Args:
        experts: the same layers of each transformer of the model.
        spec: facts of the stage.
        attention: the strategy with which its layers attend to themselves and their neighbours.
        wrap: goes around ``forward``, such as ``graphs.Graphed``.
        share: the place's of a stage that has several; None: it has one.
    """

    def __init__(
        self,
        experts: Sequence[Slice],
        spec: StageSpec,
        attention: AttentionStrategy = attend_here,
        wrap: Callable[[Forward], Forward] | None = None,
        share: Share | None = None,
    ) -> None:
        self.experts = experts
        self.share = share
        self.spec = spec
        self.attention = attention
        slice_ = experts[0]
        self.inner_dim = slice_.inner_dim
        eight_bit, steps = spec.eight_bit, len(spec.expert_of_step)
        self._covered = [eight_bit.covers(layer) for layer in spec.layers]
        self._on = [any(self._covered) and eight_bit.at(step, steps) for step in range(steps)]
        self._fp8 = eight_bit.mode == "fp8"
        starts = {side: spec.starts[side] for side in spec.sides}
        self._always_8bit = all(self._on) and not spec.refreshes
        self._workspace = self._workspace8 = None
        self._heads = slice_.heads if share is None else len(share.heads[share.index])
        self._scratch: KeysValues | None = None  # own keys and values of all heads, on their way to other places
        width = self.inner_dim
        if share is not None:
            rows = min(spec.max_tokens, -(-spec.max_tokens // share.exchange.count) + 2 * TOKEN_TILE)
            width, shape = share.width, (rows, self.inner_dim)
            self._scratch = KeysValues(
                *(torch.empty(shape, dtype=slice_.dtype, device=slice_.device) for _ in range(2))
            )
        if not (all(self._covered) and self._always_8bit):
            lent = {side: spec.lent[side] for side in starts}
            self._workspace = Workspace(spec.max_tokens, lent, width, slice_.dtype, slice_.device)
        if any(self._on):
            values = FP8 if self._fp8 else slice_.dtype
            self._workspace8 = Workspace8(
                spec.max_tokens, starts, spec.lent["head"], self.inner_dim, slice_.heads, values, slice_.device
            )
        formats = [self._formats(starts, covered) for covered in self._covered]
        self.store = FeatureStore(spec.slots, spec.branches, formats, slice_.device)
        self._step = wrap(self.forward) if wrap else self.forward
        self._moments = Moments(experts, spec.timesteps, spec.unequal_times, spec.fixed_frames)
        self._prompts: dict[int, torch.Tensor] = {}
        self._text: dict[tuple[int, int, int], torch.Tensor] = {}
        self._angles = Angles(slice_, spec.grid, spec.windows)
        self._shifts: dict[int, Rotary] = {}

    def add_prompt(self, prompt: int, embeds: torch.Tensor) -> None:
        """Makes a prompt known by its id, with embeddings [branches, sequence, text_dim]."""
        self._prompts[prompt] = embeds

    def keep_prompts(self, used: Container[int]) -> None:
        """Forgets all prompts but the ``used`` ones: no block in flight uses them any more."""
        for key in [k for k in self._text if k[0] not in used]:
            del self._text[key]
        for prompt in [p for p in self._prompts if p not in used]:
            del self._prompts[prompt]

    def forget(self) -> None:
        """Forgets all prompts and windows, as before the first unit."""
        self.keep_prompts(())
        self._angles.forget()
        self._shifts.clear()

    def knows_prompt(self, prompt: int) -> bool:
        """True when the prompt was added and not forgotten since."""
        return prompt in self._prompts

    @torch.inference_mode()
    def run(self, hidden: torch.Tensor, plan: UnitPlan) -> torch.Tensor:
        """Runs one unit through the layers.

        Args:
            hidden: first stage: latents [1, C, F, H, W]; otherwise hidden states [tokens, inner]. With places those of
                this one's tokens, and on the first stage their patches [tokens, patch].
            plan: everything that schedule and layout say about the unit.

        Returns:
            Hidden states [tokens, inner], or on the last stage the velocity [1, C, own frames, H, W]. With places
            those of this one's tokens, and on the last stage the velocity [own tokens, patch]. Good until the next
            unit.
        """
        unit, window, shape = plan.unit, plan.window, self.shape(plan)
        rows = None if self.share is None else self.cut(len(window), plan.fed_context).rows[self.share.index]
        inputs = StepInputs(
            hidden,
            self._text_condition(plan.prompt, unit.branch, shape.expert),
            self._moments.condition(self._runs(plan), shape.expert, self.spec.grid.tokens, rows),
            self._angles.of(window, rows),
            tuple(self._row(features) for features in plan.reads),
            tuple(self._row(features) for features in plan.writes),
            (self.store.row("mean", plan.place, unit.branch),) if shape.eight_bit else (),
            self._shift(plan.anchor_shift) if ANCHOR in shape.reads else (),
        )
        return self._step(shape, inputs)

    def cut(self, frames: int, fed_context: int) -> Cut:
        """A window over the places of the stage; arguments as in ``StepShape``."""
        assert self.share is not None, "a stage of one place is not cut"
        tokens = self.spec.grid.tokens
        return Cut(token_ranges(frames, tokens, self.share.exchange.count), fed_context * tokens)

    def shape(self, plan: UnitPlan) -> StepShape:
        """All that decides the operations of a unit."""
        unit = plan.unit
        eight_bit, runs = self._on[unit.step] and not plan.refresh, self._runs(plan)
        return StepShape(
            self.spec.expert_of_step[unit.step],
            unit.branch,
            len(plan.window),
            plan.fed_context,
            tuple((f.side, self._on[f.step] and not f.refresh) for f in plan.reads),
            tuple(f.side for f in plan.writes),
            eight_bit,
            eight_bit and (plan.before is None or not self._on[plan.before]),
            tuple(run.frames for run in runs) if len(runs) > 1 else (),
        )

    def forward(self, shape: StepShape, inputs: StepInputs) -> torch.Tensor:
        """Computes a unit from its shape and tensors; nothing else decides the result (see ``run``)."""
        expert, tokens = self.experts[shape.expert], self.spec.grid.tokens
        hidden = inputs.hidden
        if self.spec.first:
            hidden = expert.embed(hidden if self.share else expert.patches(hidden))
        first_own, own = shape.fed_context * tokens, shape.frames * tokens
        places = {"head": first_own, "tail": own - self.spec.lent["tail"], "anchor": 0}
        starts = {side: places[side] for side in shape.writes}
        views = self._views(shape, own, starts)
        context, attend = self._shared(shape, views, len(hidden))
        pending: Pending | None = None
        for index in range(expert.num_layers):
            eight_bit = shape.eight_bit and self._covered[index]
            view = views[eight_bit]
            self._read(index, eight_bit, view, shape, inputs)
            text = KeysValues(*inputs.text[index])
            saved = eight_bit or self.spec.features_8bit or self.share is not None
            lends = {} if saved else self._lends(index, starts, inputs)
            hidden, pending = expert.layer(
                index,
                hidden,
                pending,
                inputs.time,
                text,
                inputs.rotary,
                context or view.context,
                list(lends.values()),
                attend,
            )
            for side, at in zip(shape.writes, inputs.write_at, strict=True):
                if side not in lends:
                    made = view.lends[side]
                    if self.spec.features_8bit and not eight_bit:
                        made = Packed.of(KeysValues(*made)).tensors
                    self.store.save(index, side, eight_bit, at, made)
            if isinstance(view.context, Context8):
                mean = key_mean(view.context.k_sums, len(hidden))
                self.store.save(index, "mean", True, inputs.mean_at[0], [mean])
        if not self.spec.last:
            return expert.finish(hidden, pending)
        if self.share is not None:  # of all rows, whose number is that of a tile or more
            counted = self.cut(shape.frames, shape.fed_context).own(self.share.index)
            return expert.head(hidden, pending, inputs.time)[counted.start :]
        velocity = expert.head(hidden[first_own:], pending and (pending[0][first_own:], pending[1]), inputs.time)
        return expert.picture(velocity, self.spec.grid)

    def _shared(
        self, shape: StepShape, views: Mapping[bool, View], rows: int
    ) -> tuple[KeysValues | None, AttentionStrategy]:
        """Memory in which layers leave their own keys and values for other places, and the strategy that takes them
        there. With one place (None, the strategy as it was given): layers write to their view."""
        attention, weight = self.attention, self.spec.anchor_weight
        if weight and ANCHOR in shape.reads:
            attention = Weighed(self.spec.lent["anchor"], weight, attention)
        if self.share is None or self._scratch is None:
            return None, attention
        target, cut = views[False].context, self.cut(shape.frames, shape.fed_context)
        assert isinstance(target, KeysValues)
        return self._scratch.rows(0, rows), Ulysses(self.share, cut.rows, target, attention)

    def close(self) -> None:
        """Ends what runs beside the stage: nothing."""

    def _views(self, shape: StepShape, own: int, starts: Mapping[str, int]) -> dict[bool, View]:
        """The workspaces as the unit's layers see them; True: for layers that attend in 8 bits."""
        found = {}
        if self._workspace is not None:
            found[False] = self._workspace.view(own, shape.reads, starts)
        if self._workspace8 is not None and shape.eight_bit:
            found[True] = self._workspace8.view(own, shape.reads, shape.writes, shape.needs_key_mean)
        return found

    def _read(self, index: int, eight_bit: bool, view: View, shape: StepShape, inputs: StepInputs) -> None:
        """Copies neighbours' features to their places, converted where their maker's setting was another."""
        if isinstance(view.context, Context8) and not shape.needs_key_mean:
            self.store.load(index, "mean", True, inputs.mean_at[0], [view.context.means[0]])
        for (side, on), at, target in zip(shape.reads, inputs.read_at, view.places, strict=True):
            made_8bit = on and self._covered[index]
            if made_8bit == eight_bit:
                self._load(index, side, made_8bit, at, target)
                if side == "anchor":
                    turn(target[0], Rotary(*inputs.shift), self._heads)
                continue
            assert self._workspace is not None and self._workspace8 is not None
            converted: Format
            if made_8bit:
                features = self._workspace8.fresh(side)
                self._load(index, side, True, at, features.tensors)
                converted = to_16bit(features, self.experts[0].dtype)
            else:
                plain = self._workspace.fresh(side)
                self._load(index, side, False, at, plain)
                converted = to_8bit(plain, self.experts[0].heads, self._fp8).tensors
            for tensor, source in zip(target, converted, strict=True):
                tensor.copy_(source)

    def _load(self, index: int, side: str, eight_bit: bool, at: torch.Tensor, out: Format) -> None:
        """Copies the features of a row into ``out`` as their maker had them, but for what keeping them has cost."""
        if eight_bit or not self.spec.features_8bit:
            self.store.load(index, side, eight_bit, at, out)
            return
        packed = Packed.fresh(out)
        self.store.load(index, side, False, at, packed.tensors)
        packed.restore(out)

    def _lends(self, index: int, starts: Mapping[str, int], inputs: StepInputs) -> dict[str, Lend]:
        """Places of the store that the layer itself writes, by side."""
        found = {
            side: self.store.lend(index, side, at, start)
            for (side, start), at in zip(starts.items(), inputs.write_at, strict=True)
        }
        return {side: lend for side, lend in found.items() if lend is not None}

    def _formats(self, starts: Mapping[str, int], covered: bool) -> dict[str, dict[bool, Format]]:
        """Formats of a layer's slots, by side. Only layers in 8 bits at all steps need no other format."""
        found: dict[str, dict[bool, Format]] = {}
        for side in starts:
            found[side] = {}
            if self._workspace is not None and not (covered and self._always_8bit):
                plain = self._workspace.fresh(side, "meta")
                kept = Packed.fresh(plain).tensors if self.spec.features_8bit else plain
                found[side][False] = kept
            if self._workspace8 is not None and covered:
                found[side][True] = self._workspace8.fresh(side, "meta").tensors
        if covered and any(self._on):
            found["mean"] = {True: [torch.empty(self.inner_dim, dtype=torch.float32, device="meta")]}
        return found

    def _row(self, features: Features) -> torch.Tensor:
        return self.store.row(features.side, features.slot, features.branch)

    def _runs(self, plan: UnitPlan) -> list[Run]:
        return self._moments.runs(plan.window, plan.unit.step, plan.fed_context, plan.fed_step)

    def _text_condition(self, prompt: int, branch: int, expert: int) -> torch.Tensor:
        key = prompt, branch, expert
        if key not in self._text:
            self._text[key] = self.experts[expert].text(self._prompts[prompt][branch])
        return self._text[key]

    def _shift(self, frames: int) -> Rotary:
        """The angles that move the anchor; kept for as many readers as are under way."""
        found = self._shifts.pop(frames, None) or self.experts[0].shift(frames)
        self._shifts[frames] = found
        if len(self._shifts) > self.spec.windows:
            del self._shifts[next(iter(self._shifts))]
        return found
