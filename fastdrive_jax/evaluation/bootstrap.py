"""How sure a figure is: bootstrap intervals and paired tests that respect scenes.

Frames of a drive resemble each other, so frames are not independent draws: whole clusters (scenes)
are resampled, and every frame of a drawn scene comes along (Field and Welsh 2007, "Bootstrapping
clustered data"). Every statistic here is a ratio of sums, `sum(a) / sum(w)`: a mean when all
weights are one, a pooled recall when the weights are foreground areas. So a resample needs the
cluster sums only.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 4000
FEW = 10  # clusters below which percentile intervals are too narrow
_BLOCK = 1 << 22  # entries of one block of draws: bounds memory at about 32 MB


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure and its percentile interval; `low` and `high` are None with one cluster only."""

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference A - B, its interval, and the p-value of "no difference"."""

    value: float
    low: float | None
    high: float | None
    p: float
    n: int
    clusters: int


def _cluster_sums(values, clusters) -> np.ndarray:
    _, index = np.unique(clusters, return_inverse=True)
    return np.bincount(index.reshape(-1), weights=values)


def _checked(values, clusters, weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"values must be a non-empty vector, got shape {values.shape}")
    clusters = np.arange(values.size) if clusters is None else np.asarray(clusters)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if clusters.shape != values.shape or weights.shape != values.shape:
        raise ValueError(
            f"shapes differ: values {values.shape}, clusters {clusters.shape}, "
            f"weights {weights.shape}"
        )
    if not (np.isfinite(values).all() and np.isfinite(weights).all()):
        raise ValueError("values and weights must be finite: leave invalid samples out first")
    if (weights < 0).any() or weights.sum() <= 0:
        raise ValueError("weights must not be negative, and one must be positive")
    return values, clusters, weights


def _resampled_ratios(sums, weights, resamples: int, seed: int) -> np.ndarray:
    """Ratios of the sums of redrawn clusters; draws with no weight at all are left out."""
    rng = np.random.default_rng(seed)
    count = sums.size
    rows = max(1, _BLOCK // count)
    ratios = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(count, size=(min(rows, resamples - start), count))
        below = weights[drawn].sum(1)
        kept = below > 0
        ratios.append(sums[drawn].sum(1)[kept] / below[kept])
    return np.concatenate(ratios)


def _percentiles(sums, weights, resamples, level, seed) -> tuple[float | None, float | None]:
    if sums.size < 2:
        return None, None
    tail = (1 - level) / 2
    low, high = np.quantile(_resampled_ratios(sums, weights, resamples, seed), [tail, 1 - tail])
    return float(low), float(high)


def interval(
    values,
    clusters=None,
    weights=None,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, or of a pooled ratio.

    Args:
      values: [S] one number a sample: an error, or the numerator of a ratio.
      clusters: [S] scene of each sample; None makes every sample its own cluster.
      weights: [S] denominators; None gives the plain mean of `values`.
      resamples: number of bootstrap draws.
      level: coverage of the interval.
      seed: seed of the draws.

    Returns:
      `sum(values) / sum(weights)` with its interval. Below about ten clusters percentile
      intervals are too narrow: read them with the number of clusters beside.

    Raises:
      ValueError: empty or non-finite input, or shapes that differ.
    """
    values, clusters, weights = _checked(values, clusters, weights)
    sums, below = _cluster_sums(values, clusters), _cluster_sums(weights, clusters)
    low, high = _percentiles(sums, below, resamples, level, seed)
    return Interval(float(sums.sum() / below.sum()), low, high, values.size, sums.size)


