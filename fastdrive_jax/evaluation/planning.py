"""Open-loop planning error in metres, in both averages found in the literature.

Both are printed because papers mix them: "TemAvg" (ST-P3, VAD, Impromptu-VLA) gives at t seconds
the mean error over all steps up to t, "NoAvg" (UniAD) the error at t alone, which is larger.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Num

from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.bootstrap import interval
from fastdrive_jax.evaluation.results import Row

STEP_SECONDS = 0.5
HORIZONS = (1, 2, 3)  # seconds


@dataclasses.dataclass(frozen=True)
class PlanningErrors:
    """Errors in metres of the M samples that have a whole true future.

    Attributes:
      temavg: [M, 3] mean error over the steps up to 1, 2 and 3 s.
      noavg: [M, 3] error at 1, 2 and 3 s.
      ade: [M] mean error over all T steps.
      fde: [M] error at the last step.
      used: [S] bool, which of the given samples these are: `clusters[used]` fits the rest.
    """

    temavg: np.ndarray
    noavg: np.ndarray
    ade: np.ndarray
    fde: np.ndarray
    used: np.ndarray


def planning_errors(
    planned: Float[np.ndarray, "S T 2"],
    future: Float[np.ndarray, "S T 2"],
    valid: Bool[np.ndarray, "S T"],
) -> PlanningErrors:
    """Distances between planned and driven waypoints, for each sample.

    A sample counts only if all its true steps are valid, as in the public evaluators of
    Impromptu-VLA, OmniDrive and BEV-Planner, so that every horizon averages the same samples.

    Args:
      planned: [S, T, 2] waypoints every 0.5 s in the ego frame, metres, x forward, y left.
      future: [S, T, 2] what was driven.
      valid: [S, T] whether that step of `future` is known.

    Returns:
      The errors of the samples that count.

    Raises:
      ValueError: shapes differ, T is shorter than 3 s, or a plan that counts is not finite.
      UserError: no sample counts.
    """
    planned, future = np.asarray(planned, np.float64), np.asarray(future, np.float64)
    valid = np.asarray(valid, bool)
    last = round(HORIZONS[-1] / STEP_SECONDS)
    if planned.shape != future.shape or planned.ndim != 3 or planned.shape[-1] != 2:
        raise ValueError(f"planned {planned.shape} and future {future.shape} must be [S, T, 2]")
    if valid.shape != planned.shape[:2]:
        raise ValueError(f"valid {valid.shape} must be [S, T] = {planned.shape[:2]}")
    if planned.shape[1] < last:
        raise ValueError(f"{planned.shape[1]} steps are shorter than {HORIZONS[-1]} s")
    used = valid.all(1)
    if not used.any():
        raise UserError(
            f"none of the {len(used)} samples has all {planned.shape[1]} future steps valid; "
            "planning cannot be measured on this split"
        )
    errors = np.linalg.norm(planned[used] - future[used], axis=-1)  # [M, T]
    if not np.isfinite(errors).all():
        raise ValueError("a planned or true waypoint is not finite")
    steps = [round(t / STEP_SECONDS) for t in HORIZONS]
    return PlanningErrors(
        temavg=np.stack([errors[:, :k].mean(1) for k in steps], 1),
        noavg=np.stack([errors[:, k - 1] for k in steps], 1),
        ade=errors.mean(1),
        fde=errors[:, -1],
        used=used,
    )


def planning_metrics(errors: PlanningErrors) -> dict[str, Num[np.ndarray, " M"]]:
    """Per-sample arrays [M] by metric name.

    Names: `l2_temavg_1s`, `_2s`, `_3s` and `l2_temavg` (their mean, the headline of most papers),
    the same with `noavg`, then `ade` and `fde`.
    """
    found = {}
    for name in ("temavg", "noavg"):
        table = getattr(errors, name)
        found |= {f"l2_{name}_{t}s": table[:, i] for i, t in enumerate(HORIZONS)}
        found[f"l2_{name}"] = table.mean(1)
    return found | {"ade": errors.ade, "fde": errors.fde}


def planning_rows(
    method: str,
    keep_ratio: float | None,
    errors: PlanningErrors,
    clusters: Num[np.ndarray, " S"] | None = None,
    seed: int | None = None,
) -> list[Row]:
    """One row in metres for each metric of `planning_metrics`.

    Args:
      method: name of the method.
      keep_ratio: its ratio; None where pruning has no meaning (no image).
      errors: what `planning_errors` gave.
      clusters: [S] scene of every sample given to `planning_errors`, counted or not.
      seed: seed of the measured run.
    """
    scenes = None if clusters is None else np.asarray(clusters)[errors.used]
    rows = []
    for metric, values in planning_metrics(errors).items():
        found = interval(values, scenes)
        rows.append(
            Row(method, keep_ratio, metric, found.value, found.low, found.high, found.n, seed, "m")
        )
    return rows
