"""A sample from above: road, other agents, the way that was driven and plans."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.patches import PathPatch, Polygon
from matplotlib.path import Path

from fastdrive_jax.evaluation import palette
from fastdrive_jax.evaluation.footprint import corners
from fastdrive_jax.evaluation.plots import Rgb, figure_of, legend_of, pixels_of
from fastdrive_jax.evaluation.truth import DrivingTruth

AHEAD, BEHIND, ASIDE = 34.0, 8.0, 14.0  # metres that are shown
EGO = (1.485793, 0.0, 0.0, 4.084, 1.85)  # box of the car: x, y, yaw, length, width


def from_above(
    truth: DrivingTruth,
    sample: int,
    plans: Mapping[str, Float[np.ndarray, "T 2"]],
    title: str = "",
) -> Rgb:
    """One sample, the car at the bottom heading up.

    Agents are drawn where they are now and, fainter, where they are at the last waypoint.

    Args:
      truth: of many samples.
      sample: which of them.
      plans: name to waypoints in metres, x forward, y left.
      title: of the picture.
    """
    figure, axes = figure_of(3.9, 5.6)
    axes.set_facecolor("#eef0e9")
    axes.grid(False)
    for area in truth.drivable[sample] if truth.drivable is not None else ():
        rings = [_turned(ring) for ring in (area.exterior, *area.holes)]
        path = Path.make_compound_path(*(Path(ring, closed=True) for ring in map(_closed, rings)))
        axes.add_patch(PathPatch(path, facecolor="#d5d9df", edgecolor="none", zorder=0))
    for line in truth.boundaries[sample] if truth.boundaries is not None else ():
        axes.plot(*_turned(line).T, color=palette.MUTED, linewidth=0.8, zorder=1)
    if truth.agents is not None:
        boxes, valid = truth.agents.boxes[sample], truth.agents.valid[sample]
        for step, alpha in ((-1, 0.18), (0, 0.75)):
            for outline in _turned(corners(boxes[valid[:, step], step])):
                patch = Polygon(outline, facecolor=palette.WARM, alpha=alpha, edgecolor="none")
                axes.add_patch(patch)
    ego = _turned(corners(EGO))
    axes.add_patch(Polygon(ego, facecolor="none", edgecolor=palette.INK, linewidth=1.5))
    known = truth.future[sample][truth.future_valid[sample]]
    ways = {"driven": known, **plans}
    for number, (name, way) in enumerate(ways.items()):
        driven = name == "driven"
        colour = palette.INK if driven else palette.CYCLE[(number - 1) % len(palette.CYCLE)]
        points = _turned(np.concatenate([np.zeros((1, 2)), way]))
        style = {"linewidth": 3.4, "alpha": 0.5} if driven else {"linewidth": 1.6}
        axes.plot(*points.T, color=colour, marker="o", markersize=3.5, label=name, **style)
    axes.set_xlim(-ASIDE, ASIDE)
    axes.set_ylim(-BEHIND, AHEAD)
    axes.set_aspect("equal")
    axes.tick_params(labelbottom=False, labelleft=False, length=0)
    if title:
        axes.set_title(title, color=palette.INK, fontsize=9, loc="left")
    legend_of(axes, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=2)
    return pixels_of(figure)


def _turned(points) -> np.ndarray:
    """Points with x forward and y left as right and up."""
    points = np.asarray(points, float)
    return np.stack([-points[..., 1], points[..., 0]], -1)


def _closed(ring) -> np.ndarray:
    return np.concatenate([ring, ring[:1]])
