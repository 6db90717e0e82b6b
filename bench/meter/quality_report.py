"""From measured videos to figures with intervals, a table, curves and filmstrips (quality.py makes the videos).

Intervals are 95 %, Student's t over captions, each with all of its seeds, as videos of one caption are no independent
samples. They say what other captions of this kind would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from meter.persistence import KINDS

RENDERINGS = 12  # of the truth per caption, that features are compared with
FEWEST = 6  # captions of which an interval is said
ENOUGH = (20, 2)  # captions, and seeds of each, of which a difference may be called a finding
Videos = Mapping[tuple[int, int], dict[str, np.ndarray]]  # (prompt, seed) -> what quality.run found


class Column:
    """A figure of the table. ``ratio``: averaged as logarithms, and 1 is ideal."""

    def __init__(self, name: str, title: str, digits: int, *, percent: bool = False, ratio: bool = False) -> None:
        self.name, self.title, self.digits, self.percent, self.ratio = name, title, digits, percent, ratio

    def show(self, value: float) -> str:
        return "-" if np.isnan(value) else f"{100 * value if self.percent else value:.{self.digits}f}"


COLUMNS = [
    Column("seam", "seam", 2, ratio=True),
    Column("right", "count %", 0, percent=True),
    Column("many", "too many %", 0, percent=True),
    Column("few", "too few %", 0, percent=True),
    Column("colour", "wrong colour %", 0, percent=True),
    Column("held", "held %", 0, percent=True),
    Column("of_vae", "held, of vae's %", 0, percent=True),
    Column("kept", "kept %", 0, percent=True),
    *(Column(kind, f"{kind} /100", 2) for kind in KINDS),
    Column("inside", "inside /100", 2),
    Column("at_seam", "at seams /100", 2),
    Column("motion", "motion %", 0, percent=True),
    Column("ground", "ground drift", 3),
    Column("contrast", "contrast", 2, ratio=True),
    Column("ground_right", "ground %", 0, percent=True),
    Column("caption", "caption %", 0, percent=True),
    Column("frechet", "Frechet", 2),
    Column("diversity", "diversity", 2),
    Column("seconds", "core s", 1),
]


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of two sets of features [clips, features], as normal distributions.

    |difference of means|^2 + trace(A + B - 2 (A B)^(1/2)) with covariances A, B. Features are standardised on the
    truth, so that their number (32) is what a set at one point would be away from it. Small sets are biased upwards:
    compare with the row "truth" of the same length, never with 0.
    """
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root)


def spread(features: list[np.ndarray]) -> float:
    """Mean distance between videos of one caption, over pairs and over clips at the same place.

    features: [clips, features] per video. NaN for one video.
    """
    pairs = [np.linalg.norm(a - b, axis=-1).mean() for i, a in enumerate(features) for b in features[:i]]
    return float(np.mean(pairs)) if pairs else float("nan")


def interval(statistic: Callable[[np.ndarray], float], prompts: int) -> tuple[float, ...]:
    """(value, low, high) of a statistic of prompt numbers, by the jackknife over captions and Student's t.

    Of a mean over captions it is the t interval. Captions without which the statistic is NaN are no sample of it.
    low and high are NaN below ``FEWEST`` captions, and where captions do not differ, which says nothing of others.
    """
    everyone = np.arange(prompts)
    value = statistic(everyone)
    without = np.array([statistic(np.delete(everyone, i)) for i in everyone]) if prompts > 1 else np.zeros(0)
    without = without[~np.isnan(without)]
    number = len(without)
    if number < FEWEST or np.isnan(value) or np.ptp(without) < 1e-9 * max(1.0, abs(value)):
        return value, float("nan"), float("nan")
    wide = student(number - 1) * np.sqrt((number - 1) * without.var())
    return value, value - wide, value + wide


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t, to 0.001 from 5 degrees of freedom on (Abramowitz and Stegun 26.7.5)."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, 1)))


def mean_of(values: list[np.ndarray]) -> Callable[[np.ndarray], float]:
    """The statistic for ``interval`` of values [seeds] per caption: the mean of captions' means; NaN is left out."""
    means = np.array([part[~np.isnan(part)].mean() if not np.isnan(part).all() else np.nan for part in values])

    def mean(chosen: np.ndarray) -> float:
        kept = means[chosen][~np.isnan(means[chosen])]
        return float(kept.mean()) if len(kept) else float("nan")

    return mean


def summarise(videos: Videos, truth: list[np.ndarray], floor: Videos | None = None) -> dict[str, float]:
    """Of one variant at one length: every figure, and NAME_low and NAME_high of its interval.

    floor: the truth through the VAE, of the same length and captions, that ``of_vae`` is relative to; None: NaN.
    truth: per prompt, features [renderings, clips, features] (``quality.reference``).
    """
    prompts, row = sorted({prompt for prompt, _ in videos}), {}

    def of(prompt: int) -> list[dict[str, np.ndarray]]:
        return [found for (p, _), found in videos.items() if p == prompt]

    for column in COLUMNS:
        if column.name in ("frechet", "diversity", "of_vae"):
            continue
        scale: Callable[[Any], Any] = np.log if column.ratio else lambda x: x
        back: Callable[[float], float] = np.exp if column.ratio else lambda x: x
        values = [scale(np.array([float(v[f"figure {column.name}"]) for v in of(prompt)])) for prompt in prompts]
        row |= _named(column.name, [back(x) for x in interval(mean_of(values), len(prompts))])

    own_held, floor_held = (
        np.array(
            [np.mean([float(v["figure held"]) for (p, _), v in some.items() if p == prompt]) for prompt in prompts]
        )
        for some in (videos, floor or videos)
    )

    def relative(chosen: np.ndarray) -> float:
        least = float(floor_held[chosen].mean()) if floor else 0.0
        return float(own_held[chosen].mean()) / least if least else float("nan")

    row |= _named("of_vae", interval(relative, len(prompts)))

    features = [[v["features"] for v in of(prompt)] for prompt in prompts]
    ideal = [truth[prompt].reshape(-1, truth[prompt].shape[-1]) for prompt in prompts]

    def distance(chosen: np.ndarray) -> float:
        return frechet(
            np.concatenate([f for i in chosen for f in features[i]]), np.concatenate([ideal[i] for i in chosen])
        )

    own = np.array([spread(f) for f in features])
    true = np.array([spread(list(truth[prompt])) for prompt in prompts])
    row |= _named("frechet", interval(distance, len(prompts)))
    row |= _named("diversity", interval(lambda chosen: float(own[chosen].sum() / true[chosen].sum()), len(prompts)))
    return row


