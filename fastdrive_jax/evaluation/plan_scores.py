"""Every open-loop figure of every sample, so that any group of samples can be averaged later."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Num

from fastdrive_jax.evaluation.bootstrap import mean_intervals
from fastdrive_jax.evaluation.collisions import collisions
from fastdrive_jax.evaluation.compare import difference_rows
from fastdrive_jax.evaluation.footprint import way_of_origin, way_of_point
from fastdrive_jax.evaluation.open_loop import protocol_metrics
from fastdrive_jax.evaluation.planning import planning_errors, planning_metrics
from fastdrive_jax.evaluation.protocols import LIDAR_AHEAD, PROTOCOLS
from fastdrive_jax.evaluation.results import Row
from fastdrive_jax.evaluation.truth import DrivingTruth

HEADLINE = "l2_temavg"

Scores = dict[str, Float[np.ndarray, " S"]]
Point = Literal["origin", "lidar"]


def measurable(truth: DrivingTruth) -> tuple[str, ...]:
    """Protocols whose truth is there: all need agents, some a map."""
    need = {"area": truth.drivable, "lines": truth.boundaries, None: ()}
    return tuple(
        name
        for name, protocol in PROTOCOLS.items()
        if truth.agents is not None and need[protocol.intersection] is not None
    )


def plan_scores(
    planned: Float[np.ndarray, "S T 2"],
    truth: DrivingTruth,
    protocols: Iterable[str],
    read: Bool[np.ndarray, " S"] | None = None,
    driven: Mapping[str, Bool[np.ndarray, "S T"]] | None = None,
    point: Point = "origin",
) -> Scores:
    """[S] of each metric; NaN where a sample does not count.

    Args:
      planned: waypoints every 0.5 s, metres, x forward and y left of where `point` is now.
      truth: of the same samples.
      protocols: names in `PROTOCOLS`.
      read: which answers could be read; distances take the others as plans of zeros, as
        Impromptu-VLA's evaluation does.
      driven: of `driven_collisions`, for callers that measure many plans; None finds them.
      point: whose places the plans are. Distances are between its places, as published; boxes are
        those of the car whose origin follows it.

    Raises:
      ValueError: shapes differ, or a plan that counts is not finite.
      UserError: no sample counts, or the truth lacks what a protocol needs.
    """
    shown = planned if read is None else np.where(np.asarray(read)[:, None, None], planned, 0.0)
    future = truth.future if point == "origin" else lidar_future(truth)
    errors = planning_errors(shown, future, truth.future_valid)
    planned = origin_way(planned, point)
    found = {name: _spread(value, errors.used) for name, value in planning_metrics(errors).items()}
    for name in protocols:
        protocol = PROTOCOLS[name]
        if protocol.unread == "skip" and read is not None and not (read & errors.used).any():
            continue  # it has nothing to say of answers that cannot be read
        metrics = protocol_metrics(protocol, planned, truth, read, driven and driven[name])
        found |= {key: _spread(value, metrics.used) for key, value in metrics.values.items()}
    return found


def origin_way(planned: Float[np.ndarray, "S T 2"], point: Point) -> Float[np.ndarray, "S T 2"]:
    """Places of the ego origin in the present ego frame, from those of a point of the car."""
    return planned if point == "origin" else way_of_origin(planned, LIDAR_AHEAD)


def lidar_future(truth: DrivingTruth) -> Float[np.ndarray, "S T 2"]:
    """The way of the lidar, or what the ego poses' places let one guess of it."""
    if truth.lidar is not None:
        return truth.lidar.future
    return way_of_point(truth.future, LIDAR_AHEAD)


def driven_collisions(
    truth: DrivingTruth, protocols: Iterable[str]
) -> dict[str, Bool[np.ndarray, "S T"]]:
    """Where the car's box on the true way collides, which is no plan's fault, by protocol."""
    return {name: collisions(PROTOCOLS[name], truth.future, truth) for name in protocols}


def _spread(values, used):
    found = np.full(len(used), np.nan)
    found[used] = values
    return found


def mean_scores(runs: Sequence[Scores]) -> Scores:
    """Of several seeds or draws of one method, sample by sample, over those that count."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        table = np.stack([run[name] for run in runs if name in run])
        counts = np.isfinite(table)
        sums, number = np.where(counts, table, 0).sum(0), counts.sum(0)
        found[name] = np.where(number > 0, sums / np.maximum(number, 1), np.nan)
    return found


def group_scores(
    scores: Mapping[str, Float[np.ndarray, " S"]],
    groups: Mapping[str, Bool[np.ndarray, " S"]],
) -> Scores:
    """Each metric over the samples of each group alone, called METRIC/GROUP."""
    return {
        f"{metric}/{name}": np.where(among, values, np.nan)
        for metric, values in scores.items()
        for name, among in groups.items()
    }


def score_rows(
    method: str,
    keep_ratio: float | None,
    scores: Mapping[str, Float[np.ndarray, " S"]],
    scenes: Num[np.ndarray, " S"],
    seed: int | None = None,
) -> list[Row]:
    """A row for each metric, with its interval over scenes.

    Args:
      method: its name.
      keep_ratio: its ratio; None where pruning has no meaning.
      scores: of `plan_scores`.
      scenes: [S] drive of each sample.
      seed: of the measured run.

    Returns:
      None of a metric for which no sample counts.
    """
    rows = []
    for metric, found in mean_intervals(scores, scenes).items():
        figures = found.value, found.low, found.high, found.n
        rows.append(Row(method, keep_ratio, metric, *figures, seed, unit_of(metric)))
    return rows


def unit_of(metric: str) -> str:
    """Metres, or none of a share."""
    return "" if metric.startswith(("collision", "intersection")) else "m"


def paired_rows(
    metric: str,
    keep_ratio: float | None,
    method_a: str,
    a: Float[np.ndarray, " S"],
    method_b: str,
    b: Float[np.ndarray, " S"],
    scenes: Num[np.ndarray, " S"],
) -> tuple[Row, Row]:
    """The difference A - B over the samples that count for both; see `difference_rows`."""
    both = np.isfinite(a) & np.isfinite(b)
    pair = method_a, a[both], method_b, b[both]
    return difference_rows(metric, keep_ratio, *pair, scenes[both], unit=unit_of(metric))
