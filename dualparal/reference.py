"""The whole method in one process with a plain loop: the oracle that every faster way must equal.

No schedule, no transport, no slots: neighbour features lie in a dictionary under the name of the unit that made
them, and with 8-bit attention the means of a block's keys in another. A new block enters every ``gap`` iterations;
block b is at step i - b * gap in iteration i (DualParal, section 3, has a gap of one). Steps are those that are run;
the sampler's between two of them follow at once, with extrapolated velocities.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from dualparal.config.eight_bit import OFF, EightBitPolicy
from dualparal.config.reuse import REUSE_OFF, Reuse
from dualparal.kernels.attention_8bit import FP8, TILE, KeysValues8, key_mean, lent, place, tiles_of
from dualparal.kernels.combine_guidance import combine_guidance
from dualparal.models.base import Grid, ModelSpec, Pending, Slice, TimeCondition
from dualparal.models.keys_values import Context8, Features8, KeysValues, Packed, to_8bit, to_16bit
from dualparal.models.times import joined
from dualparal.sampling.extrapolate import extrapolate
from dualparal.sampling.sampler import Sampler
from dualparal.schedule.layout import Layout

Name = tuple[int, str, int, int, int]  # layer, side, block, step, branch


@torch.inference_mode()
def generate(
    spec: ModelSpec,
    experts: Sequence[Slice],
    sampler: Sampler,
    layout: Layout,
    grid: Grid,
    noise: Callable[[int], torch.Tensor],
    prompt_embeds: Callable[[int], torch.Tensor],
    guidance_scales: Sequence[float],
    eight_bit: EightBitPolicy = OFF,
    features_8bit: bool = False,
    reuse: Reuse = REUSE_OFF,
    condition: Callable[[range], torch.Tensor] | None = None,
    first_frame: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final latents [1, C, L, H, W] float32 of a video of ``layout.num_latents`` frames.

    Args:
        experts: each transformer as one slice of all its layers.
        noise: block -> initial latents of its own frames.
        prompt_embeds: block -> [1 or 2, sequence, text_dim], the conditional row first; two rows mean guidance.
        guidance_scales: one per expert.
        eight_bit: the layers and steps in 8 bits. A block takes from its keys their mean of the step before (at its
            first such step, of this one). Features stay as made, or in 8 bits (``features_8bit``); readers convert.
        condition: latent frames -> what the model is told of images in them, [1, C', F, H, W]; None: nothing.
        reuse: the steps and branches that are not run. Where a neighbour's branch was not, its conditional one is read.
        first_frame: latents [1, C, 1, H, W] that the video begins with, for a model that keeps them; None: none.
    """
    assert layout.num_blocks is not None, "the reference makes finite videos"
    plan = reuse.plan(sampler.levels, len(prompt_embeds(0)) == 2)
    policy, context, steps = layout.blocks.context, layout.blocks.context_frames, len(plan.runs)
    gap = layout.blocks.gap(steps)
    # Features of the previous block: of so many steps later than the reader's, at most of the last one.
    ahead = {"matching": 0, "newest": gap - 1}[layout.blocks.context_version] if policy == "cached" else gap
    states = [sampler.start(block) for block in range(layout.num_blocks)]
    latents: list[torch.Tensor] = []
    features: dict[Name, KeysValues | Features8] = {}
    means: dict[tuple[int, int, int], torch.Tensor] = {}  # by layer, block and branch
    velocities = Velocities(sampler.levels, reuse.order)
    times = Times(spec, layout, grid.tokens, sampler.timesteps[list(plan.runs)], gap, int(first_frame is not None))
    scales = [guidance_scales[spec.expert(float(t), sampler.num_train_timesteps)] for t in sampler.timesteps]
    every, fp8 = layout.blocks.refresh_every, eight_bit.mode == "fp8"

    def lent_by(layer: int, side: str, block: int, step: int, branch: int) -> KeysValues | Features8:
        return features[layer, side, block, step, 0 if step in plan.conditional_only else branch]

    def forward(block: int, step: int, branch: int, newest: int, refresh: bool) -> torch.Tensor:
        timestep = sampler.timesteps[plan.runs[step]]
        expert = experts[spec.expert(float(timestep), sampler.num_train_timesteps)]
        fed = layout.fed_context(block, refresh)
        window = torch.cat([latents[block - 1][:, :, -fed:], latents[block]], dim=2) if fed else latents[block]
        time, text = times.of(expert, block, step, refresh), expert.text(prompt_embeds(block)[branch])
        rotary = expert.rotary(layout.window(block, refresh).start, window.shape[2], grid)
        hidden = expert.embed(expert.patches(told(window, condition, layout.window(block, refresh))))
        pending: Pending | None = None
        own, count, first = len(hidden), context * grid.tokens, fed * grid.tokens
        for layer in range(expert.num_layers):
            parts = []
            if context and policy != "prior" and block < newest:
                parts.append(lent_by(layer, "head", block + 1, step - gap, branch))
            if context and policy != "paper" and block > 0 and not refresh:
                parts.append(lent_by(layer, "tail", block - 1, min(step + ahead, steps - 1), branch))
            mean, on = means.get((layer, block, branch)), eight_bit.covers(layer) and eight_bit.at(step, steps)
            keys_values: KeysValues | Context8
            keys_values = arena(mean, parts, hidden, spec.heads, fp8) if on and not refresh else join(parts, hidden)
            hidden, pending = expert.layer(layer, hidden, pending, time, KeysValues(*text[layer]), rotary, keys_values)
            for side, start in (("head", first), ("tail", own - count)):
                features[layer, side, block, step, branch] = lend(keys_values, start, count, features_8bit)
            if isinstance(keys_values, Context8):
                means[layer, block, branch] = key_mean(keys_values.k_sums, own)
        return expert.picture(expert.head(hidden[first:], pending and (pending[0][first:], pending[1]), time), grid)

    for iteration in itertools.count():
        newest = min(iteration // gap, layout.num_blocks - 1)
        blocks = [block for block in range(newest + 1) if iteration - block * gap < steps]
        if not blocks:
            break
        if newest * gap == iteration:
            latents.append(begin(noise(newest), newest, first_frame))
        refresh = every is not None and iteration >= every and iteration % every < gap
        if refresh:
            means.clear()
        for block in blocks if policy == "prior" and not refresh else reversed(blocks):
            step = iteration - block * gap
            last = plan.runs[step]
            for branch in range(1 if step in plan.conditional_only else len(prompt_embeds(block))):
                velocities.run[block, branch, last] = forward(block, step, branch, newest, refresh)
            for at in range(last, plan.runs[step + 1] if step + 1 < steps else len(sampler)):
                velocity = velocities.at(block, at, last, scales[at] if plan.guided[step] else None)
                latents[block] = begin(states[block].step(velocity, at, latents[block]), block, first_frame)
        # The next iteration reads what was made at most ``gap`` iterations before it.
        features = {n: kv for n, kv in features.items() if n[2] * gap + n[3] > iteration - gap}
    return torch.cat(latents, dim=2)[:, :, : layout.num_latents]


def told(window: torch.Tensor, condition: Callable[[range], torch.Tensor] | None, frames: range) -> torch.Tensor:
    """Latents [1, C, F, H, W] of some frames, and behind them the channels that the model is told of images there."""
    return window if condition is None else torch.cat([window, condition(frames)], dim=1)


def begin(latents: torch.Tensor, block: int, first_frame: torch.Tensor | None) -> torch.Tensor:
    """Latents of a block; those of the first one begin with ``first_frame``, if there is one."""
    return latents if block or first_frame is None else torch.cat([first_frame, latents[:, :, 1:]], 2)


class Times:
    """Timesteps of the frames of a window.

    Args:
        spec: of the model.
        layout: the places of blocks in the video.
        tokens: of a frame.
        timesteps: the sampler's at the steps that are run.
        gap: iterations between two blocks.
        fixed: the first frames of the video that are given.
    """

    def __init__(
        self, spec: ModelSpec, layout: Layout, tokens: int, timesteps: torch.Tensor, gap: int, fixed: int
    ) -> None:
        self.layout, self.tokens, self.timesteps, self.fixed = layout, tokens, timesteps, fixed
        self.ahead = gap if spec.unequal_times else 0

    def of(self, expert: Slice, block: int, step: int, refresh: bool) -> TimeCondition:
        """The modulations of a block's window at a step: frames of the block before may be told to be further, those
        that are finished or given are at 0."""
        end, start = len(self.timesteps), self.layout.start(block)
        fed = min(step + self.ahead, end)
        window = self.layout.window(block, refresh)
        at = [end if frame < self.fixed else fed if frame < start else step for frame in window]
        runs = [(step, self.tokens * len(list(frames))) for step, frames in itertools.groupby(at)]
        stamps = [self.timesteps[step] if step < end else 0 * self.timesteps[0] for step, _ in runs]
        return joined([expert.time(stamp) for stamp in stamps], [rows for _, rows in runs])


class Velocities:
    """Velocities of the steps that are run, and with them those of the others.

    Args:
        levels: noise levels of the sampler's steps.
        order: of extrapolation.

    Attributes:
        run: by block, branch and the sampler's step.
    """

    def __init__(self, levels: Sequence[float], order: int) -> None:
        self.levels, self.order = levels, order
        self.run: dict[tuple[int, int, int], torch.Tensor] = {}

    def at(self, block: int, at: int, last: int, scale: float | None) -> torch.Tensor:
        """The velocity at the sampler's step ``at``, with ``last`` the last one run. No scale: no guidance."""
        cond = self.run[block, 0, at] if at == last else self._guess(block, 0, at, last)
        if scale is None:
            return cond
        if at == last and (block, 1, at) in self.run:
            return combine_guidance(cond, self.run[block, 1, at], scale)
        return combine_guidance(cond.float(), cond.float() + self._guess(block, 1, at, last), scale)

    def _guess(self, block: int, branch: int, at: int, last: int) -> torch.Tensor:
        """The conditional velocity, or the distance of the unconditional one (1) from it."""
        known = [step for step in range(last + 1) if (block, branch, step) in self.run][-1 - self.order :]
        made = [self.run[block, branch, step].float() - branch * self.run[block, 0, step].float() for step in known]
        return extrapolate(made, [self.levels[step] for step in known], self.levels[at])


def join(parts: Sequence[KeysValues | Features8], hidden: torch.Tensor) -> KeysValues:
    """Lays rows for ``hidden`` [tokens, inner], to be written, and the neighbours' features behind them into one."""
    made = [to_16bit(part, hidden.dtype) if isinstance(part, Features8) else part for part in parts]
    made = [KeysValues(torch.empty_like(hidden), torch.empty_like(hidden)), *made]
    return KeysValues(torch.cat([part.keys for part in made]), torch.cat([part.values for part in made]))


def arena(
    mean: torch.Tensor | None, parts: Sequence[KeysValues | Features8], like: torch.Tensor, heads: int, fp8: bool
) -> Context8:
    """Lays rows for ``like``, to be written, and the neighbours' features behind them into one 8-bit context.

    Args:
        mean: float32 [inner], to be taken from the own keys; None: not known yet.
        parts: features of neighbours, in the order of their keys.
        like: hidden states [tokens, inner].
        heads: of self-attention.
        fp8: values are in 8 bits, too.
    """
    neighbours = [part if isinstance(part, Features8) else to_8bit(part, heads, fp8) for part in parts]
    inner = like.shape[1]
    lengths = [(len(like), 0), *((len(part.keys_values.k), part.skip) for part in neighbours)]
    tiles = [tiles_of(rows) for rows, _ in lengths]
    made = KeysValues8.empty(sum(tiles) * TILE, inner, heads, FP8 if fp8 else like.dtype, like.device)
    sums = torch.zeros(tiles[0], inner, dtype=torch.float32, device=like.device)
    means = torch.stack([sums[0] if mean is None else mean, *(part.mean for part in neighbours)])
    for number, part in enumerate(neighbours, 1):
        rows = made.rows(sum(tiles[:number]) * TILE, lengths[number][0])
        for target, source in zip(rows, part.keys_values, strict=True):
            if target is not None and source is not None:
                target.copy_(source)
    return Context8(made, place(lengths), means, sums, mean is None)


def lend(made: KeysValues | Context8, start: int, count: int, packed: bool) -> KeysValues | Features8:
    """The features that a neighbour reads: ``count`` rows from ``start`` on, in the format that they were made in.

    ``packed``: those in 16 bits have been kept in 8.
    """
    if isinstance(made, KeysValues):
        rows = made.rows(start, count)
        if not packed:
            return rows
        kept = KeysValues(*map(torch.empty_like, rows))
        Packed.of(rows).restore(kept)
        return kept
    share = lent(start, count)
    return Features8(made.arena.rows(share.first, share.rows), made.means[0], share.skip)
