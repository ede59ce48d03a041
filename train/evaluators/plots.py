"""The pictures of runs: curves, fact recall, leak@k, truth ratios, forget against retain.

Arrays in, PNG out.

Sized to stay legible at phone width; lines differ in dash and marker as well as in colour.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import MaxNLocator

from train.evaluators.base import Metric
from train.evaluators.numbers import format_number, number
from train.options.roles import ROLES, Roles

# Near the Okabe-Ito palette, which colour-blind readers can tell apart, and dark enough for lines.
STYLES: dict[str, dict[str, Any]] = {
    "start": {"color": "#404040", "linestyle": (0, (5, 2)), "marker": "s"},
    "reference": {"color": "#0072B2", "linestyle": (0, (1, 1.2)), "marker": "^"},
    "judged": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    "forget": {"color": "#A0287A", "linestyle": "-", "marker": "o"},
    "retain": {"color": "#007F5F", "linestyle": (0, (5, 2)), "marker": "s"},
}
# Styles of models without a role (`attacked:…`), in turn.
FURTHER: tuple[dict[str, Any], ...] = (
    {"color": "#8C6D00", "linestyle": (0, (5, 1, 1, 1)), "marker": "v"},
    {"color": "#5B3FA8", "linestyle": (0, (3, 1)), "marker": "D"},
    {"color": "#B0413E", "linestyle": (0, (1, 2.4)), "marker": "P"},
    {"color": "#007F5F", "linestyle": (0, (7, 2, 1, 2)), "marker": "X"},
)
# Styles of everything without a role, in turn.
COLORS = ("#D55E00", "#0072B2", "#007F5F", "#A0287A", "#8C6D00", "#404040", "#5B3FA8", "#B0413E")
MARKERS = ("o", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
FONT = 11
WIDTH = 5.0
LEGEND_COLUMN = 26  # characters of a name that fit one of two columns


def styles(models: Sequence[str], roles: Roles) -> dict[str, dict[str, Any]]:
    """The style of each model: that of its role, or else the next of `FURTHER`."""
    named = dict(zip(roles.models, ("start", "reference", "judged"), strict=True))
    others = [model for model in models if model not in named]
    further = {model: FURTHER[i % len(FURTHER)] for i, model in enumerate(others)}
    return {m: STYLES[named[m]] if m in named else further[m] for m in models}


class Ratios(NamedTuple):
    """Per-item truth ratios by model, and the KS distance and p as reported."""

    values: dict[str, np.ndarray]
    distance: float | None
    p: float | None


def _figure(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=200, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    axes = [figure.add_subplot(grid[i, 0]) for i in range(len(heights))]
    for ax in axes:
        ax.grid(True, color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=FONT - 1)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure, axes


def _legend(ax: Axes, **kwargs: Any) -> None:
    ax.legend(fontsize=FONT - 1, framealpha=0.9, edgecolor="#CCCCCC", handlelength=2.6, **kwargs)


def _above(ax: Axes, ncols: int = 3) -> None:
    """A legend in a line above the axes."""
    ax.legend(
        fontsize=FONT - 1,
        frameon=False,
        handlelength=2.4,
        ncols=ncols,
        columnspacing=1.2,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )


def _below(figure: Figure, handles: Sequence[Any], ncols: int) -> None:
    """A legend below the axes, names as they are written."""
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=ncols,
        fontsize=FONT - 1, frameon=False, handletextpad=0.3, columnspacing=1.2,
    )  # fmt: skip
    for label in legend.get_texts():
        label.set_parse_math(False)


def _label(name: str) -> str:
    """A name for a legend; Matplotlib leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def png(figure: Figure, title: str = "") -> bytes:
    """The figure as PNG bytes, without a time stamp or version (equal input gives equal bytes)."""
    out = io.BytesIO()
    if title:
        figure.suptitle(title, fontsize=FONT + 1, fontweight="bold")
    with warnings.catch_warnings():
        # Scripts that the font lacks are drawn as boxes; the text of the page is not affected.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def series(steps: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a quantity, where it was logged.

    Example:
        >>> series([{"step": 1, "loss": 2.0}, {"step": 2}], "loss")
        ([1], [2.0])
    """
    pairs = [(row["step"], number(row.get(name))) for row in steps]
    kept = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def curves(
    steps: Sequence[dict[str, Any]], reference: dict[str, Any] | None, roles: Roles = ROLES
) -> Figure | None:
    """Forget and retain over the steps of the unlearning stage: ROUGE-L above, losses below.

    Args:
        steps: the stage's lines of `metrics.jsonl`.
        reference: the reference model's flat metrics, drawn as the target level.
        roles: the roles of the models.

    Returns:
        The figure, or None when nothing was logged.
    """
    quality = next(
        (q for q in ("rouge", "probability") if any(f"forget_{q}" in row for row in steps)), None
    )
    names = [n for n in ("forget_loss", "retain_loss") if series(steps, n)[0]]
    names = names or [n for n in ("loss",) if series(steps, n)[0]]
    if quality is None and not names:
        return None
    figure, axes = _figure([2.7] * bool(quality) + [2.3] * bool(names))
    if quality:
        ax = axes[0]
        for part in ("forget", "retain"):
            x, y = series(steps, f"{part}_{quality}")
            ax.plot(x, y, label=part, linewidth=2, markersize=5, **STYLES[part])
        level = number((reference or {}).get(f"forget_{quality}"))
        if level is not None:
            style = {k: STYLES["reference"][k] for k in ("color", "linestyle")}
            ax.axhline(level, linewidth=1.8, label=f"{roles.reference}, forget", **style)
        ax.set_ylim(-0.03, 1.05)
        label = "ROUGE-L recall" if quality == "rouge" else "probability"
        ax.set_ylabel(label, fontsize=FONT)
        _above(ax)
    if names:
        ax = axes[-1]
        for name in names:
            x, y = series(steps, name)
            part = name.removesuffix("_loss")
            style: dict[str, Any] = dict(STYLES.get(part, STYLES["judged"]))
            style["marker"] = "o" if len(x) == 1 else None
            ax.plot(x, y, linewidth=1.8, label=f"{part} loss" if part != name else "loss", **style)
        ax.set_ylabel("training loss", fontsize=FONT)
        _legend(ax)
    axes[-1].set_xlabel("unlearning step", fontsize=FONT)
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    left, right = axes[0].get_xlim()
    for ax in axes:
        left, right = min(left, ax.get_xlim()[0]), max(right, ax.get_xlim()[1])
    for ax in axes:
        ax.set_xlim(left, right)
    return figure


def losses(steps: Sequence[Mapping[str, Any]], label: str = "nats a token") -> Figure | None:
    """Training and validation loss over the steps of one run.

    Args:
        steps: the stage's lines of `metrics.jsonl`, `loss` and `validation_loss` among them.
        label: the label of the losses.

    Returns:
        The figure, or None when nothing was logged.
    """
    rows = [dict(row) for row in steps]
    if not series(rows, "loss")[0]:
        return None
    figure, (ax,) = _figure([3.0])
    x, y = series(rows, "loss")
    ax.plot(x, y, label="batch", linewidth=1, color="#9A9A9A")
    x, y = series(rows, "validation_loss")
    if x:
        ax.plot(x, y, label="held out", linewidth=2, markersize=5, **STYLES["judged"])
    ax.set_xlabel("step", fontsize=FONT)
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.set_ylabel(label, fontsize=FONT)
    _above(ax)
    return figure


def over_forwards(
    steps: Sequence[Mapping[str, Any]], name: str, forwards: float, levels: Mapping[str, float]
) -> Figure | None:
    """A share of the dev rows over the forward passes that training took.

    Args:
        steps: the stage's lines of `metrics.jsonl`, with `dev_NAME` at some of them.
        name: the name of the metric, `accuracy` or `f1`.
        forwards: the forward passes of a step, on average.
        levels: the same metric of the test rows, by model.

    Returns:
        The figure, or None when nothing was logged.
    """
    x, y = series([dict(row) for row in steps], f"dev_{name}")
    if not x:
        return None
    figure, (ax,) = _figure([3.0])
    places, style = [forwards * step for step in x], STYLES["judged"]
    ax.plot(places, y, label="dev rows", linewidth=2, markersize=5, **style)
    for (model, value), line in zip(levels.items(), (":", "--"), strict=False):
        label = f"{model}, test rows"
        ax.axhline(value, linestyle=line, linewidth=1, color="#6A6A6A", label=label)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("forward passes", fontsize=FONT)
    ax.set_ylabel(name, fontsize=FONT)
    _above(ax)
    return figure


class Band(NamedTuple):
    """An experiment in a comparison of curves: its name, places, and the values of every seed."""

    name: str
    places: np.ndarray  # (P,)
    values: np.ndarray  # (seeds, P)


def overlay(bands: Sequence[Band], x: str, y: str, rises: bool = False) -> Figure:
    """Curves of several experiments: the mean of the seeds, and the range that they span.

    Bands are listed below the axes, the best last value first.

    Args:
        bands: the bands, at least one.
        x: the label of the horizontal axis.
        y: the label of the vertical axis.
        rises: whether higher is better.
    """
    labels = [b.name if len(b.values) == 1 else f"{b.name} (n={len(b.values)})" for b in bands]
    columns = 2 if max(map(len, labels)) <= LEGEND_COLUMN else 1
    figure, (ax,) = _figure([3.4 + 0.24 * -(-len(bands) // columns)])
    lines = []
    for i, ((_, places, values), label) in enumerate(zip(bands, labels, strict=True)):
        # Eight colors and seven marks: pairs repeat after 56.
        style: dict[str, Any] = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
        }
        label = _label(label)
        lines += ax.plot(places, values.mean(0), label=label, linewidth=2, markersize=4, **style)
        if len(values) > 1:
            low, high = values.min(0), values.max(0)
            ax.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0)
    ax.set_xlabel(x, fontsize=FONT)
    ax.set_ylabel(y, fontsize=FONT)
    ends = [float(band.values[:, -1].mean()) for band in bands]
    order = sorted(range(len(bands)), key=lambda i: -ends[i] if rises else ends[i])
    _below(figure, [lines[i] for i in order], columns)
    return figure


def shares(
    summary: Mapping[str, Mapping[str, Any]], name: str, what: str, label: str, roles: Roles = ROLES
) -> Figure | None:
    """Bars of a share of every model, on the forget rows and on the retain rows.

    Args:
        summary: the flat metrics by model; `forget_NAME` and `retain_NAME` are drawn.
        name: the end of their names.
        what: the things to forget and to keep, in the legend.
        label: the label of the axis.
        roles: the roles of the models.

    Returns:
        The figure, or None where neither was measured.
    """
    parts = ("forget", "retain")
    known = {f"{part}_{name}" for part in parts}
    models = [m for m in roles.order(summary) if m in roles.models or known & set(summary[m])]
    values = {(m, part): number(summary[m].get(f"{part}_{name}")) for m in models for part in parts}
    if all(value is None for value in values.values()):
        return None
    figure, (ax,) = _figure([0.9 + 0.62 * len(models)])
    ax.grid(visible=False, axis="y")
    for i, part in enumerate(parts):
        here = [(row, values[m, part]) for row, m in enumerate(models)]
        here = [(row, value) for row, value in here if value is not None]
        rows = [row + 0.38 * (i - 0.5) for row, _ in here]
        values_here = [100 * value for _, value in here]
        hatch = "//" if part == "retain" else None
        bars = ax.barh(
            rows, values_here, 0.36, label=f"{what} to {'forget' if part == 'forget' else 'keep'}",
            color=STYLES[part]["color"], edgecolor="white", hatch=hatch,
        )  # fmt: skip
        ax.bar_label(bars, [f"{v:.0f} %" for v in values_here], padding=3, fontsize=FONT - 1)
    ax.set_yticks(range(len(models)), models, fontsize=FONT)
    ax.invert_yaxis()
    ax.set_xlim(0, 114)
    ax.set_xticks(range(0, 101, 25))
    ax.set_xlabel(label, fontsize=FONT)
    _above(ax, 2)
    return figure


class Point(NamedTuple):
    """An experiment in the scatter plot: its short name, and (x, y) of each of its runs."""

    name: str
    values: list[tuple[float, float]]


class Fixed(NamedTuple):
    """A hollow mark of the scatter plot: the start of unlearning, or what it should reach.

    Args:
        name: its name in the legend.
        start: whether it is a start.
        values: (x, y) of each run, of which the mean is drawn.
        point: the number of the experiment that it belongs to; None: all of them.
    """

    name: str
    start: bool
    values: list[tuple[float, float]]
    point: int | None = None


def scatter(points: Sequence[Point], fixed: Sequence[Fixed], x: Metric, y: Metric) -> Figure | None:
    """Runs plotted by two metrics: a small mark per run, a large one for the mean over seeds.

    Args:
        points: the unlearned models, one point per experiment.
        fixed: originals and oracles.
        x: the metric of the horizontal axis.
        y: the metric of the vertical axis.

    Returns:
        The figure, or None when no run has both metrics.
    """
    if not any(point.values for point in points):
        return None
    labels = [_label(one.name) for one in (*fixed, *points) if one.values]
    columns = 2 if max(map(len, labels)) <= LEGEND_COLUMN else 1
    figure, (ax,) = _figure([3.4 + 0.24 * -(-len(labels) // columns)])
    for label, (_, start, pairs, point) in zip(labels, fixed, strict=False):
        right, up = np.mean(pairs, axis=0)
        color = "#404040" if point is None else COLORS[point % len(COLORS)]
        ax.plot(
            [right], [up], linestyle="", marker="s" if start else "h", markersize=10,
            markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.6, label=label,
        )  # fmt: skip
    for i, (name, pairs) in enumerate(points):
        if not pairs:
            continue
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)]}
        style["marker"] = MARKERS[i % len(MARKERS)]
        if len(pairs) > 1:
            ax.plot(
                [right for right, _ in pairs], [up for _, up in pairs], linestyle="", markersize=4,
                alpha=0.6, **style,
            )  # fmt: skip
        right, up = np.mean(pairs, axis=0)
        ax.plot([right], [up], linestyle="", markersize=9, label=_label(name), **style)
    for metric, setter in ((x, ax.set_xlabel), (y, ax.set_ylabel)):
        arrow = {"up": " (higher is better)", "oracle": " (the oracle's is the goal)"}
        setter(metric.label + arrow.get(metric.better, ""), fontsize=FONT)
    ax.margins(0.08)
    _below(figure, ax.get_legend_handles_labels()[0], columns)
    return figure


def leak_curve(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k and leak@k, k = 1, 2, 3, ... up to 16, then by eighths of an octave up to n.

    Args:
        scores: (prompts, n) in [0, 1].
    """
    from jaxlib_unlearn.metrics import leak_at_k

    n = scores.shape[-1]
    ks = {k for k in range(1, min(n, 16) + 1)} | {round(2 ** (i / 8)) for i in range(32, 128)}
    ks = sorted(k for k in ks | {n} if k <= n)
    return np.array(ks), leak_at_k(scores, ks).mean(axis=0)


