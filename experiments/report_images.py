"""The report of a run on a folder of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.features import SplitFeatures
from data_pipelines.shards import Shards
from experiments.configs.pruner import PrunerRun
from experiments.report_parts import (
    flipbook,
    kept_section,
    recall_card,
    reconstruction_section,
    report_meta,
    run_section,
    scores_of,
)
from fastdrive_jax.evaluation.report import Report
from fastdrive_jax.evaluation.results import Row, select
from fastdrive_jax.training.metrics_log import Record


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
    scores = scores_of(found.val, found.trained, found.run, np.array([middle]))
    was, now = tuple(found.shards.image_size), found.val.images.shape[1:3]
    resized = f" Images of {was[0]} x {was[1]} pixels were resized to {now[0]} x {now[1]}."
    cards = []
    for ratio in (0.5, 0.25):
        for metric, label in (("object_recall", "objects"), ("foreground_recall", "foreground")):
            if select(found.rows, method="reconpruner", keep_ratio=ratio, metric=metric):
                cards.append(recall_card(found.rows, ratio, metric, label))
    return Report(
        title=f"ReconPruner on {found.shards.name}",
        summary=(
            "A ReconPruner was trained by foreground and background reconstruction on tokens of a "
            "frozen DINOv2 ViT-S/14. The validation images were held out from training."
            + (resized if was != now else "")
        ),
        cards=tuple(cards),
        hero=flipbook(found.val.images[middle], scores[0], "hero"),
        sections=(
            kept_section(found.rows),
            reconstruction_section(found.val, found.trained, found.run, found.history),
            run_section(found.config, found.run, found.shards, found.bundle),
        ),
        rows=tuple(found.rows),
        meta=report_meta(found.config),
    )
