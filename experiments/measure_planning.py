"""From plans to figures: every metric of every method, with intervals, differences and order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.drives import UNPRUNED
from experiments.planned import Case, Planned
from fastdrive_jax.evaluation.compare import holm_rows
from fastdrive_jax.evaluation.plan_scores import (
    HEADLINE,
    Scores,
    driven_collisions,
    group_scores,
    mean_scores,
    measurable,
    paired_rows,
    plan_scores,
    score_rows,
)
from fastdrive_jax.evaluation.ranking import RANK, rank_intervals
from fastdrive_jax.evaluation.results import Row, point
from fastdrive_jax.evaluation.scenarios import COMMANDS, SCENARIOS, scenario_of

OURS = "reconpruner"
UNREAD = "answers_unread"
Key = tuple[str, float | None]


@dataclass(frozen=True)
class Results:
    """All that was found.

    Attributes:
        rows: Every figure.
        plans: The first run of each method and ratio.
        groups: Name of each group of samples to which of the S belong to it.
        absent: Protocols that the data has no truth for.
    """

    rows: list[Row]
    plans: Mapping[Key, Planned]
    groups: Mapping[str, np.ndarray]
    absent: tuple[str, ...]


def measure(
    case: Case,
    found: Mapping[Key, Sequence[tuple[int | None, Planned]]],
    protocols: Sequence[str],
) -> Results:
    """Every figure of every method, with intervals, paired differences and order.

    Args:
        case: What was planned.
        found: (method, ratio) to its runs: seed and plans.
        protocols: Asked for.
    """
    truth, scenes = case.truth, case.truth.scene
    there = measurable(truth)
    chosen = tuple(name for name in protocols if name in there)
    groups, driven = sample_groups(case), driven_collisions(truth, chosen)
    rows: list[Row] = []
    scores: dict[Key, Scores] = {}
    for (method, ratio), runs in found.items():
        each = []
        for seed, planned in runs:
            read = None if planned.read.all() else planned.read
            one = plan_scores(planned.waypoints, truth, chosen, read, driven, case.point)
            each.append(one)
            if len(runs) > 1:
                rows += score_rows(f"{method}, seed {seed}", ratio, _headlines(one), scenes, seed)
        mean = scores[method, ratio] = mean_scores(each)
        both = mean | group_scores(_headlines(mean), groups)
        rows += score_rows(method, ratio, both, scenes)
        unread = np.mean([1 - planned.read.mean() for _, planned in runs])
        rows.append(point(method, ratio, UNREAD, unread, n=len(scenes)))
    rows += _comparisons(scores, scenes)
    plans = {key: runs[0][1] for key, runs in found.items()}
    absent = tuple(name for name in protocols if name not in there)
    return Results(rows, plans, groups, absent)


def sample_groups(case: Case) -> dict[str, np.ndarray]:
    """Samples of each command and of each kind of driving."""
    scenario = scenario_of(case.truth.future, case.truth.future_valid)
    groups = {f"command {name}": case.command == k for k, name in enumerate(COMMANDS)}
    return groups | {name: scenario == k for k, name in enumerate(SCENARIOS)}


def _headlines(scores: Scores) -> Scores:
    """The averages over the horizons alone."""
    return {name: values for name, values in scores.items() if not name.endswith("s")}


def _comparisons(scores: Mapping[Key, Scores], scenes: np.ndarray) -> list[Row]:
    """Each method minus the unpruned model and ours minus each method, and their order."""
    rows: list[Row] = []
    ratios = sorted({ratio for _, ratio in scores if ratio is not None and ratio < 1}, reverse=True)
    base = scores.get((UNPRUNED, 1.0))
    for ratio in ratios:
        here = {m: s[HEADLINE] for (m, r), s in scores.items() if r == ratio}
        pairs = []
        if base is not None:
            pairs += [(m, values, UNPRUNED, base[HEADLINE]) for m, values in here.items()]
        if OURS in here:
            pairs += [(OURS, here[OURS], m, values) for m, values in here.items() if m != OURS]
        found = [paired_rows(HEADLINE, ratio, *pair, scenes) for pair in pairs]
        rows += [row for both in found for row in both]
        # One family of tests: all others against ours at this ratio.
        tests = [
            p
            for _, p in found
            if p.method.startswith(f"{OURS} - ") and p.method != f"{OURS} - {UNPRUNED}"
        ]
        rows += holm_rows(tests)
        counts = np.all([np.isfinite(values) for values in here.values()], axis=0)
        if len(here) > 1 and len(set(scenes[counts].tolist())) > 1:
            order = rank_intervals({m: v[counts] for m, v in here.items()}, scenes[counts])
            rows += [
                Row(m, ratio, RANK, *ends, int(counts.sum()), None) for m, ends in order.items()
            ]
    return rows
