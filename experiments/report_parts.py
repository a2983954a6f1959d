"""Parts that the reports of the quick start share: what is kept, reconstruction, the run."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.features import SplitFeatures
from data_pipelines.shards import Shards
from experiments.configs.pruner import PrunerRun
from fastdrive_jax.configs import to_plain
from fastdrive_jax.evaluation.pictures import (
    keep_overlay,
    reconstruction_panel,
    score_map,
)
from fastdrive_jax.evaluation.plots import curves, loss_curves, ratio_curves
from fastdrive_jax.evaluation.report import (
    Card,
    Figure,
    Flipbook,
    Gallery,
    KeyValues,
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
ORACLE = Method("oracle", "oracle (tokens with most of it)", "reference")
KEPT_METRICS = (
    Metric("object_recall", "object area kept", better="higher", digits=1, percent=True),
    Metric("foreground_recall", "foreground area kept", better="higher", digits=1, percent=True),
    Metric(
        "foreground_precision", "foreground in kept tokens", better="higher", digits=1, percent=True
    ),
)
PICTURE_RATIOS = (0.5, 0.25, 0.75)


def value_of(rows: Sequence[Row], method: str, ratio: float | None, metric: str) -> float:
    """Mean over all rows of one method, ratio and metric (several seeds)."""
    return float(
        np.mean([row.value for row in select(rows, method=method, keep_ratio=ratio, metric=metric)])
    )


def recall_card(rows: Sequence[Row], ratio: float, metric: str, label: str) -> Card:
    """ReconPruner's recall at one ratio beside the position prior's."""
    ours, prior = (value_of(rows, name, ratio, metric) for name in ("reconpruner", "prior"))
    return Card(
        f"{label} kept in {ratio:.0%} of the tokens",
        f"{ours:.1%}",
        f"position prior {prior:.1%}",
        "good" if ours > prior else "bad",
    )


def flipbook(image: np.ndarray, scores: np.ndarray, name: str) -> Flipbook:
    """What top-k keeps of one picture at each ratio, and its scores."""
    figures, labels = [], []
    for ratio in PICTURE_RATIOS:
        kept = np.asarray(top_k(scores[None], num_keep(len(scores), ratio)))[0]
        figures.append(
            Figure(
                f"{name}_{round(100 * ratio)}",
                keep_overlay(image, kept),
                f"ReconPruner keeps {len(kept)} of {len(scores)} tokens.",
                photo=True,
            )
        )
        labels.append(f"{ratio:.0%}")
    figures.append(
        Figure(
            f"{name}_scores",
            score_map(image, scores),
            "Scores: dark tokens are dropped first.",
            photo=True,
        )
    )
    return Flipbook("Tokens kept", tuple(figures), (*labels, "scores"))


def kept_section(rows: Sequence[Row]) -> Section:
    """Table and curves of foreground and objects in the kept tokens."""
    kept = select(rows, method="reconpruner", metric=KEPT_METRICS[1].name)
    intervals = ", with 95% intervals" if any(row.low is not None for row in kept) else ""
    return Section(
        "What is kept",
        (
            ResultTable(
                "Foreground and objects in the kept tokens, validation images",
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
                        f"{metric.label.capitalize()}{intervals}.",
                    )
                    for metric in KEPT_METRICS[:2]
                    if curves(rows, metric.name, METHODS)  # without object ids there are none
                ),
                360,
            ),
        ),
    )


def reconstruction_section(
    val: SplitFeatures, trained: Any, run: PrunerRun, history: Sequence[Record]
) -> Section:
    """Reconstructions of three validation pictures beside their targets, and the loss."""
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
                "During training the scores split the tokens: one decoder reconstructs the "
                "foreground from the kept tokens and the background from the rest."
            ),
            Gallery(
                (
                    *(
                        Figure(
                            f"reconstruction_{number}",
                            panel,
                            "Targets and reconstructions, with half of the tokens on each side.",
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
    scores = scores_of(val, trained, run, chosen)
    kept = np.asarray(top_k(scores, num_keep(scores.shape[1], 0.5)))
    keep = np.zeros(scores.shape, np.float32)
    np.put_along_axis(keep, kept, 1.0, axis=1)
    fore, back = reconstruct(trained, tokens, keep, grid, run.recon)
    factor = TOKEN // run.recon.target_pixels
    for index, number in enumerate(chosen):
        large = [np.kron(np.asarray(x[index]), np.ones((factor, factor, 1))) for x in (fore, back)]
        yield reconstruction_panel(val.images[number], val.masks[number], *large)


def scores_of(val: SplitFeatures, trained: Any, run: PrunerRun, chosen: np.ndarray) -> np.ndarray:
    """ReconPruner's scores [len(chosen), N] of the chosen pictures."""
    grid = tuple(edge // TOKEN for edge in val.images.shape[1:3])
    inputs = PrunerInputs(
        tokens=np.asarray(val.tokens[chosen], np.float32),
        position_ids=grid_position_ids(len(chosen), grid),
        grid=grid,
    )
    pruner = make_pruner("reconpruner", config=run.recon.pruner)
    return np.asarray(pruner_scores(pruner, trained["pruner"], inputs))


def run_section(config: Any, run: PrunerRun, shards: Shards, bundle: Path) -> Section:
    """Data, export, device, versions and every field of the training."""
    pictures = {split: shards.records(split) for split in shards.samples}
    flat = _flatten(to_plain(run))
    return Section(
        "Run details",
        (
            KeyValues(
                {
                    "images": ", ".join(f"{split} {n}" for split, n in pictures.items()),
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


def report_meta(config: Any) -> dict[str, Any]:
    """What report.json keeps beside the rows."""
    return {"config": _flatten(_plain_paths(config)), "versions": _versions()}


def _plain_paths(config: Any) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
