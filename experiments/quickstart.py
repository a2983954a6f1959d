"""The whole path at a small size: pictures, shards, a trained pruner, a pruned plan, an export.

    fastdrive quickstart                 # the synthetic world, about 7 minutes on 2 CPU cores
    fastdrive quickstart --images DIR    # your own pictures with masks or label maps

Ends in OUT/report.html and OUT/report.json. Run again after an interruption: each stage goes on
from what is whole on the disk.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np

from data_pipelines.build import shards_of
from data_pipelines.features import SplitFeatures, cache_features
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.schema import CAMERAS, Classes
from data_pipelines.shards import Shards
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments.bench_frame import frame_times, timing_rows
from experiments.configs.pruner import TINY, PrunerRun
from experiments.encoders import frozen_vla
from experiments.measure_pruner import evaluate_pruner, score_split
from experiments.planning import PlanningSplit, planning_split, planning_table
from experiments.pruner_data import train_prior
from experiments.report_world import WorldFindings, world_report
from experiments.train_pruner import RunIdentity, train_pruner
from experiments.train_vla import TrainVLAConfig, train_vla
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.foreground import token_areas
from fastdrive_jax.evaluation.report import write_report
from fastdrive_jax.export.driving import read_policy, write_policy
from fastdrive_jax.inference.policy import plan
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla, save_vla
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.pruning.select import num_keep
from fastdrive_jax.training.run_config import claim_run_folder

RATIOS = (0.75, 0.5, 0.25)
RANDOM_DRAWS = 5


@dataclass(frozen=True)
class QuickstartConfig:
    """The quick start on the synthetic world.

    Attributes:
        out: Run folder; holds the data, the training run, the export and the report.
        world: The data set to generate.
        planning_scenes: Validation scenes to plan through the front camera, starting with those of
            `world`: plans vary far more from scene to scene than what is kept.
        pruner: Training of ReconPruner.
        vla_weights: Weights of a driving VLA that uses the front camera, from `train-vla` or
            `widen-vla`; None uses the bundled ones.
        train_vla: Train the driving VLA from scratch instead of using the bundled weights (about an
            hour more on 2 cores).
        vla: That training, with `train_vla`.
        keep_ratio: Keep ratio of the exported model, in (0, 1].
        quiet: No progress bars.
    """

    out: Path = Path("runs/quickstart")
    world: WorldConfig = field(default_factory=WorldConfig)
    planning_scenes: int = 240
    pruner: PrunerRun = TINY
    vla_weights: Path | None = None
    train_vla: bool = False
    vla: TrainVLAConfig = field(default_factory=TrainVLAConfig)
    keep_ratio: float = 0.5
    quiet: bool = False

    def __post_init__(self):
        num_keep(1000, self.keep_ratio)
        if min(self.world.train_scenes, self.world.val_scenes) < 1:
            raise UserError(
                f"world.train_scenes={self.world.train_scenes} and world.val_scenes="
                f"{self.world.val_scenes} must both be at least 1."
            )
        check_least(self, planning_scenes=1)
        if self.vla_weights and self.train_vla:
            raise UserError("vla_weights names a VLA and train_vla asks for a new one; give one.")
        if self.vla_weights and not self.vla_weights.is_file():
            raise UserError(f"{self.vla_weights} can't be read: there is no such file of weights.")
        if "CAM_FRONT" not in self.world.cameras:
            raise UserError("The driving VLA looks through CAM_FRONT; add it to world.cameras.")
        if self.vla.model.cameras != ("CAM_FRONT",):
            raise UserError(
                f"vla.model.cameras={self.vla.model.cameras} must be CAM_FRONT alone, from which "
                "the quick start plans."
            )
        if (self.world.height, self.world.width) != self.vla.model.image_size:
            raise UserError(
                f"world pictures of {self.world.height} x {self.world.width} do not fit the VLA's "
                f"{self.vla.model.image_size}; give both the same size."
            )
        width, tokens = self.pruner.recon.pruner.layer.hidden_size, self.vla.model.text.hidden_size
        if width != tokens:
            raise UserError(
                f"pruner.recon.pruner.layer.hidden_size={width} must be the size of the VLA's "
                f"tokens, {tokens}."
            )


@dataclass(frozen=True)
class WorldRun:
    """What the measurements of a quick start are of.

    Attributes:
        root: The data set in the nuScenes layout.
        shards: Of it.
        planned: Shards of the scenes that are planned.
        model: The driving VLA.
        params: Its parameters.
        train: Features of the training pictures.
        val: Features of the pictures that were not trained on.
        front: Features of the pictures that are planned from.
        trained: Parameters of ReconPruner's training.
        history: Of that training.
        prior: Mean training mask [cameras, N].
        run: Setting of ReconPruner's training.
    """

    root: Path
    shards: Shards
    planned: Shards
    model: DrivingVLA
    params: dict
    train: SplitFeatures
    val: SplitFeatures
    front: SplitFeatures
    trained: dict
    history: list
    prior: np.ndarray
    run: PrunerRun


def quickstart(config: QuickstartConfig) -> Path:
    """Runs all stages and returns the path of report.html."""
    say = announcer(config.quiet)
    world = prepare(config, say)
    root, shards, model, params = world.root, world.shards, world.model, world.params
    run, trained, history, prior = config.pruner, world.trained, world.history, world.prior
    val, front = world.val, world.front

    say("5/7", "measure what is kept, and the planning error")
    rows = evaluate_pruner(trained, run, val, prior, shards.classes)
    data = planning_split(world.planned, "val", front, model.config.image_size)
    scores = front_scores(trained, run, front, prior, shards.classes)
    planning, plans = planning_table(model, params, data, scores, RATIOS, quiet=config.quiet)
    rows += planning

    say("6/7", "export, reload and time")
    both = {"vla": params, "pruner": trained["pruner"]}
    bundle = config.out / "export"
    write_policy(bundle, both, model.config, run.recon.pruner, config.keep_ratio)
    check_export(bundle, both, data)
    pruner = make_pruner("reconpruner", config=run.recon.pruner)
    jpeg = front_jpeg(root, config.world)
    times, flops = frame_times(
        model, params, pruner, trained["pruner"], jpeg, (1.0, *RATIOS), repeats=20
    )
    rows += timing_rows(times, flops, 20)

    say("7/7", "report")
    findings = WorldFindings(
        config,
        shards,
        rows,
        history,
        times,
        data,
        scores["reconpruner"][0],
        plans,
        val,
        trained,
        bundle,
    )
    path = write_report(config.out, world_report(findings))
    say("done", f"open {path}")
    return path


def prepare(config: QuickstartConfig, say: Callable[[str, str], None]) -> WorldRun:
    """The first stages: the world, its shards and tokens, a trained ReconPruner."""
    say("1/7", "driving pictures in the nuScenes layout")
    root = generate(config.out / "world", config.world, progress=not config.quiet)
    roads = generate(config.out / "planning_world", _planning_world(config), not config.quiet)
    say("2/7", "shards")
    shards = shards_of(read_nuscenes(root), config.out / "shards", config.quiet)
    planned = shards_of(read_nuscenes(roads), config.out / "planning_shards", config.quiet)

    say("3/7", "driving VLA and its visual tokens")
    model, params = driving_vla(config)
    encoder = frozen_vla(model, params).tokens()
    features, planned_features = (
        cache_features(
            data,
            encoder,
            config.out / "features",
            batch_size=24,
            image_size=model.config.image_size,
            progress=not config.quiet,
        )
        for data in (shards, planned)
    )
    train, val = features.splits["train"], features.splits["val"]

    say("4/7", "train ReconPruner")
    trained, history = train_pruner(
        train,
        config.pruner,
        config.out / "pruner",
        quiet=config.quiet,
        identity=RunIdentity(config.pruner, encoder.digest, shards.digest),
    )
    return WorldRun(
        root=root,
        shards=shards,
        planned=planned,
        model=model,
        params=params,
        train=train,
        val=val,
        front=planned_features.splits["val"],
        trained=trained,
        history=history,
        prior=train_prior(train),
        run=config.pruner,
    )


def _planning_world(config: QuickstartConfig) -> WorldConfig:
    return replace(
        config.world, train_scenes=0, val_scenes=config.planning_scenes, cameras=("CAM_FRONT",)
    )


def driving_vla(config: QuickstartConfig) -> tuple[DrivingVLA, dict]:
    """The bundled VLA, one that was named, or one trained here."""
    if not config.train_vla:
        return load_vla(config.vla_weights, config.vla.model)
    weights = config.out / "vla.safetensors"
    # Weights that are there may be of another training, which their shapes do not tell.
    claim_run_folder(config.out / "vla" / "train", config.vla)
    if not weights.exists():
        params = train_vla(config.out / "vla", config.vla, config.quiet)
        save_vla(weights, params, config.vla.model.cameras)
    return load_vla(weights, config.vla.model)


def front_scores(
    trained: dict, run: PrunerRun, front: SplitFeatures, prior: np.ndarray, classes: Classes
) -> dict[str, list[np.ndarray]]:
    """Token scores [S, N] of every method on front pictures; random several times."""
    labels = np.asarray(front.labels)
    areas = token_areas(labels, classes.foreground, classes.objects, classes.ignore)

    def scores(name, params=None, seed=0, **settings):
        pruner = make_pruner(name, **settings)
        return np.asarray(score_split(pruner, params, front, areas, jax.random.key(seed)))

    return {
        "reconpruner": [scores("reconpruner", trained["pruner"], config=run.recon.pruner)],
        "random": [scores("random", seed=seed) for seed in range(RANDOM_DRAWS)],
        "uniform": [scores("uniform")],
        "prior": [scores("prior", prior)],
        "ground_truth": [scores("ground_truth")],
    }


def check_export(bundle: Path, params: dict, data: PlanningSplit, samples: int = 4) -> None:
    """Raises unless both exported forms plan bit for bit what the model in memory plans."""
    inputs = (data.images[:samples], data.speed[:samples], data.command[:samples])
    run = jax.jit(plan, static_argnums=0)
    for form in ("safetensors", "orbax"):
        policy, reloaded = read_policy(bundle, form)
        # From the host, so that arrays which lie otherwise on the device need no other program.
        expected, got = (run(policy, jax.device_get(x), *inputs) for x in (params, reloaded))
        for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
            if not np.array_equal(want, have):
                raise RuntimeError(f"the {form} export in {bundle} plans something else")


def front_jpeg(root: Path, world: WorldConfig) -> bytes:
    """One front picture as it lies on the disk."""
    camera = next(name for name in CAMERAS if name in world.cameras)
    return min((root / "samples" / camera).glob("*.jpg")).read_bytes()


def announcer(quiet: bool) -> Callable[[str, str], None]:
    """Prints (stage, text) as `[STAGE] TEXT`, or nothing."""

    def say(stage: str, text: str) -> None:
        if not quiet:
            print(f"[{stage}] {text}", flush=True)

    return say