def leak(
    scores: dict[str, np.ndarray], points: dict[str, dict[int, float]], roles: Roles = ROLES
) -> Figure | None:
    """leak@k over k, one line per model; marks are the values in `summary.json`.

    Args:
        scores: per model (prompts, n) in [0, 1].
        points: per model {k: leak@k}.
        roles: the roles of the models.

    Returns:
        The figure, or None when no model was sampled.
    """
    models = roles.order([*scores, *(m for m, values in points.items() if values)])
    if not models:
        return None
    figure, (ax,) = _figure([3.1])
    ticks: set[int] = set()
    for model, known in styles(models, roles).items():
        style = dict(known)
        marker = style.pop("marker")
        ks = list(points.get(model, {}))
        ys = list(points.get(model, {}).values())
        x, y = leak_curve(scores[model]) if model in scores else (np.array(ks), np.array(ys))
        marks = {"markevery": [i for i, k in enumerate(x) if k in ks], "markersize": 6}
        ax.plot(x, y, linewidth=2, label=model, marker=marker, **marks, **style)
        ticks |= set(ks) or {int(x[0]), int(x[-1])}
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
    ax.set_xticks([], minor=True)
    ax.set_ylim(-0.03, 1.05)
    ax.set_xlabel("k, sampled answers a question", fontsize=FONT)
    ax.set_ylabel("leak@k (ROUGE-L recall)", fontsize=FONT)
    _legend(ax)
    return figure


