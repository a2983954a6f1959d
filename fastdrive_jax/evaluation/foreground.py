"""Does a pruner keep what matters: foreground and object tokens, weighted by their area."""

import dataclasses
from collections.abc import Collection

import numpy as np
from jaxtyping import Float, Int, Num

from fastdrive_jax.evaluation.bootstrap import interval
from fastdrive_jax.evaluation.results import Row

UNLABELLED = 255  # id of pixels that are ignored or unknown, as batches have it
TOKEN = 28  # pixels a side of one visual token of Qwen2.5-VL: 14-pixel patches merged 2 x 2

FOREGROUND_RECALL = "foreground_recall"
FOREGROUND_PRECISION = "foreground_precision"
OBJECT_RECALL = "object_recall"


@dataclasses.dataclass(frozen=True)
class Areas:
    """Shares of each token's area, in [0, 1].

    Attributes:
      foreground: [B, N] share that is foreground.
      objects: [B, N] share that is an object (the foreground without road and marks).
      valid: [B, N] share that is labelled at all.
    """

    foreground: np.ndarray
    objects: np.ndarray
    valid: np.ndarray


def token_fractions(
    labels: Int[np.ndarray, "B H W"],
    classes: Collection[int],
    token: int = TOKEN,
    ignore: Collection[int] = (),
) -> Float[np.ndarray, "B N"]:
    """Share of each token's area that is covered by some classes.

    Args:
      labels: [B, H, W] class ids in 0..255.
      classes: ids to count.
      token: side of a token in pixels.
      ignore: ids that never count, even when `classes` names them.

    Returns:
      [B, N] covered pixels divided by token * token, raster order. Ignored pixels are not made up
      for: they carry no area, so a token cut by the ignored border does not weigh like a whole one.

    Raises:
      ValueError: H or W is not a multiple of `token`, or an id is outside 0..255.
    """
    labels = np.asarray(labels)
    if labels.ndim != 3:
        raise ValueError(f"labels must be [B, H, W], got shape {labels.shape}")
    batch, height, width = labels.shape
    if height % token or width % token:
        raise ValueError(f"picture of {height} x {width} does not split into tokens of {token}")
    for ids in (classes, ignore):
        if any(not 0 <= int(i) <= 255 for i in ids):
            raise ValueError(f"class ids must be in 0..255, got {sorted(ids)}")
    if labels.size and (labels.min() < 0 or labels.max() > 255):
        raise ValueError(f"labels must be in 0..255, got {labels.min()}..{labels.max()}")
    counted = np.zeros(256, np.float32)
    counted[[int(i) for i in classes]] = 1
    counted[[int(i) for i in ignore]] = 0
    shape = (batch, height // token, token, width // token, token)
    return counted[labels].reshape(shape).mean((2, 4), dtype=np.float64).reshape(batch, -1)


def token_areas(
    labels: Int[np.ndarray, "B H W"],
    foreground: Collection[int],
    objects: Collection[int],
    ignore: Collection[int] = (),
    token: int = TOKEN,
) -> Areas:
    """Foreground, object and labelled share of each token; see `token_fractions`.

    `UNLABELLED` pixels are left out as those of `ignore` are.
    """
    return Areas(
        foreground=token_fractions(labels, foreground, token, ignore),
        objects=token_fractions(labels, objects, token, ignore),
        valid=token_fractions(labels, range(UNLABELLED), token, ignore),
    )


def kept_area(
    fractions: Float[np.ndarray, "B N"], keep_indices: Int[np.ndarray, "B K"]
) -> Float[np.ndarray, " B"]:
    """Sum of the fractions of the kept tokens.

    Raises:
      ValueError: an index is out of range or kept twice, which would count its area twice.
    """
    fractions, keep_indices = np.asarray(fractions), np.asarray(keep_indices)
    if keep_indices.ndim != 2 or keep_indices.shape[0] != fractions.shape[0]:
        raise ValueError(f"keep_indices {keep_indices.shape} do not fit tokens {fractions.shape}")
    if keep_indices.size:
        if keep_indices.min() < 0 or keep_indices.max() >= fractions.shape[1]:
            raise ValueError(f"keep_indices must be in 0..{fractions.shape[1] - 1}")
        if (np.diff(np.sort(keep_indices, 1), axis=1) == 0).any():
            raise ValueError("a token is kept twice")
    return np.take_along_axis(fractions, keep_indices, 1).sum(1)


def recall(fractions: Float[np.ndarray, "B N"], keep_indices: Int[np.ndarray, "B K"]) -> float:
    """Kept area divided by all area, pooled over the pictures; NaN where there is no area."""
    total = np.asarray(fractions).sum()
    return float(kept_area(fractions, keep_indices).sum() / total) if total else float("nan")


def precision(
    fractions: Float[np.ndarray, "B N"],
    keep_indices: Int[np.ndarray, "B K"],
    valid: Float[np.ndarray, "B N"] | None = None,
) -> float:
    """Share of the kept area that is foreground: the mean fraction of the kept tokens.

    With `valid`, kept area that carries no label is left out of the denominator.
    """
    valid = np.ones_like(fractions) if valid is None else valid
    total = kept_area(valid, keep_indices).sum()
    return float(kept_area(fractions, keep_indices).sum() / total) if total else float("nan")


def oracle_indices(fractions: Float[np.ndarray, "B N"], k: int) -> Int[np.ndarray, "B K"]:
    """The K tokens with most area in each picture, ties by the lower index, in raster order."""
    if not 0 < k <= fractions.shape[1]:
        raise ValueError(f"k must be in 1..{fractions.shape[1]}, got {k}")
    order = np.argsort(-np.asarray(fractions), axis=1, kind="stable")
    return np.sort(order[:, :k], 1)


def _rows(method, keep_ratio, parts, clusters, seed) -> list[Row]:
    rows = []
    for metric, above, below in parts:
        if below.sum() <= 0:
            continue  # pictures without any object have no object recall
        found = interval(above, clusters, below)
        value, low, high = found.value, found.low, found.high
        rows.append(Row(method, keep_ratio, metric, value, low, high, found.n, seed))
    return rows


def foreground_rows(
    method: str,
    keep_ratio: float,
    areas: Areas,
    keep_indices: Int[np.ndarray, "B K"],
    clusters: Num[np.ndarray, " B"] | None = None,
    seed: int | None = None,
) -> list[Row]:
    """Foreground recall and precision and object recall of one choice of tokens.

    Args:
      method: name of the method.
      keep_ratio: its ratio.
      areas: of the pictures.
      keep_indices: [B, K] kept tokens.
      clusters: [B] scene of each picture, for the intervals.
      seed: seed of the measured run.

    Returns:
      One row a metric, pooled over the pictures; a metric without any area is absent.
    """
    kept = kept_area(areas.foreground, keep_indices)
    parts = (
        (FOREGROUND_RECALL, kept, areas.foreground.sum(1)),
        (FOREGROUND_PRECISION, kept, kept_area(areas.valid, keep_indices)),
        (OBJECT_RECALL, kept_area(areas.objects, keep_indices), areas.objects.sum(1)),
    )
    return _rows(method, keep_ratio, parts, clusters, seed)


def oracle_rows(
    keep_ratio: float,
    areas: Areas,
    k: int,
    clusters: Num[np.ndarray, " B"] | None = None,
    method: str = "oracle",
) -> list[Row]:
    """The most that any choice of K tokens a picture can reach, for each recall by itself.

    Object recall is that of the tokens with most object area, foreground recall and precision
    those of the tokens with most foreground area: no single choice need reach both. Where pixels
    are ignored, another choice may have a larger precision.
    """
    best = foreground_rows(method, keep_ratio, areas, oracle_indices(areas.foreground, k), clusters)
    objects = foreground_rows(method, keep_ratio, areas, oracle_indices(areas.objects, k), clusters)
    return [row for row in best if row.metric != OBJECT_RECALL] + [
        row for row in objects if row.metric == OBJECT_RECALL
    ]
