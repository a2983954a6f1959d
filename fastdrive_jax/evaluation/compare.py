"""Two methods on the same samples, as rows of a report."""

import dataclasses
from collections.abc import Sequence

from fastdrive_jax.evaluation.bootstrap import holm, paired_difference
from fastdrive_jax.evaluation.results import Row, point

DIFFERENCE = "_difference"
P_VALUE = "_p"
HOLM = "_p_holm"


def difference_rows(
    metric: str,
    keep_ratio: float | None,
    method_a: str,
    a,
    method_b: str,
    b,
    clusters=None,
    weights=None,
    *,
    seed: int | None = None,
    unit: str = "",
) -> tuple[Row, Row]:
    """The paired difference A - B with its interval, and the p-value of "no difference".

    Args:
      metric: name of the metric that both arrays hold.
      keep_ratio: ratio at which both were measured.
      method_a: name of method A.
      a: [S] per-sample values of A (numerators, when `weights` is given).
      method_b: name of method B.
      b: [S] per-sample values of B on the same samples.
      clusters: [S] scene of each sample.
      weights: [S] shared denominators of a pooled ratio.
      seed: seed of the measured run.
      unit: unit of the metric.

    Returns:
      Rows of method "A - B" with metrics `<metric>_difference` and `<metric>_p`.
    """
    found = paired_difference(a, b, clusters, weights)
    method = f"{method_a} - {method_b}"
    return (
        Row(
            method,
            keep_ratio,
            metric + DIFFERENCE,
            found.value,
            found.low,
            found.high,
            found.n,
            seed,
            unit,
        ),
        point(method, keep_ratio, metric + P_VALUE, found.p, n=found.n, seed=seed),
    )


def holm_rows(family: Sequence[Row]) -> list[Row]:
    """P-values that hold for a family of tests together: the `<metric>_p` rows as `_p_holm`."""
    raised = holm([row.value for row in family])
    return [
        dataclasses.replace(row, metric=row.metric.removesuffix(P_VALUE) + HOLM, value=value)
        for row, value in zip(family, raised, strict=True)
    ]