def mean_intervals(
    values: Mapping[str, Any],
    clusters,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of many means over the same samples, from one set of draws.

    Args:
      values: name to [S] figures; a sample whose figure is NaN does not count for it.
      clusters: [S] scene of each sample.
      resamples: number of bootstrap draws.
      level: coverage of the intervals.
      seed: seed of the draws.

    Returns:
      What `interval` gives of each but for the draws; figures of no sample are left out.

    Raises:
      ValueError: shapes differ, or a figure is infinite.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    index = index.reshape(-1)
    count = int(index.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    tail = (1 - level) / 2
    found = {}
    for name, figures in values.items():
        figures = np.asarray(figures, np.float64)
        if figures.shape != index.shape:
            raise ValueError(f"{name} {figures.shape} must be [S] = {index.shape}")
        if np.isinf(figures).any():
            raise ValueError(f"{name} has an infinite figure")
        counts = ~np.isnan(figures)
        if not counts.any():
            continue
        sums = np.bincount(index, weights=np.where(counts, figures, 0), minlength=count)
        sizes = np.bincount(index, weights=counts, minlength=count)
        groups, low, high = int((sizes > 0).sum()), None, None
        if groups > 1:
            below = drawn @ sizes
            means = (drawn @ sums)[below > 0] / below[below > 0]
            low, high = map(float, np.quantile(means, [tail, 1 - tail]))
        value = float(sums.sum() / sizes.sum())
        found[name] = Interval(value, low, high, int(counts.sum()), groups)
    return found


def reach(scenes: int) -> str:
    """What the intervals of a table over so many scenes tell, in words."""
    if scenes == 1:
        return "All is of one scene, which gives no intervals."
    text = (
        f"95% bootstrap intervals over {scenes} scenes; what another training or other draws would "
        "change is not in them."
    )
    return text if scenes >= FEW else f"{text} Over so few scenes they are too narrow."


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values that hold for a family of tests together (Holm 1979).

    The least is multiplied by the number of tests, the next by one less, and so on; none falls
    below one before it.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    found = np.empty_like(p)
    found[order] = np.minimum(raised, 1.0)
    return found.tolist()


def paired_difference(
    a,
    b,
    clusters=None,
    weights=None,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Difference A - B on the same samples, with interval and sign-flip p-value.

    What the methods share (hard scenes) cancels in the pairs, so this tells methods apart where
    their own intervals overlap.

    Args:
      a: [S] values of method A.
      b: [S] values of method B on the same samples.
      clusters: [S] scene of each sample; None makes every sample its own cluster.
      weights: [S] shared denominators of a pooled ratio; None for plain means.
      resamples: number of bootstrap draws and of sign flips.
      level: coverage of the interval.
      seed: seed of the draws.

    Returns:
      `sum(a - b) / sum(weights)`. `p` is two-sided, of the test that flips the sign of whole
      clusters; with G clusters it cannot be below 2 / 2^G, however large the difference.

    Raises:
      ValueError: empty or non-finite input, or shapes that differ.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired arrays must have one shape, got {a.shape} and {b.shape}")
    values, clusters, weights = _checked(a - b, clusters, weights)
    sums, below = _cluster_sums(values, clusters), _cluster_sums(weights, clusters)
    low, high = _percentiles(sums, below, resamples, level, seed)
    return Difference(
        float(sums.sum() / below.sum()),
        low,
        high,
        _sign_flip_p(sums, resamples, seed),
        values.size,
        sums.size,
    )


def _sign_flip_p(sums: np.ndarray, resamples: int, seed: int) -> float:
    """Two-sided p of `sum(sums)` under random signs: exact where all signs can be listed."""
    observed = abs(sums.sum())
    slack = 1e-12 * np.abs(sums).sum()  # the same sum in another order differs in the last bits
    if 2**sums.size <= resamples:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=sums.size)))
        return float(np.mean(np.abs(signs @ sums) >= observed - slack))
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // sums.size)
    extreme = 0
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), sums.size)
        flipped = (2.0 * rng.integers(2, size=size) - 1.0) @ sums
        extreme += int((np.abs(flipped) >= observed - slack).sum())
    return (1 + extreme) / (1 + resamples)  # the observed signs are one of the draws
