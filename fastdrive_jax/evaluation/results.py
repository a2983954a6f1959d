"""The one form in which every measuring command writes what it found."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_text

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
      method: what was measured, such as "reconpruner" or "random".
      keep_ratio: share of the visual tokens kept, in (0, 1]; None where it has no meaning.
      metric: name of the quantity, such as "l2_temavg_3s".
      value: the figure.
      low: lower end of its 95% interval or, of a time, lower quartile of its rounds; None where
        neither can be told.
      high: upper end, likewise.
      n: number of pictures or samples behind it.
      seed: seed of the run that was measured; None where nothing was drawn.
      unit: "m", "ms", "" for a share.
    """

    method: str
    keep_ratio: float | None
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    seed: int | None
    unit: str = ""

    def __post_init__(self):
        for name in ("value", "low", "high", "keep_ratio"):
            number = getattr(self, name)
            if number is None and name != "value":
                continue
            if isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"{name} of {self.method}/{self.metric} is {number}, not a number")
            # numpy scalars are accepted, but what is stored must survive JSON unchanged
            object.__setattr__(self, name, float(number))
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{self.method}/{self.metric} has one end of an interval only")
        object.__setattr__(self, "n", int(self.n))
        if self.seed is not None:
            object.__setattr__(self, "seed", int(self.seed))


def point(
    method: str,
    keep_ratio: float | None,
    metric: str,
    value: float,
    *,
    n: int = 1,
    seed: int | None = None,
    unit: str = "",
) -> Row:
    """A figure without an interval; see `Row`."""
    return Row(method, keep_ratio, metric, value, None, None, n, seed, unit)


def write_rows(path: str | Path, rows: Iterable[Row], meta: Mapping[str, Any]) -> Path:
    """Write rows and what was run (configuration, versions, hardware) as JSON, atomically.

    Args:
      path: the JSON file.
      rows: the figures.
      meta: anything JSON can hold.

    Returns:
      The path.

    Raises:
      UserError: the file cannot be written.
    """
    content = {
        "format": FORMAT,
        "meta": dict(meta),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    return write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_rows(path: str | Path) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """Read what `write_rows` wrote (also the `rows` and `meta` of a `report.json`).

    Returns:
      (rows, meta).

    Raises:
      UserError: the file is absent, not JSON, of another format, or a row is malformed.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read results {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"results {path} are not JSON ({error}); measure again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"results {path} have format {found!r}, but this version reads {FORMAT}")
    try:
        rows = tuple(Row(**row) for row in content["rows"])
        return rows, dict(content["meta"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"results {path} hold a malformed row ({error}); measure again") from error


def select(rows: Iterable[Row], **fields: Any) -> tuple[Row, ...]:
    """Rows whose fields equal the given ones: `select(rows, method="random", keep_ratio=0.5)`."""
    return tuple(
        row for row in rows if all(getattr(row, name) == value for name, value in fields.items())
    )
