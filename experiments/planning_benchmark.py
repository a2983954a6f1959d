"""A benchmark of planning that anyone can rerun: the synthetic world and the VLA of the package.

The VLA sees no past, so vision matters: without a picture it plans far worse. Training scenes teach
ReconPruners, one for each seed, and the ego-history control; the validation scenes are unseen by
all of them and by the VLA.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from data_pipelines.build import shards_of
from data_pipelines.features import cache_features
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.schema import CAMERAS
from data_pipelines.shards import Shards, sample_tokens
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from data_pipelines.synthetic.truth import world_truth
from experiments.configs.pruner import TINY, PrunerRun
from experiments.drives import (
    UNPRUNED,
    Drives,
    Trained,
    drive,
    drives_from,
    is_drawn,
    label,
    method_of,
)
from experiments.encoders import frozen_vla
from experiments.planned import Case, Planned, Setting
from experiments.planning import PlanningSplit, plan_split, planning_split
from experiments.pruner_data import train_prior
from experiments.train_pruner import RunIdentity, train_pruner
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.truth import DrivingTruth
from fastdrive_jax.inference.policy import DrivingPolicy
from fastdrive_jax.models.dinov2.weights import params_digest
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.parallel.mesh import make_mesh, shard_where_it_divides
from fastdrive_jax.pruning import builds_on_recon
from fastdrive_jax.training.ego_history import (
    EgoHistoryConfig,
    EgoSamples,
    constant_velocity,
    fit_ego_history,
)

FRONT = ("CAM_FRONT",)
DRIVEN = "driven"  # the driven way itself: what its protocol counts of it is a floor
CONTROLS = ("no_image", "ego_history", "constant_velocity", DRIVEN)  # without tokens


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is planned, and by which VLA.

    Attributes:
        cameras: Cameras of the VLA: the front one, or all six, of which the front one shows what
            decides the plan.
        vla: Weights for these cameras, from `fastdrive train-vla` or `widen-vla`; None uses the
            package's.
        train_scenes: Scenes that ReconPruners and the ego-history control are trained on.
        scenes: Scenes to plan, of six frames each.
        world_seed: Seed of the data set.
        pruner: Training of ReconPruner; its seed is replaced.
        seeds: Seeds of the trainings.
    """

    cameras: Literal["one", "six"] = "one"
    vla: Path | None = None
    train_scenes: int = 160
    scenes: int = 334
    world_seed: int = 0
    pruner: PrunerRun = TINY
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self):
        if self.train_scenes < 2 or self.scenes < 2:
            raise UserError(
                f"train_scenes={self.train_scenes} and scenes={self.scenes} must be at least 2."
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"seeds={self.seeds} must be one or more different numbers.")


@dataclass(frozen=True)
class Benchmark:
    """All that the settings of an evaluation share.

    Attributes:
        model: The VLA.
        params: Its parameters.
        drives: What is planned.
        truth: Of the same samples, in their order.
        trained: A training for each of `seeds`.
        seeds: Of the trainings.
        train: Plans to learn from, without pictures.
        shards: What is planned.
    """

    model: DrivingVLA
    params: dict
    drives: Drives
    truth: DrivingTruth
    trained: tuple[Trained, ...]
    seeds: tuple[int, ...]
    train: PlanningSplit
    shards: Shards


def prepare_benchmark(out: Path, config: BenchmarkConfig, quiet: bool) -> Benchmark:
    """Two worlds, their shards and tokens, and the trainings; what is in `out` is taken."""
    cameras = CAMERAS if config.cameras == "six" else FRONT
    model, params = load_vla(config.vla, DrivingConfig(cameras=cameras))
    height, width = model.config.image_size
    world = WorldConfig(
        seed=config.world_seed,
        train_scenes=config.train_scenes,
        val_scenes=0,
        height=height,
        width=width,
    )
    encoder = frozen_vla(model, params).tokens()

    def stage(name: str, world: WorldConfig):
        root = generate(out / f"{name}_world", world, progress=not quiet)
        shards = shards_of(read_nuscenes(root), out / f"{name}_shards", quiet)
        features = cache_features(
            shards,
            encoder,
            out / "features",
            batch_size=24,
            image_size=model.config.image_size,
            progress=not quiet,
        )
        return root, shards, features

    _, train_shards, train_features = stage("train", world)
    unseen = replace(world, train_scenes=0, val_scenes=config.scenes, cameras=cameras)
    root, shards, features = stage(f"val_{config.cameras}", unseen)
    train = train_features.splits["train"]
    prior = train_prior(train)[[train_shards.cameras.index(name) for name in cameras]]
    trained = []
    for seed in config.seeds:
        run = replace(config.pruner, seed=seed, loader=replace(config.pruner.loader, seed=seed))
        identity = RunIdentity(run, encoder.digest, train_shards.digest)
        found, _ = train_pruner(train, run, out / f"pruner_{seed}", quiet, identity=identity)
        trained.append(Trained(run.recon.pruner, jax.device_get(found["pruner"]), prior))
    size = model.config.image_size
    data = planning_split(shards, "val", features.splits["val"], size, cameras)
    truth = world_truth(root, unseen, "val").at(sample_tokens(shards, "val"))
    return Benchmark(
        model=model,
        params=params,
        drives=drives_from(data, shards.classes),
        truth=truth,
        trained=tuple(trained),
        seeds=config.seeds,
        train=planning_split(train_shards, "train", train, size),
        shards=shards,
    )


