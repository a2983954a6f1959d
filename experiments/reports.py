"""The quick start's findings laid out as a report."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.features import SplitFeatures
from data_pipelines.shards import Shards
from experiments.configs.pruner import PrunerRun
from experiments.planning import HEADLINE, PlanningSplit
from fastdrive_jax.configs import to_plain
from fastdrive_jax.evaluation.pictures import (
    contact_sheet,
    keep_overlay,
    reconstruction_panel,
    score_map,
)
from fastdrive_jax.evaluation.plots import birds_eye, curves, loss_curves, ratio_curves, timing_bars
from fastdrive_jax.evaluation.report import (
    Card,
    Figure,
    Flipbook,
    Gallery,
    KeyValues,
    Report,
    Section,
    Text,
)
from fastdrive_jax.evaluation.results import Row, select
from fastdrive_jax.evaluation.tables import Method, Metric, ResultTable
from fastdrive_jax.pruning import PrunerInputs, make_pruner, pruner_scores
from fastdrive_jax.pruning.select import num_keep, top_k
from fastdrive_jax.training.metrics_log import Record
from fastdrive_jax.training.reconstruction import TOKEN, grid_position_ids, reconstruct

METHODS = (
    Method("reconpruner", "ReconPruner"),
    Method("random", "random", "control"),
    Method("uniform", "uniform grid", "control"),
    Method("prior", "position prior", "control"),
    Method("ground_truth", "ground-truth mask", "reference"),
)
UNPRUNED = Method("unpruned", "unpruned", "reference")
NO_IMAGE = Method("no_image", "no image", "reference")
ORACLE = Method("oracle", "most that is possible", "reference")
KEPT_METRICS = (
    Metric("object_recall", "object area kept", better="higher", digits=1, percent=True),
    Metric("foreground_recall", "foreground area kept", better="higher", digits=1, percent=True),
    Metric(
        "foreground_precision", "foreground in kept tokens", better="higher", digits=1, percent=True
    ),
)
PLAN_METRICS = (
    Metric(HEADLINE, "L2 error, mean of six waypoints", "m"),
    Metric("l2_temavg", "L2 error, mean of 1-3 s as published", "m"),
    Metric("fde", "L2 error at 3 s", "m"),
)
PICTURE_RATIOS = (0.5, 0.25, 0.75)


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
            "driving world and put in front of a tiny driving VLA that was not retrained. Below: "
            "what it keeps, and what that does to the plan."
        ),
        cards=_world_cards(found.rows),
        hero=_flipbook(found.data.images[first], found.scores[first], "hero"),
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
                    Figure(
                        "planning_error",
                        ratio_curves(
                            curves(found.rows, HEADLINE, METHODS),
                            "L2 error [m]",
                            "Planning error and tokens kept",
                            ("unpruned", _value(found.rows, "unpruned", 1.0, HEADLINE)),
                        ),
                        "Mean L2 error over the six waypoints, with 95% intervals.",
                    ),
                    Gallery(tuple(_plan_figures(found, shown)), 240),
                ),
            ),
            _kept_section(found.rows),
            _reconstruction_section(found.val, found.trained, run, found.history),
            Section(
                "Time of a frame",
                (
                    Figure(
                        "frame_time",
                        timing_bars(
                            {f"{ratio:.0%} kept": stages for ratio, stages in found.times.items()},
                            "One frame at batch 1",
                        ),
                        "Median milliseconds of each stage, measured side by side. The encoder "
                        "sees the whole picture, so a pruner behind it can only save what follows.",
                    ),
                ),
            ),
            Section("The data", (_cameras(found),)),
            _run_section(found.config, run, found.shards, found.bundle),
        ),
        rows=tuple(found.rows),
        meta=_meta(found.config),
    )


@dataclass(frozen=True)
class ImageFindings:
    """All that a run on a folder of pictures found; fields as in `WorldFindings`."""

    config: Any
    run: PrunerRun
    shards: Shards
    rows: Sequence[Row]
    history: Sequence[Record]
    val: SplitFeatures
    trained: Any
    bundle: Path


def image_report(found: ImageFindings) -> Report:
    """The report of a run on a folder of pictures."""
    middle = len(found.val.images) // 2
    scores = _scores(found.val, found.trained, found.run, np.array([middle]))
    cards = []
    for ratio in (0.5, 0.25):
        for metric, label in (("object_recall", "objects"), ("foreground_recall", "foreground")):
            if select(found.rows, method="reconpruner", keep_ratio=ratio, metric=metric):
                cards.append(_recall_card(found.rows, ratio, metric, label))
    return Report(
        title=f"ReconPruner on {found.shards.name}",
        summary=(
            "A ReconPruner was trained by foreground and background reconstruction on tokens of a "
            "frozen DINOv2 ViT-S/14. Validation pictures were not trained on."
        ),
        cards=tuple(cards),
        hero=_flipbook(found.val.images[middle], scores[0], "hero"),
        sections=(
            _kept_section(found.rows),
            _reconstruction_section(found.val, found.trained, found.run, found.history),
            _run_section(found.config, found.run, found.shards, found.bundle),
        ),
        rows=tuple(found.rows),
        meta=_meta(found.config),
    )


def _value(rows: Sequence[Row], method: str, ratio: float | None, metric: str) -> float:
    return float(
        np.mean([row.value for row in select(rows, method=method, keep_ratio=ratio, metric=metric)])
    )


def _recall_card(rows: Sequence[Row], ratio: float, metric: str, label: str) -> Card:
    ours, prior = (_value(rows, name, ratio, metric) for name in ("reconpruner", "prior"))
    return Card(
        f"{label} kept in {ratio:.0%} of the tokens",
        f"{ours:.1%}",
        f"position prior {prior:.1%}",
        "good" if ours > prior else "bad",
    )


def _world_cards(rows: Sequence[Row]) -> tuple[Card, ...]:
    base = _value(rows, "unpruned", 1.0, HEADLINE)
    cards = [Card("planning error, unpruned", f"{base:.2f} m", "mean L2 of six waypoints")]
    for ratio in (0.5, 0.25):
        ours = _value(rows, "reconpruner", ratio, HEADLINE)
        rivals = {n: _value(rows, n, ratio, HEADLINE) for n in ("random", "uniform", "prior")}
        best = min(rivals, key=rivals.get)
        tone = "good" if ours < rivals[best] else "bad"
        note = f"best control: {best} {rivals[best]:.2f} m"
        cards.append(Card(f"error with {ratio:.0%} of the tokens", f"{ours:.2f} m", note, tone))
    cards.append(_recall_card(rows, 0.25, "object_recall", "objects"))
    return tuple(cards)


def _flipbook(image: np.ndarray, scores: np.ndarray, name: str) -> Flipbook:
    figures, labels = [], []
    for ratio in PICTURE_RATIOS:
        kept = np.asarray(top_k(scores[None], num_keep(len(scores), ratio)))[0]
        figures.append(
            Figure(
                f"{name}_{round(100 * ratio)}",
                keep_overlay(image, kept),
                f"What ReconPruner keeps of {len(scores)} tokens: {len(kept)}.",
                photo=True,
            )
        )
        labels.append(f"{ratio:.0%}")
    figures.append(
        Figure(
            f"{name}_scores", score_map(image, scores), "Scores: dark is dropped first.", photo=True
        )
    )
    return Flipbook("Tokens kept", tuple(figures), (*labels, "scores"))


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
            keep_overlay(found.data.images[index], kept),
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
            "Its plans from above, beside what was driven.",
        )


def _kept_section(rows: Sequence[Row]) -> Section:
    return Section(
        "What is kept",
        (
            ResultTable(
                "Foreground and objects in the kept tokens, validation pictures",
                tuple(rows),
                KEPT_METRICS,
                (*METHODS, ORACLE),
                "Recall is weighted by area: the share of all foreground (or object) pixels that "
                "lies in kept tokens. The position prior is the mean training mask of each camera.",
            ),
            Gallery(
                tuple(
                    Figure(
                        metric.name,
                        ratio_curves(curves(rows, metric.name, METHODS), metric.label),
                        f"{metric.label.capitalize()}, with 95% intervals.",
                    )
                    for metric in KEPT_METRICS[:2]
                ),
                360,
            ),
        ),
    )


def _reconstruction_section(
    val: SplitFeatures, trained: Any, run: PrunerRun, history: Sequence[Record]
) -> Section:
    train = [record for record in history if record["kind"] == "train"]
    steps = [record["step"] for record in train]
    names = {"loss": "total", "loss_fore": "foreground", "loss_back": "background"}
    series = {text: (steps, [r[name] for r in train]) for name, text in names.items()}
    chosen = np.linspace(0, len(val.images) - 1, 5).astype(int)[1:4]
    panels = _panels(val, trained, run, chosen)
    return Section(
        "Reconstruction",
        (
            Text(
                "In training the scores split the tokens: one decoder paints the foreground from "
                "those that are kept and the background from the rest."
            ),
            Gallery(
                (
                    *(
                        Figure(
                            f"reconstruction_{number}",
                            panel,
                            "Targets and reconstructions, half of the tokens on each side.",
                            photo=True,
                        )
                        for number, panel in enumerate(panels)
                    ),
                    Figure("loss", loss_curves(series, "Training loss", smooth=9), "Loss."),
                ),
                360,
            ),
        ),
    )


def _panels(val: SplitFeatures, trained: Any, run: PrunerRun, chosen: np.ndarray):
    tokens = np.asarray(val.tokens[chosen], np.float32)
    grid = tuple(edge // TOKEN for edge in val.images.shape[1:3])
    scores = _scores(val, trained, run, chosen)
    kept = np.asarray(top_k(scores, num_keep(scores.shape[1], 0.5)))
    keep = np.zeros(scores.shape, np.float32)
    np.put_along_axis(keep, kept, 1.0, axis=1)
    fore, back = reconstruct(trained, tokens, keep, grid, run.recon)
    factor = TOKEN // run.recon.target_pixels
    for index, number in enumerate(chosen):
        large = [np.kron(np.asarray(x[index]), np.ones((factor, factor, 1))) for x in (fore, back)]
        yield reconstruction_panel(val.images[number], val.masks[number], *large)


def _scores(val: SplitFeatures, trained: Any, run: PrunerRun, chosen: np.ndarray) -> np.ndarray:
    grid = tuple(edge // TOKEN for edge in val.images.shape[1:3])
    inputs = PrunerInputs(
        tokens=np.asarray(val.tokens[chosen], np.float32),
        position_ids=grid_position_ids(len(chosen), grid),
        grid=grid,
    )
    pruner = make_pruner("reconpruner", config=run.recon.pruner)
    return np.asarray(pruner_scores(pruner, trained["pruner"], inputs))


def _cameras(found: WorldFindings) -> Figure:
    cameras = found.shards.cameras
    images = np.asarray(found.val.images[: len(cameras)])
    return Figure("cameras", contact_sheet(images, cameras), "One key frame.", photo=True)


def _run_section(config: Any, run: PrunerRun, shards: Shards, bundle: Path) -> Section:
    pictures = {split: shards.records(split) for split in shards.samples}
    flat = _flatten(to_plain(run))
    return Section(
        "What was run",
        (
            KeyValues(
                {
                    "pictures": ", ".join(f"{split} {n}" for split, n in pictures.items()),
                    "exported model": f"{bundle} (model.safetensors, orbax/, config.json)",
                    "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
                    **_versions(),
                }
            ),
            KeyValues(flat),
        ),
    )


def _flatten(plain: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in plain.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _versions() -> dict[str, str]:
    names = ("fastdrive-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
    return {name: version(name) for name in names}


def _meta(config: Any) -> dict[str, Any]:
    return {"config": _flatten(_plain_paths(config)), "versions": _versions()}


def _plain_paths(config: Any) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