RATIOS = ("seam", "seconds")
EVENTS = (*KINDS, "inside", "at_seam")
PAIRED = ("seam", "right", "many", "few", "colour", "held", "kept", *EVENTS, "caption", "seconds")


def differences(videos: Videos, base: Videos) -> dict[str, tuple[float, ...]]:
    """Of a variant from another one with the same captions and seeds, figure -> (value, low, high), by caption.

    Percentages are differences in points, events differences per 100 frames; seam and seconds are ratios.
    """
    prompts, found = sorted({prompt for prompt, _ in videos}), {}
    for name in PAIRED:
        ratio = name in RATIOS

        def of(video: Mapping[str, np.ndarray], name: str = name, ratio: bool = ratio) -> float:
            value = float(video[f"figure {name}"])
            return float(np.log(value)) if ratio else value if name in EVENTS else 100 * value

        pairs = [np.array([of(v) - of(base[key]) for key, v in videos.items() if key[0] == p]) for p in prompts]
        values = interval(mean_of(pairs), len(prompts))
        found[name] = tuple(float(np.exp(x)) for x in values) if ratio else values
    return found


def is_finding(videos: Videos, low: float, high: float, *, ratio: bool) -> bool:
    """True if captions and seeds are ``ENOUGH`` and the interval of a difference (or ratio) leaves out none (or 1)."""
    prompts = {prompt for prompt, _ in videos}
    none = 1.0 if ratio else 0.0
    return len(prompts) >= ENOUGH[0] and len(videos) >= len(prompts) * ENOUGH[1] and (low > none or high < none)


def _named(name: str, values: Any) -> dict[str, float]:
    return {key: round(float(value), 5) for key, value in zip((name, f"{name}_low", f"{name}_high"), values)}


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table(title="below a figure: its 95 % interval over captions")
    for title in _TITLES:
        found.add_column(title, justify="left" if title == "variant" else "right")
    for row in rows:
        cells = [f"{c.show(row[c.name])}\n[dim]{_interval(c, row)}[/dim]" for c in COLUMNS]
        found.add_row(*_head(row), *cells)
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, intervals in small print."""
    lines = [_TITLES, ["---"] * len(_TITLES)]
    for row in rows:
        cells = [f"{c.show(row[c.name])} <sub>{_interval(c, row)}</sub>" for c in COLUMNS]
        lines.append([*_head(row), *(cell.replace(" <sub></sub>", "") for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


_TITLES = ["latents", "variant", "videos", *(column.title for column in COLUMNS)]


def _head(row: Mapping[str, Any]) -> list[str]:
    return [str(row["latents"]), row["variant"], f"{row['prompts']}×{row['seeds']}"]


def _interval(column: Column, row: Mapping[str, Any]) -> str:
    low, high = column.show(row[f"{column.name}_low"]), column.show(row[f"{column.name}_high"])
    return "" if "-" in (low, high) or low == high else f"{low}..{high}"


# Pictures ------------------------------------------------------------------------------------------------------


def draw(folder: Path, videos: Mapping[tuple[int, str], Videos], rows: list[dict[str, Any]], caption: str) -> None:
    """quality-table.md; per length quality-curves-N.png, and quality-strips-N.png of the first caption and seed."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality-table.md").write_text(markdown(rows))
    for length in sorted({length for length, _ in videos}):
        chosen = {name: found for (n, name), found in videos.items() if n == length}
        _curves(folder / f"quality-curves-{length}.png", chosen)
        _strips(folder / f"quality-strips-{length}.png", chosen, caption)


def _curves(path: Path, variants: Mapping[str, Videos]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.5), constrained_layout=True)
    for index, (name, videos) in enumerate(variants.items()):
        style = {"color": pyplot.get_cmap("tab20")(index % 20), "linestyle": "-" if index < 20 else "--"}
        for axis, curve in zip(axes, ("right", "ground")):
            mean = np.mean([found[f"curve {curve}"] for found in videos.values()], axis=0)
            width = max(1, len(mean) // 40)
            smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
            axis.plot(np.arange(len(smooth)) + width // 2, smooth, label=name, linewidth=1.5, **style)
    axes[0].set(title="videos whose objects are as the caption says", xlabel="frame", ylim=(-0.02, 1.02))
    axes[1].set(title="distance of the background's colour from the start", xlabel="frame", ylim=(0, None))
    axes[1].legend(fontsize="small", ncols=1 + len(variants) // 12, loc="upper left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _strips(path: Path, variants: Mapping[str, Videos], caption: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(variants), 1, figsize=(13, 0.9 * len(variants) + 0.5), squeeze=False)
    for axis, (name, videos) in zip(axes[:, 0], variants.items()):
        strip = videos[min(videos)]["strip"]
        axis.imshow(np.concatenate(list(np.pad(strip, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)), axis=1))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    figure.suptitle(f"{caption}; from the first frame to the last", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