def benchmark_case(
    bench: Benchmark,
    methods: Sequence[str],
    ratios: Sequence[float],
    draws: int,
    scenes: int,
) -> Case:
    """The benchmark with every control, for `eval_planning`.

    Args:
        bench: Of `prepare_benchmark`.
        methods: Names, or FILE.py:FUNCTION.
        ratios: Keep ratios.
        draws: Of methods that draw.
        scenes: Driven at once.
    """
    seeds = bench.seeds
    settings = [Setting(name, None, None, name) for name in CONTROLS]
    settings.insert(0, Setting(UNPRUNED, 1.0, None, UNPRUNED))
    for ratio in ratios:
        for name in methods:
            own = seeds if _is_trained(name) else range(draws) if is_drawn(name) else (None,)
            settings += [Setting(label(name), ratio, seed, name) for seed in own]
    data, config = bench.drives.data, bench.model.config
    own = {f"training-{k}": one.pruner for k, one in zip(seeds, bench.trained, strict=True)}
    return Case(
        title=f"the synthetic world, {len(config.cameras)} camera(s)",
        truth=bench.truth,
        command=data.command,
        settings=tuple(settings),
        plan=partial(_plan, bench, scenes, functools.cache(partial(_ego_history, bench))),
        view=lambda sample: np.asarray(data.images[sample]),
        cameras=config.cameras,
        grid=config.token_grid,
        weights={
            **{name: params_digest(one) for name, one in {"vla": bench.params, **own}.items()},
            "shards": bench.shards.digest,
        },
        meta={
            "visual_tokens": config.visual_tokens,
            "layers": config.text.num_layers,
            "training_seeds": list(seeds),
            "shards": bench.shards.digest,
        },
        notes=(
            f"{len(bench.truth)} frames of {len(bench.drives.frames)} scenes that neither the VLA "
            "nor a pruner was trained on. The VLA is given images, speed and command, but no past: "
            "without an image it cannot know what lies ahead.",
            f"Trained methods are means over {len(seeds)} trainings, methods that draw random "
            f"numbers over {draws} draws, sample by sample.",
        ),
    )


def _plan(
    bench: Benchmark, scenes: int, ego_history: Callable, setting: Setting, rows: np.ndarray
) -> Planned:
    """Plans of whole scenes in one setting."""
    data = bench.drives.data
    steps = data.future.shape[1]
    if setting.name == "constant_velocity":
        return _without_tokens(constant_velocity(data.speed[rows], steps))
    if setting.name == "ego_history":
        model, params = ego_history()
        plan = jax.jit(model.apply)
        return _without_tokens(np.asarray(plan(params, _ego_samples(data, rows))))
    if setting.name == DRIVEN:
        return _without_tokens(bench.truth.future[rows])
    if setting.name == "no_image":
        part = replace(
            data,
            tokens=np.zeros((len(rows), *data.tokens.shape[1:]), np.float32),
            speed=data.speed[rows],
            command=data.command[rows],
        )
        none = np.zeros((len(rows), 0), np.int32)
        return _without_tokens(plan_split(bench.model, bench.params, part, none))
    # The prior is the same in all trainings; a draw's number is none of a training.
    number = bench.seeds.index(setting.seed) if _is_trained(setting.name) else 0
    pruner, weights = method_of(setting.name, bench.trained[number])
    policy = DrivingPolicy(bench.model, pruner, setting.ratio)
    frames = bench.drives.frames
    part = replace(bench.drives, frames=frames[np.isin(frames[:, 0], rows)])
    mesh = make_mesh(devices=jax.local_devices())
    waypoints, kept = drive(
        policy,
        {"vla": bench.params, "pruner": weights},
        part,
        scenes,
        setting.seed or 0,
        cached=True,
        place=lambda batch: shard_where_it_divides(batch, mesh),
    )
    return Planned(waypoints, kept, np.ones(len(rows), bool))


def _is_trained(name: str) -> bool:
    return name != UNPRUNED and builds_on_recon(name)


def _without_tokens(waypoints: np.ndarray) -> Planned:
    count = len(waypoints)
    return Planned(waypoints, np.zeros((count, 0), np.int32), np.ones(count, bool))


def _ego_samples(data: PlanningSplit, rows) -> EgoSamples:
    return EgoSamples(
        data.ego_state[rows], data.command[rows], data.history[rows], data.history_valid[rows]
    )


def _ego_history(bench: Benchmark):
    train = bench.train
    rows = np.arange(len(train.speed))
    given = _ego_samples(train, rows), train.future, train.future_valid, train.scene
    return fit_ego_history(EgoHistoryConfig(), *given)
