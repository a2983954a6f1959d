"""Curves of the metrics of one training run or several, of finished runs and of running ones.

    fastdrive plot-metrics runs/a runs/b --metrics train/loss eval/l2 --out runs/curves.png

OUT is one picture (.png) or a page with a table of the last values (.html). It takes a second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.pictures import encode_png, grid
from fastdrive_jax.evaluation.plots import loss_curves
from fastdrive_jax.evaluation.report import Figure, Gallery, Report, Section, Table, render
from fastdrive_jax.files import write_bytes, write_text
from fastdrive_jax.training.loop import LOG_FILE
from fastdrive_jax.training.metrics_log import Record, read_log

Series = dict[str, tuple[list[int], list[float]]]  # name -> (steps, values)


@dataclass(frozen=True)
class PlotMetricsArgs:
    """Plot the metrics of training runs over their steps.

    Attributes:
        runs: Run folders that hold metrics.jsonl, or a folder train/ that does.
        metrics: Names such as train/loss, eval/l2 or time/items_per_s; None plots the loss and all
            evaluation metrics.
        out: A .png or an .html file.
        smooth: Width of a running mean in records; the raw curve stays visible behind it.
        log: Logarithmic axes.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    metrics: tuple[str, ...] = ()
    out: Path = Path("metrics.png")
    smooth: int = 0
    log: bool = False

    def __post_init__(self):
        if not self.runs:
            raise UserError("Name at least one run folder to draw.")
        if self.out.suffix not in (".png", ".html"):
            raise UserError(f"out={self.out} must end in .png or .html.")
        if self.smooth < 0:
            raise UserError(f"smooth must not be negative, but is {self.smooth}.")


def plot_metrics(args: PlotMetricsArgs) -> Path:
    """Draws and returns the path of the file."""
    found = {name: series(read_log(log_of(run))) for name, run in named(args.runs).items()}
    metrics = args.metrics or default_metrics(found)
    images = [draw(found, metric, args) for metric in metrics]
    if args.out.suffix == ".png":
        return write_bytes(args.out, encode_png(grid(images, columns=min(2, len(images)))))
    figures = tuple(
        Figure(f"curve-{number}", image, metric)
        for number, (metric, image) in enumerate(zip(metrics, images, strict=True))
    )
    section = Section("Metrics", (last_values(found, metrics), Gallery(figures, minimum=480)))
    runs = ", ".join(map(str, args.runs))
    return write_text(args.out, render(Report("Training runs", f"From {runs}.", (section,))))


def log_of(run: Path) -> Path:
    """The log of a run folder.

    Raises:
        UserError: it has none.
    """
    for folder in (run, run / "train"):
        if (folder / LOG_FILE).is_file():
            return folder / LOG_FILE
    raise UserError(f"{run} is no run folder: neither it nor its train/ holds {LOG_FILE}.")


def named(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by the shortest ends of their paths that tell them apart.

    Raises:
        UserError: a run is named twice.
    """
    parts = [run.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise UserError(f"A run is named twice among {', '.join(map(str, runs))}.")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))


def series(records: Sequence[Record]) -> Series:
    """Steps and values by KIND/METRIC, and the times of training records by time/NAME.

    Values that were not finite are left out.
    """
    found: Series = {}
    for record in records:
        values = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if name not in ("step", "kind", "time") and value is not None
        }
        if record["kind"] == "train":
            values |= {f"time/{name}": value for name, value in record["time"].items()}
        for name, value in values.items():
            steps, so_far = found.setdefault(name, ([], []))
            steps.append(record["step"])
            so_far.append(value)
    return found


def default_metrics(found: dict[str, Series]) -> tuple[str, ...]:
    """The loss and all evaluation metrics that any of the runs has.

    Raises:
        UserError: no run has any.
    """
    names = sorted({name for each in found.values() for name in each})
    chosen = tuple(name for name in names if name == "train/loss" or name.startswith("eval/"))
    if not chosen:
        raise UserError(
            f"{', '.join(found)} hold no loss and no evaluation yet: wait, or name one."
        )
    return tuple(sorted(chosen, key=lambda name: name != "train/loss"))


def draw(found: dict[str, Series], metric: str, args: PlotMetricsArgs) -> np.ndarray:
    """One metric of all runs that have it.

    Raises:
        UserError: none has it, or a logarithm was asked for and a value is not positive.
    """
    curves = {run: each[metric] for run, each in found.items() if metric in each}
    if not curves:
        known = sorted({name for each in found.values() for name in each})
        raise UserError(f"No run has {metric}; there are {', '.join(known) or 'no metrics yet'}.")
    lowest = min(min(values) for _, values in curves.values())
    if args.log and lowest <= 0:
        raise UserError(f"{metric} goes down to {lowest:g}, which a logarithmic axis can't show.")
    return loss_curves(curves, metric, args.log, args.smooth, metric.split("/", 1)[1])


def last_values(found: dict[str, Series], metrics: Sequence[str]) -> Table:
    """A line for each run: its last step and the last value of each metric."""
    lines = []
    for run, each in found.items():
        step = max((steps[-1] for steps, _ in each.values()), default=0)
        values = (each[metric][1][-1] if metric in each else math.nan for metric in metrics)
        lines.append((run, step, *("-" if math.isnan(value) else value for value in values)))
    return Table("Last values", ("run", "step", *metrics), tuple(lines))
