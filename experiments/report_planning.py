"""What `eval_planning` found, as rows, a table in Markdown, CSV and a page with pictures."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.drives import UNPRUNED
from experiments.measure_planning import OURS, Key, Results
from experiments.planned import Case
from fastdrive_jax.evaluation.above import from_above
from fastdrive_jax.evaluation.bootstrap import reach
from fastdrive_jax.evaluation.compare import DIFFERENCE, HOLM, P_VALUE
from fastdrive_jax.evaluation.markdown import kept_share, markdown_table
from fastdrive_jax.evaluation.pictures import contact_sheet, keep_overlay
from fastdrive_jax.evaluation.plan_scores import HEADLINE, origin_way
from fastdrive_jax.evaluation.plots import interval_bars
from fastdrive_jax.evaluation.ranking import RANK
from fastdrive_jax.evaluation.report import (
    Figure,
    Gallery,
    Report,
    Section,
    Table,
    Text,
    write_report,
)
from fastdrive_jax.evaluation.results import Row, write_rows
from fastdrive_jax.evaluation.scenarios import COMMANDS
from fastdrive_jax.files import write_text


def write_results(out: Path, case: Case, results: Results, pictures: int) -> Path:
    """Writes planning.json, .csv and .md and the page; returns the page's path."""
    frames, scenes = _counted(case)
    meta = {"device": str(jax.devices()[0]), "what": case.title, **case.meta}
    meta |= {"frames": frames, "scenes": scenes}
    meta["protocols_without_truth"] = list(results.absent)
    write_rows(out / "planning.json", results.rows, meta)
    write_text(out / "planning.csv", as_csv(results.rows))
    tables = markdown_tables(results)
    text = "\n\n".join(f"## {table.caption}\n\n{_markdown(table)}" for table in tables)
    notes = "\n\n".join(_notes(case, results))
    write_text(
        out / "planning.md", f"# Planning with pruned tokens: {case.title}\n\n{notes}\n\n{text}\n"
    )
    return write_report(out, page(case, results, tables, pictures, meta))


def as_csv(rows: Sequence[Row]) -> str:
    """The rows with a header."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(Row)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return text.getvalue()


def _cells(rows: Sequence[Row]) -> dict[tuple[str, float | None, str], Row]:
    return {(row.method, row.keep_ratio, row.metric): row for row in rows}


def _order(results: Results) -> list[Key]:
    """Unpruned first, then methods without a ratio, then each ratio by its error."""
    cells = _cells(results.rows)
    keys = sorted(
        results.plans,
        key=lambda key: (
            key[0] != UNPRUNED,
            key[1] is not None,
            -(key[1] or 0),
            cells[*key, HEADLINE].value,
        ),
    )
    return keys


def markdown_tables(results: Results) -> tuple[Table, ...]:
    """The paper's Table 1, the other protocols, comparisons, groups."""
    found = [_main_table(results), _comparison_table(results), _group_table(results)]
    kinds = sorted({r.metric for r in results.rows if _is_protocol(r.metric)})
    if kinds:
        found.insert(1, _protocol_table(results, kinds))
    return tuple(found)


def _is_protocol(metric: str) -> bool:
    return (
        metric.startswith(("collision_", "intersection_"))
        and "/" not in metric
        and (not metric.endswith("s"))
    )


def _main_table(results: Results) -> Table:
    cells = _cells(results.rows)
    shown = [f"{HEADLINE}_{t}s" for t in (1, 2, 3)] + [HEADLINE]
    rates = [m for m in ("collision_impromptu", "intersection_omnidrive") if any(
        row.metric == m for row in results.rows)]  # fmt: skip
    header = ["kept", "method", "L2 1 s, m", "2 s", "3 s", "mean of three", "rel, %"]
    for rate in rates:
        header += [f"{rate.partition('_')[0]}, %", "rel, %"]
    header += ["rank"]
    lines = []
    for key in _order(results):
        line = [kept_share(key[1]), key[0]]
        line += [f"{cells[*key, metric].value:.3f}" for metric in shown[:-1]]
        line += [_with_ends(cells[*key, HEADLINE]), _relative(cells, key, HEADLINE)]
        for rate in rates:
            line += [_with_ends(cells.get((*key, rate)), 100, 2), _relative(cells, key, rate)]
        rank = cells.get((*key, RANK))
        line += ["" if rank is None else f"{rank.value:g} [{rank.low:g}, {rank.high:g}]"]
        lines.append(tuple(line))
    return Table(
        "Planning error, collisions and leaving the road",
        tuple(header),
        tuple(lines),
        "L2 at t seconds is the mean over the steps up to t; rel is unpruned / method, as in the "
        "paper. Collisions in Impromptu-VLA's protocol, leaving the drivable area in OmniDrive's. "
        "The bracket of the rank comes from ranking all methods on the same resampled scenes.",
    )


