"""Speed against error: one line a method, a point for each keep ratio."""

import dataclasses
import io
from collections.abc import Sequence

from matplotlib.backends.backend_svg import FigureCanvasSVG

from fastdrive_jax.evaluation import palette
from fastdrive_jax.evaluation.pictures import encode_png
from fastdrive_jax.evaluation.plots import figure_of, label_axes, legend_of, pixels_of

MARKERS = "osD^vPX*"


@dataclasses.dataclass(frozen=True)
class Line:
    """One method.

    Attributes:
      name: shown in the legend.
      speed: [M] how many times as fast.
      error: [M] figures.
      keep_ratio: [M] of each point.
    """

    name: str
    speed: Sequence[float]
    error: Sequence[float]
    keep_ratio: Sequence[float]


def tradeoff(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
) -> dict[str, bytes]:
    """The plot; right and down is better.

    Args:
      lines: the methods.
      x_label: what speed is.
      y_label: the error with its unit.
      reference: (name, error) of the unpruned model, at a speed of 1.

    Returns:
      {"png": ..., "svg": ...}, files as bytes.
    """
    figure, axes = figure_of(6.4, max(3.8, 0.2 * (len(lines) + 2)))
    for number, line in enumerate(lines):
        style = {
            "color": palette.CYCLE[number % len(palette.CYCLE)],
            "marker": MARKERS[number // len(palette.CYCLE) % len(MARKERS)],
        }
        axes.plot(line.speed, line.error, label=line.name, linewidth=1.8, markersize=5, **style)
    if len(lines) == 1:
        for speed, error, ratio in zip(*_columns(lines[0]), strict=True):
            axes.annotate(f"{100 * ratio:g}%", (speed, error), color=palette.MUTED, fontsize=8)
    if reference is not None:
        name, error = reference
        axes.plot([1], [error], "o", color=palette.INK, markersize=7, label=name)
        axes.axhline(error, color=palette.INK, linewidth=1, linestyle=":")
    label_axes(axes, x_label, y_label, "")
    legend_of(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    png = encode_png(pixels_of(figure))
    file = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return {"png": png, "svg": file.getvalue()}


def _columns(line: Line) -> tuple[Sequence[float], ...]:
    return line.speed, line.error, line.keep_ratio
