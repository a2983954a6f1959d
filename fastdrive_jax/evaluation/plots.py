"""Plots as uint8 RGB arrays: curves, intervals, bars and a bird's-eye view.

Figures are built without pyplot, so nothing global is touched and threads may draw at once.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from fastdrive_jax.evaluation import palette
from fastdrive_jax.evaluation.results import Row, select
from fastdrive_jax.evaluation.tables import Method, merge_seeds

DPI = 160
Rgb = UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One method over keep ratios.

    Attributes:
      name: shown in the legend.
      x: [M] keep ratios.
      y: [M] figures.
      low: [M] lower ends of the intervals; None draws no band.
      high: [M] upper ends.
      control: whether it is a control (drawn thin and dashed) and not a pruner.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    control: bool = False


def curves(rows: Sequence[Row], metric: str, methods: Sequence[Method]) -> tuple[Curve, ...]:
    """Curves of one metric, one a method that was measured at two ratios or more.

    Seeds are averaged and their intervals joined, as in the tables. Bands are drawn only where
    every point has an interval.
    """
    found = []
    for method in methods:
        points: dict[float, list[Row]] = {}
        for row in select(rows, metric=metric, method=method.name):
            if row.keep_ratio is not None:
                points.setdefault(row.keep_ratio, []).append(row)
        if len(points) < 2:
            continue
        ratios = sorted(points, reverse=True)
        y, low, high = zip(*(merge_seeds(points[ratio]) for ratio in ratios), strict=True)
        if None in low:
            low = high = None
        found.append(Curve(method.label, ratios, y, low, high, method.role != "pruner"))
    return tuple(found)


def figure_of(width: float, height: float) -> tuple[Figure, object]:
    """An empty figure of so many inches, and its axes, in the house's style."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=palette.PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(palette.MUTED)
        axes.spines[side].set_linewidth(0.8)
    axes.tick_params(colors=palette.MUTED, labelsize=9, length=3)
    axes.grid(True, color=palette.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def pixels_of(figure: Figure) -> Rgb:
    """The figure drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def label_axes(axes, x: str, y: str, title: str) -> None:
    """Names of both axes, and a title unless empty."""
    axes.set_xlabel(x, color=palette.INK, fontsize=10)
    axes.set_ylabel(y, color=palette.INK, fontsize=10)
    if title:
        axes.set_title(title, color=palette.INK, fontsize=11, loc="left", fontweight="bold")


def legend_of(axes, **options) -> None:
    """A legend without a frame; options are matplotlib's."""
    legend = axes.legend(frameon=False, fontsize=9, **options)
    for text in legend.get_texts():
        text.set_color(palette.INK)


def loss_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str = "",
    log: bool = False,
    smooth: int = 0,
    y_label: str = "loss",
) -> Rgb:
    """Losses over training steps.

    Args:
      series: name -> (steps [M], values [M]).
      title: of the plot.
      log: logarithmic loss axis; values must then be positive.
      smooth: width of the running mean in points; the raw values stay visible behind it.
      y_label: name of the loss axis.
    """
    figure, axes = figure_of(6.4, 3.4)
    for i, (name, (steps, values)) in enumerate(series.items()):
        steps, values = np.asarray(steps, float), np.asarray(values, float)
        colour = palette.CYCLE[i % len(palette.CYCLE)]
        if smooth > 1 and len(values) > smooth:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
            ones = np.ones(smooth)
            weight = np.convolve(np.ones_like(values), ones, "same")
            values = np.convolve(values, ones, "same") / weight
        axes.plot(steps, values, color=colour, linewidth=1.8, label=name)
    if log:
        axes.set_yscale("log")
    label_axes(axes, "training step", y_label, title)
    axes.margins(x=0.01)
    if len(series) > 1:
        legend_of(axes)
    return pixels_of(figure)


