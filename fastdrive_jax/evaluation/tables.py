"""Rows turned into tables: methods down, keep ratios across, one band a metric."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from fastdrive_jax.evaluation.results import Row, select


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
      name: as in `Row.metric`.
      label: for people, such as "L2 error, mean of 1-3 s".
      unit: shown behind the label.
      better: which end is good; "none" marks no best.
      digits: decimals.
      percent: shows shares as percentages.
    """

    name: str
    label: str
    unit: str = ""
    better: Literal["lower", "higher", "none"] = "lower"
    digits: int = 3
    percent: bool = False

    def text(self, value: float) -> str:
        """The value as it is printed."""
        scale, end = (100.0, "%") if self.percent else (1.0, "")
        return f"{scale * value:.{self.digits}f}{end}".replace("-", "\N{MINUS SIGN}")


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method is shown.

    Attributes:
      name: as in `Row.method`.
      label: for people.
      role: "pruner" is what is judged; "control" is a pruner that should lose (random, uniform,
        prior); "reference" cannot be won against or is no pruning (oracle, unpruned, no image).
    """

    name: str
    label: str
    role: Literal["pruner", "control", "reference"] = "pruner"


@dataclasses.dataclass(frozen=True)
class ResultTable:
    """Methods x keep ratios for some metrics.

    Attributes:
      caption: what the table shows.
      rows: the figures; several seeds of one cell are averaged.
      metrics: shown, in order; others among `rows` appear in the report's full list only.
      methods: shown, in order.
      note: more to know, below the table.
    """

    kind: ClassVar[str] = "results"
    caption: str
    rows: tuple[Row, ...]
    metrics: tuple[Metric, ...]
    methods: tuple[Method, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of a table.

    Attributes:
      keep_ratio: its column; None where it spans all of them.
      value: mean over the seeds.
      low: least lower end over the seeds; None without intervals.
      high: greatest upper end over the seeds; None without intervals.
      seeds: number of rows behind it.
      text: the printed value.
      bracket: the printed interval, "" without one.
      best: whether it is the best of the pruners and controls in its column.
      track: (start, length, dot) of the interval in percent of the metric's range in the table.
    """

    keep_ratio: float | None
    value: float
    low: float | None
    high: float | None
    seeds: int
    text: str
    bracket: str
    best: bool
    track: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Band:
    """The lines of one metric: (method, cells by column, None where nothing was measured)."""

    metric: Metric
    lines: tuple[tuple[Method, tuple[Cell | None, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Pivot:
    """A `ResultTable` ready to print."""

    ratios: tuple[float, ...]
    bands: tuple[Band, ...]
    counts: tuple[int, ...]
    seeds: tuple[int, ...]
    intervals: bool


def merge_seeds(rows: Sequence[Row]) -> tuple[float, float | None, float | None]:
    """(mean, lowest low, highest high) of the seeds of one cell; None, None without intervals."""
    value = sum(row.value for row in rows) / len(rows)
    if any(row.low is None for row in rows):
        return value, None, None
    return value, min(row.low for row in rows), max(row.high for row in rows)


def _best(metric: Metric, merged: dict, methods: Sequence[Method], ratio: float) -> float | None:
    """The value to mark in a column: None where no one wins."""
    values = [
        merged[method.name, ratio][0]
        for method in methods
        if method.role != "reference" and (method.name, ratio) in merged
    ]
    # figures that print alike are no contest: with all tokens kept every method is the same
    if metric.better == "none" or len({metric.text(value) for value in values}) < 2:
        return None
    return min(values) if metric.better == "lower" else max(values)


def _range(merged: dict) -> tuple[float, float]:
    ends = [end for value in merged.values() for end in value if end is not None]
    low, high = min(ends), max(ends)
    pad = 0.04 * (high - low) or 1.0
    return low - pad, high + pad


def _cell(metric: Metric, rows: Sequence[Row], limits, best: float | None) -> Cell:
    value, low, high = merge_seeds(rows)
    place = lambda x: round(100 * (x - limits[0]) / (limits[1] - limits[0]), 2)  # noqa: E731
    start, end = (place(value), place(value)) if low is None else (place(low), place(high))
    return Cell(
        keep_ratio=rows[0].keep_ratio,
        value=value,
        low=low,
        high=high,
        seeds=len(rows),
        text=metric.text(value),
        bracket="" if low is None else f"[{metric.text(low)}, {metric.text(high)}]",
        best=value == best,
        track=(start, round(end - start, 2), place(value)),
    )


def _band(metric: Metric, table: ResultTable, ratios: Sequence[float]) -> Band | None:
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in select(table.rows, metric=metric.name):
        groups.setdefault((row.method, row.keep_ratio), []).append(row)
    shown = {method.name for method in table.methods}
    groups = {key: rows for key, rows in groups.items() if key[0] in shown}
    if not groups:
        return None
    merged = {key: merge_seeds(rows) for key, rows in groups.items()}
    limits = _range(merged)
    best = {ratio: _best(metric, merged, table.methods, ratio) for ratio in ratios}
    lines = []
    for method in table.methods:
        alone = groups.get((method.name, None))
        if alone is not None:  # does not depend on the ratio: one figure across all columns
            lines.append((method, (_cell(metric, alone, limits, None),)))
            continue
        cells = tuple(
            _cell(metric, groups[method.name, ratio], limits, best[ratio])
            if (method.name, ratio) in groups
            else None
            for ratio in ratios
        )
        if any(cells):
            lines.append((method, cells))
    return Band(metric, tuple(lines))


def pivot(table: ResultTable) -> Pivot:
    """Lay a table out.

    Returns:
      Columns are the ratios from all tokens to fewest; a method without a ratio spans them all.

    Raises:
      ValueError: no row of the table has one of its metrics and methods.
    """
    metrics = {metric.name for metric in table.metrics}
    methods = {method.name for method in table.methods}
    used = [row for row in table.rows if row.metric in metrics and row.method in methods]
    if not used:
        raise ValueError(f"table {table.caption!r} has no row of its metrics and methods")
    found = {row.keep_ratio for row in used if row.keep_ratio is not None}
    ratios = tuple(sorted(found, reverse=True))
    bands = (_band(metric, table, ratios) for metric in table.metrics)
    return Pivot(
        ratios=ratios,
        bands=tuple(band for band in bands if band is not None),
        counts=tuple(sorted({row.n for row in used})),
        seeds=tuple(sorted({row.seed for row in used if row.seed is not None})),
        intervals=any(row.low is not None for row in used),
    )