def _relative(cells: Mapping, key: Key, metric: str) -> str:
    base, own = (cells.get((*one, metric)) for one in ((UNPRUNED, 1.0), key))
    if base is None or own is None or min(base.value, own.value) < 1e-6:
        return ""  # nothing to divide by, or the driven way itself
    return f"{100 * base.value / own.value:.1f}"


def _with_ends(row: Row | None, scale: float = 1, digits: int = 3) -> str:
    if row is None:
        return ""
    text = f"{scale * row.value:.{digits}f}"
    if row.low is None:
        return text
    return f"{text} [{scale * row.low:.{digits}f}, {scale * row.high:.{digits}f}]"


def _protocol_table(results: Results, metrics: Sequence[str]) -> Table:
    cells = _cells(results.rows)
    more = ["l2_noavg", "ade", "fde"]
    lines = []
    for key in _order(results):
        line = [f"{cells[*key, metric].value:.3f}" for metric in more]
        shares = (cells.get((*key, metric)) for metric in metrics)
        line += ["" if row is None else f"{100 * row.value:.2f}" for row in shares]
        lines.append((kept_share(key[1]), key[0], *line))
    names = [f"{kind}, {name}, %" for kind, _, name in (m.partition("_") for m in metrics)]
    return Table(
        "Every public protocol",
        ("kept", "method", "L2 no average, m", "mean of six, m", "last, m", *names),
        tuple(lines),
        "Means of 1, 2 and 3 s. The protocols are not interchangeable: impromptu averages over the "
        "steps, omnidrive and bevplanner count any step, noavg only the last.",
    )


def _comparison_table(results: Results) -> Table:
    cells = _cells(results.rows)
    lines = []
    for method, ratio in _order(results):
        if ratio is None or ratio == 1:
            continue
        cost = cells.get((f"{method} - {UNPRUNED}", ratio, HEADLINE + DIFFERENCE))
        ours = cells.get((f"{OURS} - {method}", ratio, HEADLINE + DIFFERENCE))
        p = [cells.get((f"{OURS} - {method}", ratio, HEADLINE + end)) for end in (P_VALUE, HOLM)]
        line = [kept_share(ratio), method]
        line += [_with_ends(row) for row in (cost, ours)]
        line += ["" if row is None else f"{row.value:.4f}" for row in p]
        lines.append(tuple(line))
    return Table(
        "Paired differences of L2",
        ("kept", "method", "minus unpruned, m", f"{OURS} minus it, m", "p", "p, Holm"),
        tuple(lines),
        "On the same frames, with bootstrap intervals and sign-flip tests over scenes; below zero "
        "the first is better. Holm's correction is over the methods at one ratio.",
    )


def _group_table(results: Results) -> Table:
    cells = _cells(results.rows)
    names = [name for name, among in results.groups.items() if among.any()]
    lines = []
    for key in _order(results):
        found = [cells.get((*key, f"{HEADLINE}/{name}")) for name in names]
        values = ["" if row is None else f"{row.value:.3f}" for row in found]
        lines.append((kept_share(key[1]), key[0], *values))
    counts = [int(results.groups[name].sum()) for name in names]
    heads = [f"{name} ({n})" for name, n in zip(names, counts, strict=True)]
    return Table(
        "L2 by command and by what was driven, m",
        ("kept", "method", *heads),
        tuple(lines),
        "Number of frames in brackets. A turn ends more than 2 m to the side; stopped means below "
        "0.5 m/s at the end.",
    )


def _markdown(table: Table) -> str:
    return "\n".join([*markdown_table(table.header, table.lines), "", table.note])


def _counted(case: Case) -> tuple[int, int]:
    """Frames that count, and scenes that they are of."""
    counts = case.truth.future_valid.all(1)
    return int(counts.sum()), len(np.unique(case.truth.scene[counts]))