def ratio_curves(
    curves: Sequence[Curve],
    y_label: str,
    title: str = "",
    reference: tuple[str, float] | None = None,
) -> Rgb:
    """A metric over the share of tokens kept, most tokens on the left, intervals as bands.

    Args:
      curves: the methods, pruners first.
      y_label: the metric with its unit.
      title: of the plot.
      reference: (name, figure) of a horizontal line, such as the unpruned model.
    """
    figure, axes = figure_of(6.4, 3.8)
    markers = "osD^vPX*"
    for i, curve in enumerate(curves):
        colour = palette.CYCLE[i % len(palette.CYCLE)]
        style = {"linestyle": "--", "linewidth": 1.3, "alpha": 0.95, "markersize": 4}
        if not curve.control:
            style = {"linestyle": "-", "linewidth": 2.6, "markersize": 6, "zorder": 4}
        axes.plot(curve.x, curve.y, color=colour, marker=markers[i % 8], label=curve.name, **style)
        if curve.low is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
    if reference is not None:
        name, value = reference
        axes.axhline(value, color=palette.INK, linewidth=1.2, linestyle=":", label=name)
    ratios = sorted({x for curve in curves for x in curve.x}, reverse=True)
    axes.set_xlim(max(ratios) + 0.03, min(ratios) - 0.03)
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{100 * ratio:g}%" for ratio in ratios])
    label_axes(axes, "visual tokens kept", y_label, title)
    legend_of(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return pixels_of(figure)


def timing_bars(stages: Mapping[str, Mapping[str, float]], title: str = "") -> Rgb:
    """Where a frame's time goes: one stacked bar for each setting.

    Args:
      stages: setting -> {stage: milliseconds}; stages keep the order of first appearance.
      title: of the plot.
    """
    figure, axes = figure_of(6.4, 1.3 + 0.42 * len(stages))
    names = list(dict.fromkeys(name for parts in stages.values() for name in parts))
    settings = list(stages)
    left = np.zeros(len(settings))
    widest = max(sum(parts.values()) for parts in stages.values())
    for i, name in enumerate(names):
        values = np.array([stages[setting].get(name, 0.0) for setting in settings])
        colour = palette.STAGES[i % len(palette.STAGES)]
        axes.barh(settings, values, left=left, color=colour, label=name, height=0.62)
        for row, value in enumerate(values):
            if value > 0.09 * widest:
                ink = palette.INK if i in (0, 4) else palette.PAPER
                place = (left[row] + value / 2, row)
                axes.text(*place, f"{value:.3g}", ha="center", va="center", color=ink, fontsize=8.5)
        left += values
    for row, total in enumerate(left):
        axes.text(
            total + 0.01 * widest,
            row,
            f"{total:.3g} ms",
            va="center",
            color=palette.INK,
            fontsize=9,
            fontweight="bold",
        )
    axes.set_xlim(0, 1.13 * widest)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=palette.INK)
    label_axes(axes, "milliseconds a frame", "", title)
    legend_of(axes, loc="lower center", bbox_to_anchor=(0.45, 1.0 if not title else 1.1), ncols=5)
    return pixels_of(figure)


def birds_eye(
    future: Float[np.ndarray, "T 2"],
    plans: Mapping[str, Float[np.ndarray, "T 2"]],
    title: str = "",
) -> Rgb:
    """Driven and planned waypoints from above, the car at the bottom heading up.

    Args:
      future: [T, 2] driven waypoints, metres, x forward, y left.
      plans: name -> [T, 2] planned waypoints.
      title: of the plot.
    """
    figure, axes = figure_of(3.8, 4.6)
    paths = [("driven", future, palette.INK)] + [
        (name, plan, palette.CYCLE[i % len(palette.CYCLE)])
        for i, (name, plan) in enumerate(plans.items())
    ]
    points = np.concatenate([np.asarray(path, float) for _, path, _ in paths] + [[[0.0, 0.0]]])
    for name, path, colour in paths:
        path = np.concatenate([[[0.0, 0.0]], np.asarray(path, float)])
        driven = name == "driven"
        axes.plot(
            -path[:, 1],
            path[:, 0],
            color=colour,
            marker="o" if driven else "s",
            markersize=5 if driven else 4,
            linewidth=3.2 if driven else 1.7,
            alpha=0.55 if driven else 1.0,
            label=name,
        )
    axes.scatter([0], [0], marker="^", s=130, color=palette.INK, zorder=5)
    half = max(3.0, 1.15 * np.abs(points[:, 1]).max())
    low, high = min(-2.0, points[:, 0].min() - 1), max(6.0, 1.07 * points[:, 0].max())
    axes.set_xlim(-half, half)
    axes.set_ylim(low, high)
    # metres to the side are drawn wider than metres ahead: plans differ there by little
    label_axes(axes, "metres to the right", "metres ahead", title)
    legend_of(axes, loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=2)
    return pixels_of(figure)


def interval_bars(
    names: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float | None],
    highs: Sequence[float | None],
    x_label: str,
    title: str = "",
    highlight: Sequence[str] = (),
) -> Rgb:
    """One dot and interval for each method, for differences: zero is always in view.

    Args:
      names: [M] methods from top to bottom.
      values: [M] figures.
      lows: [M] lower ends; None draws the dot alone.
      highs: [M] upper ends.
      x_label: the metric with its unit.
      title: of the plot.
      highlight: names drawn in the accent colour.
    """
    figure, axes = figure_of(6.4, 1.2 + 0.34 * len(names))
    for row, (name, value, low, high) in enumerate(zip(names, values, lows, highs, strict=True)):
        colour = palette.ACCENT if name in highlight else palette.MUTED
        if low is not None:  # ends where it ends: lines otherwise reach beyond by half their width
            style = {"linewidth": 5, "alpha": 0.3, "solid_capstyle": "butt"}
            axes.plot([low, high], [row, row], color=colour, **style)
        axes.plot([value], [row], "o", color=colour, markersize=7)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelcolor=palette.INK)
    axes.axvline(0, color=palette.INK, linewidth=1)
    label_axes(axes, x_label, "", title)
    return pixels_of(figure)
