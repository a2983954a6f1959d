"""Rows, tables and films of robot episodes."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from data_pipelines.robot.environment import Suite
from data_pipelines.robot.workers import ENVIRONMENT, POLICY, Film
from experiments.drives import UNPRUNED, label
from fastdrive_jax.evaluation.bootstrap import Interval, interval
from fastdrive_jax.evaluation.compare import difference_rows
from fastdrive_jax.evaluation.markdown import kept_share, markdown_table
from fastdrive_jax.evaluation.pictures import keep_overlay
from fastdrive_jax.evaluation.proportions import unanimous, wilson
from fastdrive_jax.evaluation.results import Row, point

Found = TypeVar("Found", Interval, Row)
SUCCESS = "success"
STAGES = ("vision", "prefill", "decode")
_TOKEN = 14  # pixels of a token in films
HEADS = (
    "policy",
    "kept",
    "success, %",
    "minus unpruned",
    "actions to success",
    *(f"{stage}, ms" for stage in STAGES),
    "policy, ms",
    "environment, ms per action",
    "actions per second, policy alone",
    "with the environment",
)


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        suite: Its tasks.
        policy: Name of what acts.
        method: How tokens are chosen; None for controls.
        ratio: Kept tokens; None for controls.
        seed: Of what draws.
    """

    suite: str
    policy: str
    method: str | None
    ratio: float | None
    seed: int

    @property
    def label(self) -> str:
        """Its name in tables."""
        return " ".join(
            [label(self.policy), *([] if self.method is None else [label(self.method)])]
        )

    @property
    def unpruned(self) -> "Setting":
        """The same policy with all tokens."""
        return Setting(self.suite, self.policy, UNPRUNED, 1.0, self.seed)


@dataclass(frozen=True)
class Outcome:
    """What became of an episode; see `Episode`."""

    task: int
    trial: int
    success: bool
    steps: int
    decisions: int
    seconds: dict[str, float]


Outcomes = Mapping[Setting, Mapping[tuple[int, int], Outcome]]


def rows_of(outcomes: Outcomes, suites: Mapping[str, Suite]) -> list[Row]:
    """Success by setting and by task, differences to unpruned in pairs, and times.

    Success has Wilson's interval where episodes are independent. Several seeds are pooled in rows
    without a seed: where a suite's initial states are few and the same for all seeds, its episodes
    are not, and states are resampled instead, as they are for differences. Where all states gave
    the same that has no width, and `unanimous` has.

    Args:
        outcomes: Setting to (task, trial) to outcome.
        suites: By name.
    """
    rows: list[Row] = []
    for setting, found in outcomes.items():
        rows += _setting_rows(setting, list(found.values()), setting.seed)
    for group in _over_seeds(outcomes):
        first, seeds = group[0], [setting.seed for setting in group]
        states = _states(group, outcomes, suites[first.suite])
        if len(seeds) > 1:
            values = [float(o.success) for s in group for o in outcomes[s].values()]
            if suites[first.suite].seed is None:
                found = _with_width(interval(values, states), states, least=0)
            else:  # each seed draws states of its own
                found = wilson(int(sum(values)), len(values))
            rows.append(_row(first, _metric(first, SUCCESS), found, None))
        if first.method not in (None, UNPRUNED) and first.unpruned in outcomes:
            pairs = [
                (float(outcomes[s][one].success), float(outcomes[s.unpruned][one].success))
                for s in group
                for one in outcomes[s]
            ]
            if len(pairs) > 1:
                difference, p_value = difference_rows(
                    _metric(first, SUCCESS), first.ratio, first.label,
                    [a for a, _ in pairs], first.unpruned.label, [b for _, b in pairs],
                    states, seed=None if len(seeds) > 1 else seeds[0],
                )  # fmt: skip
                rows += [_with_width(difference, states, least=-1), p_value]
    return rows


def _over_seeds(outcomes: Outcomes) -> list[list[Setting]]:
    """Settings that differ in the seed only."""
    groups: dict[tuple, list[Setting]] = {}
    for s in outcomes:
        groups.setdefault((s.suite, s.policy, s.method, s.ratio), []).append(s)
    return list(groups.values())


def _states(group: Sequence[Setting], outcomes: Outcomes, suite: Suite) -> np.ndarray:
    """Which initial state each episode of some seeds had."""
    drawn = suite.seed is not None
    keys = [(s.seed if drawn else 0, *one) for s in group for one in outcomes[s]]
    return np.unique(np.array(keys), axis=0, return_inverse=True)[1].reshape(-1)


def _with_width(found: Found, states: np.ndarray, least: float) -> Found:
    """What was resampled, but for an interval without a width."""
    if found.low is None or found.low < found.high:
        return found
    low, high = unanimous(found.value, len(np.unique(states)), least)
    return replace(found, low=low, high=high)


def _setting_rows(setting: Setting, outcomes: Sequence[Outcome], seed: int | None) -> list[Row]:
    rows = []
    wins = sum(outcome.success for outcome in outcomes)
    rows.append(_row(setting, _metric(setting, SUCCESS), wilson(wins, len(outcomes)), seed))
    for task in sorted({outcome.task for outcome in outcomes}):
        part = [outcome.success for outcome in outcomes if outcome.task == task]
        found = wilson(sum(part), len(part))
        rows.append(_row(setting, _metric(setting, f"{SUCCESS}_task{task}"), found, seed))
    lengths = [float(outcome.steps) for outcome in outcomes if outcome.success]
    if lengths:
        rows.append(_row(setting, _metric(setting, "steps_to_success"), interval(lengths), seed))
    decisions = sum(outcome.decisions for outcome in outcomes)
    steps = sum(outcome.steps for outcome in outcomes)
    stages = dict.fromkeys(stage for outcome in outcomes for stage in outcome.seconds)
    spent = {stage: sum(o.seconds.get(stage, 0.0) for o in outcomes) for stage in stages}
    times = [
        (f"{stage}_ms", 1e3 * spent[stage] / (steps if stage == ENVIRONMENT else decisions), "ms")
        for stage in stages
    ]
    times.append(("policy_hz", steps / spent[POLICY], "Hz"))
    times.append(("loop_hz", steps / (spent[POLICY] + spent[ENVIRONMENT]), "Hz"))
    for name, value, unit in times:
        metric = _metric(setting, name)
        row = point(setting.label, setting.ratio, metric, value, n=decisions, seed=seed, unit=unit)
        rows.append(row)
    return rows


