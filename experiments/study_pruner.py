"""What each part of ReconPruner's objective does to what it keeps, over several seeds.

    fastdrive study-pruner --camvid DIR --out runs/study

Trains one small ReconPruner for each variant of `experiments.study_variants` and each seed, on
CamVid (DIR holds train/ and val/ with images/ and labels/) and on the synthetic world, and measures
it on pictures that it was not trained on. What is measured already is not trained again. Writes
OUT/camvid and OUT/synthetic, each with results.json and table.md.

It takes about 70 minutes on one CPU core. docs/study_pruner.md has the figures to expect.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.build import shards_of
from data_pipelines.features import (
    FeatureSet,
    SplitFeatures,
    TokenEncoder,
    cache_features,
    dino_encoder,
)
from data_pipelines.image_folder import read_image_folder
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.schema import Classes
from data_pipelines.shards import Shards
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments.configs.pruner import CAMVID, TINY, PrunerRun
from experiments.encoders import frozen_vla
from experiments.folder_digest import folder_digest
from experiments.measure_pruner import evaluate_pruner
from experiments.pruner_data import train_prior
from experiments.study_variants import Variant, bases, changes, chosen, runs_of
from experiments.train_pruner import train_pruner
from fastdrive_jax.configs import check_least, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.foreground import (
    FOREGROUND_RECALL,
    OBJECT_RECALL,
    TOKEN,
    foreground_rows,
    token_areas,
)
from fastdrive_jax.evaluation.markdown import markdown_table
from fastdrive_jax.evaluation.results import Row, point, read_rows, select, write_rows
from fastdrive_jax.files import write_text
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla
from fastdrive_jax.pruning.recon_pruner import ReconPruner
from fastdrive_jax.pruning.select import num_keep, top_k
from fastdrive_jax.training.reconstruction import (
    ReconConfig,
    grid_position_ids,
    init_params,
    recon_loss,
)
from fastdrive_jax.training.run_config import claim_run_folder

RATIOS = (0.75, 0.5, 0.25)
KEPT, COLLAPSED = "kept", "collapsed"
HALVES = ("fore", "back")
RECONSTRUCTION = tuple(f"{metric}_{half}" for metric in ("ssim", "mse") for half in HALVES)
CONTROLS = {"random": "random", "prior": "position prior", "oracle": "oracle"}
COLLAPSE = 0.02  # a mask that keeps less than this, or leaves out less, has nothing to tell
WORLD = WorldConfig(train_scenes=16, val_scenes=16, keyframes_per_scene=3, workers=1)
CAMVID_CLASSES = {"foreground": (3, 6, 8, 9, 10), "objects": (6, 8, 9, 10), "ignore": (11,)}
CAMVID_SIZE = (252, 336)  # 9 x 12 tokens; the pictures' own 360 x 480 take twice the time


@dataclass(frozen=True)
class StudyPrunerArgs:
    """Compare variants of ReconPruner's objective, one factor at a time.

    Attributes:
        out: Folder for data, features, runs and tables.
        data: Which data sets.
        camvid: Folder of CamVid, with train/ and val/.
        weights: DINOv2 weights for CamVid; None uses those of the extra "dino".
        world: The synthetic data set.
        variants: Names from `experiments.study_variants`; None runs all.
        seeds: Seeds; each variant is trained once with each.
        steps: Length of each training; None uses the study's.
        quiet: Print no progress lines.
    """

    out: Path = Path("runs/study")
    data: tuple[Literal["camvid", "synthetic"], ...] = ("camvid", "synthetic")
    camvid: Path | None = None
    weights: Path | None = None
    world: WorldConfig = field(default_factory=lambda: WORLD)
    variants: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    quiet: bool = False

    def __post_init__(self):
        chosen(self.variants)
        if unknown := [name for name in self.data if name not in DATA]:
            raise UserError(f"data={unknown[0]!r} must be one of {', '.join(DATA)}.")
        if "camvid" in self.data and self.camvid is None:
            raise UserError("The study on CamVid needs its folder: give --camvid DIR.")
        if not self.data or not self.seeds:
            raise UserError("The study needs at least one data set and one seed.")
        check_least(self, steps=2)


@dataclass(frozen=True)
class StudyData:
    """What is trained and measured on.

    Attributes:
        features: Tokens of the splits train and val.
        classes: Which labels count.
        tuned: The setting that stands as this data set's default.
    """

    features: FeatureSet
    classes: Classes
    tuned: PrunerRun

    @property
    def train(self) -> SplitFeatures:
        """What is trained on."""
        return self.features.splits["train"]

    @property
    def val(self) -> SplitFeatures:
        """What is measured on."""
        return self.features.splits["val"]


def study_pruner(args: StudyPrunerArgs) -> tuple[Path, ...]:
    """Runs the study and returns the paths of the tables, one a data set."""
    return tuple(study_on(name, args) for name in args.data)


def study_on(name: str, args: StudyPrunerArgs) -> Path:
    """The study on one data set; returns the path of its table."""
    folder = args.out / name
    data = DATA[name](args, folder)
    settings = bases(data.tuned, args.steps)
    runs = runs_of(chosen(args.variants), settings)
    rows = list(control_rows(data, settings["faithful"]))
    for number, (variant, run) in enumerate(runs):
        for seed in args.seeds:
            measured = variant_rows(variant, _seeded(run, seed), data, folder)
            rows += measured
            if not args.quiet:
                print(f"{name} {number + 1}/{len(runs)} {_line(measured, seed)}", flush=True)
    meta = {"runs": {variant.name: to_plain(run) for variant, run in runs}, "seeds": args.seeds}
    write_rows(folder / "results.json", rows, meta)
    caption = _caption(name, data, settings["tuned"], args.seeds)
    described = [(variant, changes(run, settings[variant.base])) for variant, run in runs]
    return write_text(folder / "table.md", study_table(caption, described, rows))


def camvid_data(args: StudyPrunerArgs, folder: Path) -> StudyData:
    """CamVid through DINOv2."""
    digest = folder_digest(args.camvid, *CAMVID_CLASSES.values())
    source = read_image_folder(args.camvid, **CAMVID_CLASSES)
    shards = shards_of(source, folder / f"shards-{digest}", True)
    features = cache_features(
        shards,
        dino_encoder(args.weights),
        folder / "features",
        image_size=CAMVID_SIZE,
        progress=not args.quiet,
    )
    return _data(shards, features, CAMVID)


def synthetic_data(args: StudyPrunerArgs, folder: Path) -> StudyData:
    """A synthetic world through the vision encoder of the bundled driving VLA."""
    root = generate(folder / "world", args.world, progress=not args.quiet)
    shards = shards_of(read_nuscenes(root), folder / "shards", True)
    features = cache_features(
        shards,
        vla_tokens(),
        folder / "features",
        batch_size=24,
        progress=not args.quiet,
    )
    return _data(shards, features, TINY)


def vla_tokens() -> TokenEncoder:
    """The vision encoder of the bundled driving VLA."""
    return frozen_vla(*load_vla()).tokens()


def _data(shards: Shards, features: FeatureSet, tuned: PrunerRun) -> StudyData:
    if missing := {"train", "val"} - set(features.splits):
        raise UserError(f"The data has no split {' and '.join(sorted(missing))}.")
    return StudyData(features, shards.classes, tuned)


DATA: dict[str, Callable[[StudyPrunerArgs, Path], StudyData]] = {
    "camvid": camvid_data,
    "synthetic": synthetic_data,
}


def control_rows(data: StudyData, run: PrunerRun) -> tuple[Row, ...]:
    """Recalls of what needs no training."""
    shapes = jax.eval_shape(partial(init_params, run.recon), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # not looked at
    rows = evaluate_pruner(params, run, data.val, train_prior(data.train), data.classes, RATIOS)
    return tuple(row for row in rows if row.method in CONTROLS)


def variant_rows(variant: Variant, run: PrunerRun, data: StudyData, folder: Path) -> Sequence[Row]:
    """The rows of one training, from the disk if they are there.

    Raises:
        UserError: The folder holds a run of another setting or other data by this name.
    """
    workdir = folder / "runs" / f"{variant.name}-seed{run.seed}"
    claim_run_folder(workdir, run)
    path, features = workdir / "rows.json", data.features.path.name
    if path.exists():
        rows, meta = read_rows(path)
        if meta["features"] != features:
            raise UserError(f"{path} is of other data: use a new folder.")
        return rows
    params, _ = train_pruner(data.train, run, workdir / "train", quiet=True)
    rows = measure(variant.name, params, run, data)
    write_rows(path, rows, {"features": features})
    shutil.rmtree(workdir / "train" / "checkpoints", ignore_errors=True)  # 200 would fill a disk
    return rows


def measure(method: str, params: dict, run: PrunerRun, data: StudyData) -> list[Row]:
    """Recalls at the ratios, share kept by the sign mask, and reconstruction, on `val`.

    The reconstruction is that of the variant's own training mask and targets, with one SSIM for
    all; a variant that paints nothing has none. A mask that is no sign mask cannot collapse.
    """
    val = data.val
    scores, painted = _apply(params, val, run)
    labels, classes = np.asarray(val.labels), data.classes
    areas = token_areas(labels, classes.foreground, classes.objects, classes.ignore)
    rows: list[Row] = []
    for ratio in RATIOS:
        kept = np.asarray(top_k(jnp.asarray(scores), num_keep(scores.shape[1], ratio)))
        rows += foreground_rows(method, ratio, areas, kept, val.scene, run.seed)

    def add(metric: str, value: float) -> None:
        rows.append(point(method, None, metric, value, n=len(scores), seed=run.seed))

    kept = float((scores > 0).mean())
    add(KEPT, kept)
    if run.recon.mask_mode == "sign":
        add(COLLAPSED, float(not COLLAPSE <= kept <= 1 - COLLAPSE))
    for metric, value in painted.items():
        add(metric, value)
    return rows


def _apply(
    params: dict, val: SplitFeatures, run: PrunerRun, batch_size: int = 48
) -> tuple[np.ndarray, dict[str, float]]:
    """Scores [M, N] of a split, and the mean of each reconstruction metric."""
    config = replace(
        run.recon,
        mask_weight=0.0 if run.recon.pixel_weight else 1.0,
        mask_surprise=0.0,
        budget_weight=0.0,
        ssim_weight=ReconConfig.ssim_weight,
        ssim_window=ReconConfig.ssim_window,
    )
    scores, sums = [], dict.fromkeys(RECONSTRUCTION, 0.0)
    for start in range(0, len(val.tokens), batch_size):
        part = slice(start, start + batch_size)
        batch = {
            "tokens": jnp.asarray(val.tokens[part], jnp.float32),
            "image": jnp.asarray(val.images[part]),
            "mask": jnp.asarray(val.masks[part]),
        }
        key = jax.random.fold_in(jax.random.key(0), start)  # the same budgets for all variants
        found, metrics = _forward(params, batch, key, config)
        scores.append(np.asarray(found))
        for name in RECONSTRUCTION:
            sums[name] += float(metrics.get(name, 0.0)) * len(found)
    scores = np.concatenate(scores)
    if not run.recon.pixel_weight:
        return scores, {}
    return scores, {name: value / len(scores) for name, value in sums.items()}


@partial(jax.jit, static_argnames="config")
def _forward(params, batch, key, config):
    grid = tuple(side // TOKEN for side in batch["image"].shape[1:3])
    ids = grid_position_ids(len(batch["tokens"]), grid)
    scores = ReconPruner(config.pruner).apply({"params": params["pruner"]}, batch["tokens"], ids)
    return scores, recon_loss(params, batch, key, config=config)[1]


def study_table(caption: str, described: Iterable[tuple[Variant, str]], rows: Sequence[Row]) -> str:
    """Markdown: a line a variant, the mean of its seeds and in brackets the lowest and highest.

    Args:
        caption: Stands above.
        described: Variants and what each changes.
        rows: Of `variant_rows` and `control_rows`.
    """
    recalls = [(metric, ratio) for metric in (FOREGROUND_RECALL, OBJECT_RECALL) for ratio in RATIOS]
    heads = [f"{metric.split('_')[0]} recall {ratio:.0%}" for metric, ratio in recalls]
    heads = ["variant", "change", *heads, "kept", "collapsed", "SSIM", "MSE"]
    lines = []
    for name, label in CONTROLS.items():
        cells = [_cell(select(rows, method=name, metric=m, keep_ratio=r)) for m, r in recalls]
        lines.append([label, "", *cells, "", "", "", ""])
    described = list(described)
    for variant, change in described:
        own = select(rows, method=variant.name)
        cells = [_cell(select(own, metric=m, keep_ratio=r)) for m, r in recalls]
        collapsed = [row.value for row in select(own, metric=COLLAPSED)]
        count = f"{sum(collapsed):.0f} of {len(collapsed)}" if collapsed else ""
        painted = [_halves(own, name) for name in ("ssim", "mse")]
        kept = _cell(select(own, metric=KEPT))
        label = variant.name if change else f"**{variant.name}**"
        lines.append([label, change and f"`{change}`", *cells, kept, count, *painted])
    reasons = [f"- {variant.name}: {variant.reason}." for variant, _ in described]
    return "\n".join([caption, "", *markdown_table(heads, lines), "", *reasons, ""])


def _cell(rows: Sequence[Row], scale: float = 100.0, digits: int = 1) -> str:
    """Mean over the seeds with their range, in percent; the figure alone if there is one."""
    values = [scale * row.value for row in rows]
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def _halves(rows: Sequence[Row], metric: str) -> str:
    """Foreground and background means of a reconstruction metric."""
    parts = [[row.value for row in select(rows, metric=f"{metric}_{half}")] for half in HALVES]
    return " / ".join(f"{np.mean(part):.3f}" for part in parts) if all(parts) else ""


def _caption(name: str, data: StudyData, run: PrunerRun, seeds: Sequence[int]) -> str:
    (rows, columns), decoder = data.features.grid, run.recon.decoder
    return (
        f"{name}: {len(data.train.tokens)} pictures to train and {len(data.val.tokens)} to "
        f"measure, {rows} x {columns} tokens, {run.optimizer.total_steps} steps of "
        f"{run.loader.batch_size} pictures, decoder of {decoder.num_layers} layers of "
        f"{decoder.hidden_size}, {run.recon.target_pixels} target pixels a token, seeds "
        f"{', '.join(map(str, seeds))}. Percent; mean of the seeds, in brackets the lowest and "
        f"highest. kept: tokens that score above 0. collapsed: seeds whose sign mask keeps below "
        f"{COLLAPSE:.0%} or above {1 - COLLAPSE:.0%}. SSIM and MSE are of the foreground and the "
        "background picture."
    )


def _seeded(run: PrunerRun, seed: int) -> PrunerRun:
    return replace(run, seed=seed, loader=replace(run.loader, seed=seed))


def _line(rows: Sequence[Row], seed: int) -> str:
    half = " ".join(
        f"{metric} {_cell(select(rows, metric=metric, keep_ratio=0.5))}"
        for metric in (FOREGROUND_RECALL, OBJECT_RECALL)
    )
    return f"{rows[0].method} seed {seed}: {half} kept {_cell(select(rows, metric=KEPT))}"
