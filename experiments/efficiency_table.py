"""The rows of `bench-efficiency` as a table like the paper's Table 4, and speed against error."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.efficiency_args import UNPRUNED
from experiments.efficiency_counts import COUNTED
from experiments.frame_stages import BUSY
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.markdown import kept_share, markdown_table
from fastdrive_jax.evaluation.results import Row
from fastdrive_jax.evaluation.tables import merge_seeds
from fastdrive_jax.evaluation.tradeoff import Line, tradeoff
from fastdrive_jax.files import write_bytes

ERRORS = {"ade": "ADE, m", "l2_temavg": "L2, m"}  # metrics of `errors`, the first that is there
Cells = Mapping[tuple[str, float, str], Row]


def markdown(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    """One table a batch size and, of predictions, a machine."""
    cells = {(row.method, row.keep_ratio, row.metric): row for row in rows}
    settings = list(dict.fromkeys((row.method, row.keep_ratio) for row in rows))
    batches = sorted(
        {int(row.metric.rpartition("_")[2]) for row in rows if row.metric.startswith("bound_")}
    )
    lines = [_heading(meta)]
    for batch in batches:
        if meta["predicted"]:
            for name, machine in meta["machines"].items():
                lines += ["", _machine_line(machine, batch, meta, cells), ""]
                lines += _table(cells, settings, batch, meta, f"predicted_{name}_")
        else:
            lines += ["", f"Batch {batch}:", ""]
            lines += _table(cells, settings, batch, meta, "")
            lines += ["", f"What bounds batch {batch}, by count on this machine:", ""]
            lines += _bounds(cells, settings, batch)
    lines += ["", f"FLOPs by formula: {meta['flops']}."]
    return "\n".join([*lines, ""])


def write_plots(out: Path, rows: Sequence[Row], errors: Sequence[Row]) -> None:
    """OUT/speed_error.png and .svg: how much faster the smallest batch is, over the error.

    Raises:
        UserError: There is no error of any method and ratio that was timed.
    """
    speeds = _speeds(rows)
    metric = next((name for name in ERRORS if any(row.metric == name for row in errors)), None)
    if metric is None:
        raise UserError(f"The errors have no metric of {', '.join(ERRORS)}: plan with them first.")
    measured: dict[tuple[str, float], list[Row]] = {}
    for row in sorted(errors, key=lambda row: -(row.keep_ratio or 0)):
        if row.metric == metric and (row.method, row.keep_ratio) in speeds:
            measured.setdefault((row.method, row.keep_ratio), []).append(row)
    points: dict[str, list[tuple[float, float, float]]] = {}
    for (name, ratio), found in measured.items():
        error = merge_seeds(found)[0]
        points.setdefault(name, []).append((speeds[name, ratio], error, ratio))
    whole = points.pop(UNPRUNED, None)
    if not points:
        raise UserError("The errors are of other methods or ratios than what was timed.")
    lines = [Line(name, *zip(*found, strict=True)) for name, found in points.items()]
    reference = None if whole is None else (UNPRUNED, whole[0][1])
    guess = any(row.metric.startswith("predicted_") for row in rows)
    label = "times as fast as unpruned, prefill" + (" (predicted)" if guess else "")
    figure = tradeoff(lines, label, ERRORS[metric], reference)
    for suffix, data in figure.items():
        write_bytes(out / f"speed_error.{suffix}", data)


def _speeds(rows: Sequence[Row]) -> dict[tuple[str, float], float]:
    """Speed-up of each setting's prefill, of the first batch size or machine that is told."""
    found: dict[tuple[str, float], float] = {}
    for row in rows:
        if "prefill_batch_" in row.metric and row.metric.endswith("_speedup"):
            found.setdefault((row.method, row.keep_ratio), row.value)
    return found


def _heading(meta: Mapping[str, Any]) -> str:
    size = sum(meta["parameters"].values()) / 1e6
    where = (
        "PREDICTED: rooflines by count, nothing was run" if meta["predicted"] else meta["device"]
    )
    unknown = ", but for preprocessing, which is the host's" if meta["predicted"] else ""
    return (
        f"{meta['name']}, {size:,.0f}M parameters, {meta['visual_tokens']:,} visual and "
        f"{meta['text_tokens']} text tokens, {meta['dtype']}, {where}. Times in ms; prefill "
        "includes the pruner; a frame has all stages and "
        f"{meta['decode_steps']} decode steps{unknown}. FLOPs are by formula, attention as whole "
        "squares."
    )