def _notes(case: Case, results: Results) -> tuple[str, ...]:
    frames, scenes = _counted(case)
    said = f"{frames} of {len(case.truth)} frames have a whole future and count. {reach(scenes)}"
    if not results.absent:
        return (*case.notes, said)
    absent = ", ".join(results.absent)
    return (*case.notes, said, f"Not measured, because the data has no agents or no map: {absent}.")


def page(
    case: Case, results: Results, tables: Sequence[Table], pictures: int, meta: Mapping
) -> Report:
    """The report."""
    ratios = sorted({r for _, r in results.plans if r is not None and r < 1}, reverse=True)
    return Report(
        title="Planning with pruned tokens",
        summary=f"Evaluated on {case.title}.",
        sections=(
            Section(
                "How each method affects the plan",
                (
                    Text("\n\n".join(_notes(case, results))),
                    Gallery(tuple(filter(None, (_bars(results, r) for r in ratios))), 420),
                    *tables,
                ),
            ),
            Section("Frames", (Gallery(tuple(_pictures(case, results, pictures)), 240),)),
        ),
        rows=tuple(results.rows),
        meta=dict(meta),
    )


def _bars(results: Results, ratio: float) -> Figure | None:
    """Differences to the unpruned model of one ratio."""
    end = f" - {UNPRUNED}"
    found = [
        row
        for row in results.rows
        if row.metric == HEADLINE + DIFFERENCE
        and row.keep_ratio == ratio
        and row.method.endswith(end)
    ]
    if not found:
        return None
    found.sort(key=lambda row: row.value)
    names = [row.method.removesuffix(end) for row in found]
    ends = [row.value for row in found], [row.low for row in found], [row.high for row in found]
    picture = interval_bars(
        names, *ends, "L2 minus unpruned [m]", f"{100 * ratio:g}% of the tokens kept", (OURS,)
    )
    name = f"cost_{100 * ratio:g}".replace(".", "_")
    return Figure(name, picture, "Paired differences with 95% intervals.")


def _pictures(case: Case, results: Results, count: int):
    """Frames of different scenes where seeing matters most, with plans and kept tokens."""
    least = min((r for m, r in results.plans if m == OURS and r is not None), default=None)
    shown = {"unpruned": (UNPRUNED, 1.0), "no image": ("no_image", None)}
    if least is not None:
        shown[f"ReconPruner {100 * least:g}%"] = (OURS, least)
        shown[f"random {100 * least:g}%"] = ("random", least)
    shown = {name: key for name, key in shown.items() if key in results.plans}
    for number, sample in enumerate(_telling(case, results, count)):
        plans = {
            name: origin_way(results.plans[key].waypoints[[sample]], case.point)[0]
            for name, key in shown.items()
        }
        title = f"{case.truth.scene[sample]}, command {COMMANDS[case.command[sample]]}"
        yield Figure(f"frame_{number}_above", from_above(case.truth, sample, plans, title), title)
        if least is not None:
            sheet = kept_sheet(case, sample, results.plans[OURS, least].kept[sample])
            caption = f"Tokens that ReconPruner keeps at {100 * least:g}%."
            yield Figure(f"frame_{number}_kept", sheet, caption, photo=True)


def kept_sheet(case: Case, sample: int, kept: np.ndarray) -> np.ndarray:
    """All cameras of a sample with the kept tokens in colour."""
    images = case.view(sample)
    each = case.grid[0] * case.grid[1]
    edge = images.shape[1] // case.grid[0]
    parts = [
        keep_overlay(image, kept[(kept >= k * each) & (kept < (k + 1) * each)] - k * each, edge)
        for k, image in enumerate(images)
    ]
    return contact_sheet(parts, case.cameras)


def _telling(case: Case, results: Results, count: int) -> list[int]:
    future, valid = case.truth.future, case.truth.future_valid.all(1)

    def error(key):
        if key not in results.plans:
            return np.zeros(len(future))
        planned = origin_way(results.plans[key].waypoints, case.point)
        return np.linalg.norm(planned - future, axis=-1).mean(1)

    gain = np.where(valid, error(("no_image", None)) - 2 * error((UNPRUNED, 1.0)), -np.inf)
    chosen: dict[str, int] = {}
    for sample in np.argsort(-gain, kind="stable"):
        if len(chosen) < count and np.isfinite(gain[sample]):
            chosen.setdefault(str(case.truth.scene[sample]), int(sample))
    return list(chosen.values())[:count]