def _metric(setting: Setting, name: str) -> str:
    return f"{setting.suite}_{name}"


def _row(setting, metric, found, seed) -> Row:
    return Row(
        setting.label, setting.ratio, metric, found.value, found.low, found.high, found.n, seed
    )


def markdown(
    rows: Sequence[Row], outcomes: Outcomes, suites: Mapping[tuple[str, int], Suite]
) -> str:
    """Of each suite a table of success and times, and one of success by task."""
    cells = {(row.method, row.keep_ratio, row.metric, row.seed): row for row in rows}
    lines: list[str] = []
    for (name, seed), suite in suites.items():
        chosen = [s for s in outcomes if s.suite == name and s.seed == seed]
        counts = {len(outcomes[s]) for s in chosen}
        lines += [f"{name}, seed {seed}: {' or '.join(map(str, sorted(counts)))} episodes", ""]
        lines += markdown_table(HEADS, [_line(setting, cells) for setting in chosen])
        tasks = []
        for task in sorted({task for s in chosen for task, _ in outcomes[s]}):
            found = (
                cells[s.label, s.ratio, _metric(s, f"{SUCCESS}_task{task}"), seed] for s in chosen
            )
            tasks.append([suite.instructions[task], *(f"{100 * row.value:.0f}" for row in found)])
        heads = ["success by task, %", *map(_column, chosen)]
        lines += ["", *markdown_table(heads, tasks), ""]
    pooled = [row for row in rows if row.seed is None]
    if pooled:
        figures = [
            (row.method, kept_share(row.keep_ratio), row.metric, _percent(row)) for row in pooled
        ]
        heads = "policy", "kept", "figure", "value"
        lines += ["All seeds together", "", *markdown_table(heads, figures), ""]
    return "\n".join(lines)


def _column(setting: Setting) -> str:
    return f"{setting.label} {kept_share(setting.ratio)}".rstrip()


def _line(setting: Setting, cells: Mapping[tuple, Row]) -> list[str]:
    def cell(metric: str) -> Row | None:
        key = (setting.label, setting.ratio, _metric(setting, metric), setting.seed)
        return cells.get(key)

    def number(metric: str, digits: int) -> str:
        row = cell(metric)
        return "" if row is None else f"{row.value:.{digits}f}"

    pair = cells.get(
        (
            f"{setting.label} - {setting.unpruned.label}",
            setting.ratio,
            _metric(setting, f"{SUCCESS}_difference"),
            setting.seed,
        )
    )
    return [
        setting.label,
        kept_share(setting.ratio),
        _percent(cell(SUCCESS)),
        "" if pair is None else _percent(pair),
        number("steps_to_success", 1),
        *(number(f"{stage}_ms", 1) for stage in (*STAGES, POLICY, ENVIRONMENT)),
        number("policy_hz", 1),
        number("loop_hz", 1),
    ]


def _percent(row: Row) -> str:
    if row.metric.endswith("_p"):
        return f"{row.value:.3f}"
    text = f"{100 * row.value:.1f}"
    return text if row.low is None else f"{text} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def film_gif(
    film: Film,
    grid: tuple[int, int] | None,
    hz: float,
    views: Sequence[int] | None = None,
) -> bytes:
    """An animated GIF of an episode, views side by side, with the tokens that were kept.

    Tokens are those of the last time that the policy acted: while it executes a chunk of actions
    it looks at nothing. Pictures that it is not shown are left as they are. The others are drawn as
    if their tokens covered them; those of a published OpenVLA on LIBERO cover the middle 90% of the
    area, a fortieth less at each side.

    Args:
        film: What was seen.
        grid: Rows and columns of the visual tokens of each view; None draws none.
        hz: Frames a second.
        views: See `RobotPolicy`.
    """
    cameras = range(film.frames.shape[1])
    seen = tuple(cameras if views is None else views)
    places = [seen.index(camera) if camera in seen else None for camera in cameras]
    frames, decision = [], -1
    for step, pictures in enumerate(film.frames):
        while decision + 1 < len(film.decisions) and film.decisions[decision + 1] <= step:
            decision += 1
        if grid is not None:
            pictures = [
                _drawn(picture, film.kept[decision], place, grid)
                for picture, place in zip(pictures, places, strict=True)
            ]
        frames.append(Image.fromarray(np.concatenate(list(pictures), axis=1)))
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / hz), loop=0
    )
    return buffer.getvalue()


def _drawn(
    picture: np.ndarray, kept: np.ndarray | None, place: int | None, grid: tuple[int, int]
) -> np.ndarray:
    """A picture with its own among the kept tokens; those of all views are numbered in one row.

    Its place is that in the model's order. What all is kept of, or nothing seen of, is left as it
    is, but in the same size.
    """
    size = (grid[1] * _TOKEN, grid[0] * _TOKEN)
    large = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    if kept is None or place is None:
        return large
    tokens = grid[0] * grid[1]
    own = kept[(kept >= place * tokens) & (kept < (place + 1) * tokens)] - place * tokens
    return keep_overlay(large, own, token=_TOKEN, scale=1)