def _machine_line(
    machine: Mapping[str, Any], batch: int, meta: Mapping[str, Any], cells: Cells
) -> str:
    held = jnp.dtype(meta["dtype"]).itemsize * sum(meta["parameters"].values())
    held += cells[UNPRUNED, 1.0, f"kv_bytes_batch_{batch}"].value
    fits = "" if held < machine["memory"] else "; unpruned, weights and caches alone do not fit"
    return (
        f"Predicted, {machine['name']} ({machine['flops'] / 1e12:.0f} TFLOP/s, "
        f"{machine['bandwidth'] / 1e12:.2f} TB/s by {machine['source']}), batch {batch}{fits}:"
    )


def _table(
    cells: Cells, settings: Sequence[tuple], batch: int, meta: Mapping[str, Any], prefix: str
) -> list[str]:
    """Lines of one table; cells that were not measured stay empty."""
    counted = (
        ("prefill_flops", "TFLOPs", lambda row: _digits(row.value / 1e12)),
        ("bound", "fewer", _times),
    )
    timed = [
        ("pruner", "ms"),
        ("prefill", "ms"),
        ("prefill", "speedup"),
        ("decode", "ms"),
        ("decode", "speedup"),
        ("vision", "ms"),
        ("frame", "ms"),
        ("frame", "speedup"),
    ]
    heads = ["kept", "method", *(label for _, label, _ in counted)]
    heads += ["x" if kind == "speedup" else f"{stage}, ms" for stage, kind in timed]
    heads += ["KV, MB"] if prefix else ["KV, MB", "peak, MB"]
    lines = []
    for name, ratio in settings:
        texts = [kept_share(ratio), name]
        for metric, _, text in counted:
            row = cells.get((name, ratio, f"{metric}_batch_{batch}"))
            texts.append("" if row is None else text(row))
        for stage, kind in timed:
            row = cells.get((name, ratio, f"{prefix}{stage}_batch_{batch}_{kind}"))
            texts.append("" if row is None else _times(row) if kind == "speedup" else _range(row))
        row = cells.get((name, ratio, f"kv_bytes_batch_{batch}"))
        texts.append("" if row is None else _digits(row.value / 1e6))
        if not prefix:
            peaks = [cells.get((name, ratio, f"{s}_peak_bytes_batch_{batch}")) for s in COUNTED]
            texts.append(_digits(max(row.value for row in peaks) / 1e6) if all(peaks) else "")
        lines.append(texts)
    return markdown_table(heads, lines)


def _bounds(cells: Cells, settings: Sequence[tuple], batch: int) -> list[str]:
    """Counts of the prefill, the speed-up that they allow, and rooflines beside what it took."""
    stages = ("vision", "prefill", "decode", "frame")
    heads = ["kept", "method", "TFLOPs: formula, program, XLA", "prefill x", "x of work"]
    heads += ["x by formula", "x by program"]
    heads += [f"{stage}: roofline, ms (share)" for stage in stages]
    lines = []
    for name, ratio in settings:

        def cell(metric, name=name, ratio=ratio):
            return cells.get((name, ratio, f"{metric}_batch_{batch}"))

        if cell("bound") is None:  # not of this library
            continue
        xla = [cell(f"{stage}_xla_flops").value for stage in ("pruner", "prefill")]
        counts = cell("prefill_flops").value, _value(cell("prefill_program_flops")), sum(xla)
        texts = [kept_share(ratio), name]
        texts.append(", ".join("-" if n is None else _digits(n / 1e12) for n in counts))
        speeds = (
            cells.get((name, ratio, f"prefill_batch_{batch}_{kind}speedup")) for kind in ("", BUSY)
        )
        bounds = *speeds, cell("bound"), cell("program_bound")
        texts += ["" if row is None else _times(row) for row in bounds]
        for stage in stages:
            metric = f"{stage}_batch_{batch}"
            least = cells[name, ratio, f"{metric}_roofline_ms"].value
            took = cells[name, ratio, f"{metric}_ms"].value
            texts.append(f"{_digits(least)} ({least / took:.0%})")
        lines.append(texts)
    return markdown_table(heads, lines)


def _value(row: Row | None) -> float | None:
    return None if row is None else row.value


def _digits(value: float) -> str:
    """Three digits or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(row: Row) -> str:
    text = f"x{row.value:.2f}"
    return text if row.low is None else f"{text} [{row.low:.2f}, {row.high:.2f}]"


def _range(row: Row) -> str:
    if row.low is None:
        return _digits(row.value)
    return f"{_digits(row.value)} [{_digits(row.low)}, {_digits(row.high)}]"
