"""Rows, table and pictures of closed-loop drives."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from PIL import Image

from data_pipelines.closed_loop.camera import Studio
from data_pipelines.closed_loop.events import Verdict, actor_boxes, ego_boxes
from data_pipelines.closed_loop.route import Route, state_rows
from data_pipelines.closed_loop.simulate import Drives
from data_pipelines.synthetic.config import LANE_MARK, ROAD
from data_pipelines.synthetic.planner import EgoState
from experiments.drives import UNPRUNED
from fastdrive_jax.evaluation import palette
from fastdrive_jax.evaluation.bootstrap import interval
from fastdrive_jax.evaluation.compare import difference_rows
from fastdrive_jax.evaluation.footprint import corners
from fastdrive_jax.evaluation.markdown import kept_share, markdown_table
from fastdrive_jax.evaluation.pictures import keep_overlay, write_png
from fastdrive_jax.evaluation.results import Row, point
from fastdrive_jax.files import write_bytes

HEADLINE = "driving_score"
Setting = tuple[str, float | None]
Verdicts = Mapping[Setting, Mapping[str, Sequence[Verdict]]]

# Metric, its value of a route (None where it has none), unit.
METRICS = (
    (HEADLINE, lambda v, route: v.score, ""),
    ("success", lambda v, route: v.success, ""),
    ("completion", lambda v, route: v.completion, ""),
    ("collision", lambda v, route: v.collision != "", ""),
    ("red_light", lambda v, route: v.red_light if has(route, "red_light") else None, ""),
    ("stop_sign", lambda v, route: v.stop_sign if has(route, "stop_sign") else None, ""),
    ("off_road", lambda v, route: v.off_road, ""),
    ("stuck", lambda v, route: v.stuck, ""),
    ("struck", lambda v, route: v.struck, ""),
    ("deviation", lambda v, route: v.deviation, "m"),
    ("braking", lambda v, route: v.braking, "m/s^2"),
    ("jerk", lambda v, route: v.jerk, "m/s^3"),
    ("lateral", lambda v, route: v.lateral, "m/s^2"),
)
COLUMNS = (
    ("success", "success, %", 100, 0),
    ("completion", "completed, %", 100, 0),
    ("collision", "collisions, %", 100, 0),
    ("red_light", "red lights run, %", 100, 0),
    ("off_road", "off road, %", 100, 1),
    ("stuck", "stuck, %", 100, 0),
    ("braking", "braking, m/s^2", 1, 1),
    ("jerk", "jerk, m/s^3", 1, 1),
)


def has(route: Route, kind: str) -> bool:
    """Whether a route has a stop line of a kind."""
    return any(line.kind == kind for line in route.lines)


def metric_name(kind: str, metric: str) -> str:
    """Figures of the world have the plain name, those of logs one that says so."""
    return metric if kind == "world" else f"{kind}_{metric}"


def rows_of(
    courses: Mapping[str, Sequence[Route]],
    verdicts: Verdicts,
    latencies: Mapping[Setting, float],
    timings: Mapping[Setting, Drives],
    seeds: Mapping[Setting, int | None],
) -> list[Row]:
    """Means over routes with bootstrap intervals, and each setting's paired difference to unpruned.

    Args:
        courses: Routes by kind.
        verdicts: Setting to kind to the verdict of each route.
        latencies: Seconds.
        timings: The drives of the world.
        seeds: Of settings that draw.
    """
    rows: list[Row] = []
    for (name, ratio), by_kind in verdicts.items():
        seed = seeds[name, ratio]
        for kind, routes in courses.items():
            pairs = list(zip(by_kind[kind], routes, strict=True))
            for metric, value, unit in METRICS:
                values = [float(x) for x in (value(v, r) for v, r in pairs) if x is not None]
                if values:
                    rows.append(_row(name, ratio, metric_name(kind, metric), values, seed, unit))
            for scenario in sorted({route.scenario for route in routes} - {"log"}):
                values = [v.score for v, route in pairs if route.scenario == scenario]
                rows.append(_row(name, ratio, f"{HEADLINE}_{scenario}", values, seed, ""))
            unpruned = verdicts[UNPRUNED, 1.0][kind]
            if name != UNPRUNED and len(routes) > 1:
                scores = [[v.score for v in part] for part in (by_kind[kind], unpruned)]
                metric = metric_name(kind, HEADLINE)
                rows += difference_rows(
                    metric, ratio, name, scores[0], UNPRUNED, scores[1], seed=seed
                )
        drives = timings[name, ratio]
        frames = drives.plans.shape[0] * drives.plans.shape[1]
        for metric, value, unit in (
            ("latency", latencies[name, ratio], "s"),
            ("plan_ms", 1e3 * drives.planning / frames, "ms"),
            ("picture_ms", 1e3 * drives.drawing / frames, "ms"),
        ):
            rows.append(point(name, ratio, metric, value, n=frames, seed=seed, unit=unit))
    return rows


def _row(name, ratio, metric, values, seed, unit) -> Row:
    found = interval(values)
    return Row(name, ratio, metric, found.value, found.low, found.high, found.n, seed, unit)


def markdown(
    rows: Sequence[Row], courses: Mapping[str, Sequence[Route]], settings: Sequence[Setting]
) -> str:
    """One table for each kind of route, and the scores by situation."""
    cells = {(row.method, row.keep_ratio, row.metric): row for row in rows}
    lines: list[str] = []
    for kind, routes in courses.items():
        drivers = []
        for name, ratio in settings:
            score = cells[name, ratio, metric_name(kind, HEADLINE)]
            pair = cells.get(
                (f"{name} - {UNPRUNED}", ratio, metric_name(kind, f"{HEADLINE}_difference"))
            )
            line = [kept_share(ratio), name, _cell(score), "" if pair is None else _cell(pair)]
            for metric, _, scale, digits in COLUMNS:
                row = cells.get((name, ratio, metric_name(kind, metric)))
                line.append("" if row is None else f"{scale * row.value:.{digits}f}")
            drivers.append(line)
        heads = ["kept", "driver", "driving score", "minus unpruned"]
        heads += [title for _, title, _, _ in COLUMNS]
        lines += [f"{len(routes)} routes ({kind})", "", *markdown_table(heads, drivers), ""]
    scenarios = sorted({route.scenario for route in courses["world"]})
    names = [setting for setting in settings if setting[1] in (None, 1.0)]
    situations = []
    for scenario in scenarios:
        found = [cells[name, ratio, f"{HEADLINE}_{scenario}"] for name, ratio in names]
        situations.append([scenario, found[0].n, *(f"{row.value:.2f}" for row in found)])
    heads = ["driving score by situation", "routes", *(name for name, _ in names)]
    lines += markdown_table(heads, situations)
    found = [cells.get((UNPRUNED, 1.0, f"recovery_{what}")) for what in ("lateral", "turn")]
    if all(found):
        lines += [
            "",
            "Of the correction that the world's driver plans, the unpruned model plans "
            f"{_cell(found[0])} when displaced sideways, {_cell(found[1])} when rotated.",
        ]
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if row.low is None:
        return f"{row.value:.3f}"
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


def draw_drives(
    folder: Path,
    count: int,
    courses: Mapping[str, Sequence[Route]],
    found: Mapping[Setting, tuple[Sequence[Drives], float]],
    verdicts: Verdicts,
    size: tuple[int, int],
) -> None:
    """Bird's-eye views of some routes of each kind, and one drive as its camera saw it.

    The routes are those on which the first method, at its lowest ratio, and the unpruned model
    score most differently; the drive is the first of them.
    """
    methods = [s for s in found if s[1] is not None and s[0] != UNPRUNED]
    shown: Setting = min(
        (s for s in methods if s[0] == methods[0][0]), key=lambda s: s[1], default=(UNPRUNED, 1.0)
    )
    for place, (kind, routes) in enumerate(courses.items()):
        pairs = zip(verdicts[shown][kind], verdicts[UNPRUNED, 1.0][kind], strict=True)
        gaps = [-abs(a.score - b.score) for a, b in pairs]
        for rank, number in enumerate(np.argsort(gaps, kind="stable")[:count]):
            route = routes[number]
            lines = [
                (f"{name}{'' if r is None else f' {100 * r:g}%'}", found[name, r][0][place], v)
                for name, r in dict.fromkeys([(UNPRUNED, 1.0), shown])
                for v in [verdicts[name, r][kind][number]]
            ]
            paths = [(text, drives.states[number], v) for text, drives, v in lines]
            write_png(folder / f"{kind}_{route.name}.png", birds_eye(route, paths))
            if rank == 0:
                drives, verdict = found[shown][0][place], verdicts[shown][kind][number]
                film = camera_film(route, drives, int(number), verdict.end, size)
                write_bytes(folder / f"{kind}_{route.name}.gif", film)


def birds_eye(
    route: Route, paths: Sequence[tuple[str, np.ndarray, Verdict]], pixels: int = 900
) -> np.ndarray:
    """The road from above with what was driven, uint8 [H, W, 3].

    Args:
        route: Of the drives.
        paths: Name, states [steps + 1, 7] and verdict of each drive; road users stand where they
            were when the last one ended.
        pixels: Width of the picture.
    """
    reference = state_rows(route.reference)[: max(len(states) for _, states, _ in paths)]
    figure = Figure(figsize=(pixels / 100, pixels / 100), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scene = route.phases[-1][1]
    for strip in scene.strips:
        if strip.label in (ROAD, LANE_MARK):
            colour = "#c9ccd1" if strip.label == ROAD else "#ffffff"
            axes.add_patch(Polygon(strip.outline, color=colour, lw=0))
            for hole in strip.holes:
                axes.add_patch(Polygon(hole, color="white", lw=0))
    end = max(verdict.end for _, _, verdict in paths)
    longest = next(states for _, states, verdict in paths if verdict.end == end)
    for actor in scene.actors:
        if actor.category:
            boxes, there = actor_boxes(route, actor, longest[:end])
            if there[-1]:
                axes.add_patch(Polygon(corners(boxes[-1]), color="#7a6a58", lw=0))
    axes.plot(*reference[:, :2].T, color="black", lw=1.2, ls=":", label="reference")
    for (name, states, verdict), colour in zip(paths, palette.CYCLE, strict=False):
        driven = states[: verdict.end]
        axes.plot(*driven[:, :2].T, color=colour, lw=2, label=f"{name}: {verdict.score:.2f}")
        axes.add_patch(Polygon(corners(ego_boxes(driven)[-1]), fill=False, color=colour, lw=2))
        if verdict.collision:
            axes.plot(*driven[-1, :2], "x", color=colour, ms=12, mew=3)
        if verdict.off_road_time is not None:
            step = round(verdict.off_road_time * 10)
            axes.plot(*driven[step, :2], "o", color=colour, ms=7, mfc="none", mew=2)
    around = np.concatenate([reference, *(states[: v.end] for _, states, v in paths)])[:, :2]
    low, high = around.min(0) - 12, around.max(0) + 12
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_aspect("equal")
    axes.set_title(f"{route.name}, {route.scenario} (x collision, o leaves the road)")
    axes.set_xlabel("m")
    axes.legend(loc="upper right", fontsize=9)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def camera_film(
    route: Route, drives: Drives, number: int, end: int, size: tuple[int, int]
) -> bytes:
    """An animated GIF of what the camera saw at each plan, with the tokens that were kept."""
    studio, frames = Studio([route], size), []
    for frame, time in enumerate(drives.times):
        step = round(time * 10)
        if step >= end:
            break
        state = EgoState(*drives.states[number, step].tolist())
        # Frames are numbered by the clock, so that a dropped one shows as in the drive.
        picture = studio.picture((0, state, float(time), round(time / 0.5))).image
        if drives.kept is not None:
            picture = keep_overlay(picture, drives.kept[frame, number], scale=1)
        frames.append(Image.fromarray(picture))
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=500, loop=0)
    return buffer.getvalue()