def ecdf(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Share of values <= x.

    Example:
        >>> ecdf(np.array([1.0, 3.0]), np.array([0.5, 1.0, 3.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    return np.searchsorted(np.sort(values), x, side="right") / len(values)


def truth_ratio(ratios: Ratios, roles: Roles = ROLES) -> Figure | None:
    """Empirical distributions of the truth ratio, marked where judged and reference differ most.

    Args:
        ratios: per-item R by model; R < 1: the right answer is the likelier one.
        roles: the roles of the models.

    Returns:
        The figure, or None without a single model's ratios.
    """
    clean = {m: np.asarray(ratios.values[m], float) for m in roles.order(ratios.values)}
    clean = {m: v[np.isfinite(v)] for m, v in clean.items()}
    clean = {m: np.maximum(v, 1e-12) for m, v in clean.items() if len(v)}
    if not clean:
        return None
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    figure, (ax,) = _figure([3.5])
    pooled = np.concatenate(list(clean.values()))
    low, high = pooled.min() / 1.3, max(pooled.max(), 1.0) * 1.3
    for model, known in styles(list(clean), roles).items():
        v = np.sort(clean[model])
        x = np.concatenate([[low], v, [high]])
        y = np.concatenate([[0.0], np.arange(1, len(v) + 1) / len(v), [1.0]])
        style = {k: known[k] for k in ("color", "linestyle")}
        ax.step(x, y, where="post", linewidth=2, label=model, **style)
    ax.axvline(1.0, color="#888888", linewidth=1)
    reference = roles.held_to(roles.judged)
    if roles.judged in clean and reference in clean:
        u, o = clean[roles.judged], clean[reference]
        x = np.sort(np.concatenate([u, o]))
        a, b = ecdf(u, x), ecdf(o, x)
        i = int(np.argmax(np.abs(a - b)))
        # The middle of the interval with this gap, so that the bar touches both curves.
        at = np.sqrt(x[i] * (x[i + 1] if i + 1 < len(x) else high))
        ends = sorted((float(a[i]), float(b[i])))
        ax.plot([at, at], ends, color="black", linewidth=2.4, solid_capstyle="butt", zorder=5)
        ax.plot([at, at], ends, color="black", marker="_", markersize=9, linestyle="", zorder=5)
        distance = ends[1] - ends[0] if ratios.distance is None else ratios.distance
        text = f"KS distance {format_number(distance)}"
        if ratios.p is not None:
            text += f"\np {format_number(ratios.p)}"
        # Bottom right: no distribution passes there, all end at 1.
        ax.annotate(
            text,
            xy=(at, ends[0] + 0.5 * (ends[1] - ends[0])),
            xytext=(0.98, 0.05),
            textcoords="axes fraction",
            ha="right",
            va="bottom",
            fontsize=FONT - 1,
            bbox=box,
            arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.8, "shrinkB": 0},
            zorder=6,
        )
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("truth ratio R (left of 1: the true answer is likelier)", fontsize=FONT)
    ax.set_ylabel("share of questions with ratio ≤ R", fontsize=FONT)
    _above(ax)
    return figure


class Tile(NamedTuple):
    """An image of a grid: a PNG file in base64, the class of its prompt, and that in the image."""

    picture: str
    asked: str
    seen: str


ACROSS = 6  # images in a line where all belong to one column


def grid(columns: Sequence[tuple[str, Sequence[Tile]]]) -> Figure | None:
    """Images in columns, the first at the top; a single column is wrapped into lines.

    Left of a line (or above an image, in lines) is the class of its prompt, below an image what
    the judge sees there.

    Args:
        columns: a title, and the images.

    Returns:
        The figure, or None without an image.
    """
    if not columns or not columns[0][1]:
        return None
    wrapped = len(columns) == 1
    if wrapped:
        tiles = columns[0][1]
        lines = [tiles[i : i + ACROSS] for i in range(0, len(tiles), ACROSS)]
    else:
        lines = list(zip(*(some for _, some in columns), strict=False))
    across = max(map(len, lines))
    size = min(1.1, 9.0 / across)
    named = 0.0 if wrapped else 0.9
    figure = Figure(
        figsize=(max(WIDTH, size * across + named), (size + 0.25) * len(lines) + 0.9),
        dpi=200,
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), across, squeeze=False)
    small = FONT - 4
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_frame_on(False)
    for i, line in enumerate(lines):
        for ax, tile in zip(axes[i], line, strict=False):
            pixels = imread(io.BytesIO(base64.b64decode(tile.picture)), format="png")
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            right = tile.seen == tile.asked
            ax.set_xlabel(tile.seen, fontsize=small, color="#404040" if right else "#A63200")
            if wrapped:
                ax.set_title(tile.asked, fontsize=small)
        if not wrapped:
            axes[i, 0].set_ylabel(line[0].asked, fontsize=small, rotation=0, ha="right")
    if wrapped:
        figure.supxlabel(columns[0][0].replace("\n", ", "), fontsize=FONT - 2)
    else:
        for ax, (title, _) in zip(axes[0], columns, strict=True):
            ax.set_title(title, fontsize=small)
    return figure
