"""The report of the quick start on the synthetic world."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.features import SplitFeatures
from data_pipelines.shards import Shards
from experiments.planning import HEADLINE, PlanningSplit
from experiments.report_parts import (
    METHODS,
    flipbook,
    kept_section,
    recall_card,
    reconstruction_section,
    report_meta,
    run_section,
    value_of,
)
from fastdrive_jax.evaluation.compare import DIFFERENCE
from fastdrive_jax.evaluation.pictures import contact_sheet, keep_overlay
from fastdrive_jax.evaluation.plots import birds_eye, curves, ratio_curves, timing_bars
from fastdrive_jax.evaluation.report import (
    Card,
    Figure,
    Gallery,
    Report,
    Section,
)
from fastdrive_jax.evaluation.results import Row
from fastdrive_jax.evaluation.tables import Method, Metric, ResultTable
from fastdrive_jax.pruning.select import num_keep, top_k
from fastdrive_jax.training.metrics_log import Record

UNPRUNED = Method("unpruned", "unpruned", "reference")
NO_IMAGE = Method("no_image", "no image", "reference")
PLAN_METRICS = (
    Metric(HEADLINE, "L2 error, mean of six waypoints", "m"),
    Metric("l2_temavg", "L2 error, mean of 1-3 s as published", "m"),
    Metric("fde", "L2 error at 3 s", "m"),
)
PAIRED = Metric(HEADLINE + DIFFERENCE, "L2 error, ReconPruner minus the other method", "m", "none")
OTHERS = tuple(
    Method(f"reconpruner - {method.name}", method.label, method.role) for method in METHODS[1:]
)


@dataclass(frozen=True)
class WorldFindings:
    """All that the quick start on the synthetic world found.

    Attributes:
        config: The run.
        shards: Its data.
        rows: Every figure.
        history: ReconPruner's training log.
        times: {ratio: {stage: ms}}.
        data: Samples that were planned.
        scores: ReconPruner's [S, N] for them.
        plans: {(method, ratio): [S, T, 2]}.
        val: Features of all validation pictures.
        trained: Params {"pruner", "decoder"}.
        bundle: The export.
    """

    config: Any
    shards: Shards
    rows: Sequence[Row]
    history: Sequence[Record]
    times: Mapping[float, Mapping[str, float]]
    data: PlanningSplit
    scores: np.ndarray
    plans: Mapping[tuple[str, float | None], np.ndarray]
    val: SplitFeatures
    trained: Any
    bundle: Path


def world_report(found: WorldFindings) -> Report:
    """The report of the quick start."""
    shown = _telling_samples(found)
    first = shown[0]
    run = found.config.pruner
    return Report(
        title="FastDrive-JAX quick start",
        summary=(
            "A ReconPruner was trained by foreground and background reconstruction on a synthetic "
            "driving world and placed in front of a tiny driving VLA that was not retrained. This "
            "report shows what it keeps and how that affects the plan."
        ),
        cards=_world_cards(found.rows),
        hero=flipbook(found.data.images[first, 0], found.scores[first], "hero"),
        sections=(
            Section(
                "The plan",
                (
                    ResultTable(
                        "Planning error of the pruned VLA on unseen scenes",
                        tuple(found.rows),
                        PLAN_METRICS,
                        (UNPRUNED, *METHODS, NO_IMAGE),
                        "95% bootstrap intervals over scenes. Random is the mean of five draws.",
                    ),
                    ResultTable(
                        "ReconPruner minus each other method on the same samples",
                        tuple(found.rows),
                        (PAIRED,),
                        OTHERS,
                        "Paired bootstrap over scenes: below zero ReconPruner plans better; an "
                        "interval that excludes zero is unlikely to be chance.",
                    ),
                    Figure(
                        "planning_error",
                        ratio_curves(
                            curves(found.rows, HEADLINE, METHODS),
                            "L2 error [m]",
                            "Planning error by share of tokens kept",
                            ("unpruned", value_of(found.rows, "unpruned", 1.0, HEADLINE)),
                        ),
                        "Mean L2 error over the six waypoints, with 95% intervals.",
                    ),
                    Gallery(tuple(_plan_figures(found, shown)), 240),
                ),
            ),
            kept_section(found.rows),
            reconstruction_section(found.val, found.trained, run, found.history),
            Section(
                "Frame time",
                (
                    Figure(
                        "frame_time",
                        timing_bars(
                            {f"{ratio:.0%} kept": stages for ratio, stages in found.times.items()},
                            "One frame at batch 1",
                        ),
                        "Median milliseconds of each stage, measured side by side. The encoder "
                        "processes the whole image, so a pruner only shortens the stages after it.",
                    ),
                ),
            ),
            Section("The data", (_cameras(found),)),
            run_section(found.config, run, found.shards, found.bundle),
        ),
        rows=tuple(found.rows),
        meta=report_meta(found.config),
    )


def _world_cards(rows: Sequence[Row]) -> tuple[Card, ...]:
    base = value_of(rows, "unpruned", 1.0, HEADLINE)
    cards = [Card("planning error, unpruned", f"{base:.2f} m", "mean L2 of six waypoints")]
    for ratio in (0.5, 0.25):
        ours = value_of(rows, "reconpruner", ratio, HEADLINE)
        rivals = {n: value_of(rows, n, ratio, HEADLINE) for n in ("random", "uniform", "prior")}
        best = min(rivals, key=rivals.get)
        tone = "good" if ours < rivals[best] else "bad"
        note = f"best control: {best} {rivals[best]:.2f} m"
        cards.append(Card(f"error with {ratio:.0%} of the tokens", f"{ours:.2f} m", note, tone))
    cards.append(recall_card(rows, 0.25, "object_recall", "objects"))
    return tuple(cards)


def _telling_samples(found: WorldFindings, count: int = 6) -> np.ndarray:
    """Samples of different scenes where seeing matters most: unpruned good, no image bad."""
    blind, seeing = found.plans["no_image", None], found.plans["unpruned", 1.0]
    future = found.data.future
    gain = np.linalg.norm(blind - future, axis=-1).mean(1)
    gain = gain - 2 * np.linalg.norm(seeing - future, axis=-1).mean(1)
    chosen, scenes = [], set()
    for index in np.argsort(-gain):
        if found.data.scene[index] not in scenes:
            scenes.add(found.data.scene[index])
            chosen.append(index)
    return np.array(chosen[:count])


def _plan_figures(found: WorldFindings, shown: np.ndarray):
    for number, index in enumerate(shown):
        scores = found.scores[index]
        kept = np.asarray(top_k(scores[None], num_keep(len(scores), 0.25)))[0]
        yield Figure(
            f"sample_{number}",
            keep_overlay(found.data.images[index, 0], kept),
            "Kept by ReconPruner at 25%.",
            photo=True,
        )
        plans = {
            "unpruned": found.plans["unpruned", 1.0][index],
            "ReconPruner 25%": found.plans["reconpruner", 0.25][index],
            "random 25%": found.plans["random", 0.25][index],
            "no image": found.plans["no_image", None][index],
        }
        yield Figure(
            f"sample_{number}_plan",
            birds_eye(found.data.future[index], plans),
            "Plans from above, with the trajectory that was driven.",
        )


def _cameras(found: WorldFindings) -> Figure:
    cameras = found.shards.cameras
    images = np.asarray(found.val.images[: len(cameras)])
    return Figure("cameras", contact_sheet(images, cameras), "One key frame.", photo=True)
