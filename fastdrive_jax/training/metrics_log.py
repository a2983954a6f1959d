"""The log of a run: one JSON object a line, that a resumed run continues without a seam."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_text

Record = dict[str, Any]


class MetricsLog:
    """Appends records to a file, each whole when `write` returns.

    A record has `step`, `kind` and the metrics; what differs from run to run is under `time`.
    """

    def __init__(self, path: Path, resume_step: int | None, *, writes: bool = True):
        """Open the file and cut it back to what the restored run knew.

        Args:
            path: of the file.
            resume_step: the restored step, later records are dropped; None starts empty.
            writes: off on the processes that only read what the first one writes.

        Raises:
            UserError: the file can't be written.
        """
        kept = []
        if resume_step is not None and path.exists():
            kept = [record for record in read_log(path) if record["step"] <= resume_step]
        self.history: list[Record] = kept
        self._file = None
        if not writes:
            return
        self._file = write_text(path, "".join(map(_line, kept))).open("a")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()

    def write(
        self, step: int, kind: str, metrics: Mapping[str, float], time: Mapping[str, float]
    ) -> Record:
        """Append one record; values that are not finite become null.

        Raises:
            UserError: the disk is full.
        """
        record = {"step": step, "kind": kind}
        record |= {name: _finite(value) for name, value in metrics.items()}
        record["time"] = {name: round(value, 6) for name, value in time.items()}
        if self._file:
            try:
                self._file.write(_line(record))
                self._file.flush()
            except OSError as error:
                name = self._file.name
                raise UserError(f"{name} can't be written ({error.strerror}).") from error
        self.history.append(record)
        return record


def read_log(path: Path) -> list[Record]:
    """All records of a file; a last line that was cut off by a kill is left out.

    Raises:
        UserError: the file is absent, or another line than the last is no record.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}).") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} is damaged: line {number} is no JSON.") from error
    return records


def metrics_of(record: Record) -> dict[str, float]:
    """The metrics of a record; what was not finite is NaN."""
    own = {name: value for name, value in record.items() if name not in ("step", "kind", "time")}
    return {name: math.nan if value is None else value for name, value in own.items()}


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _finite(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
