"""Train the tiny driving VLA from nothing on the synthetic world.

    fastdrive train-vla --out runs/vla

Writes a data set of one front camera and its shards, and trains vision encoder and decoder
together. These are the weights that the package carries.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from data_pipelines.augment import ColorJitter
from data_pipelines.build import build_shards
from data_pipelines.loader import LoaderConfig, make_loader
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.shards import Shards, open_shards
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from fastdrive_jax.inference.generate import generate as generate_plan
from fastdrive_jax.models.qwen2_5_vl.bundled import save_vla
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA, visual_positions
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.training.driving import (
    DrivingLossConfig,
    driving_loss,
    init_driving,
)
from fastdrive_jax.training.loop import fit
from fastdrive_jax.training.optimizer import OptimizerConfig, make_optimizer
from fastdrive_jax.training.state import init_train_state, make_train_step


@dataclass(frozen=True)
class TrainVLAConfig:
    """A training run of the tiny VLA.

    Attributes:
        world: The data set to generate and train on.
        model: The VLA.
        loss: Weights of the parts of the loss.
        optimizer: AdamW and its schedule; total_steps is the length of the run.
        batch_size: Samples per step.
        seed: Seed of parameters and data order.
    """

    world: WorldConfig = field(
        default_factory=lambda: WorldConfig(
            seed=1, train_scenes=1680, val_scenes=63, cameras=("CAM_FRONT",)
        )
    )
    model: DrivingConfig = field(default_factory=DrivingConfig)
    loss: DrivingLossConfig = field(default_factory=DrivingLossConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1.5e-3,
            warmup_steps=100,
            total_steps=6000,
            weight_decay=0.02,
            clip_norm=1.0,
        )
    )
    batch_size: int = 16
    seed: int = 0


def loader_config(config: TrainVLAConfig, train: bool) -> LoaderConfig:
    """Training batches are flipped and jittered; validation ones come once, in order."""
    return LoaderConfig(
        batch_size=config.batch_size,
        image_size=config.model.image_size,
        cameras=config.model.cameras,
        group="sample",
        shuffle=train,
        seed=config.seed,
        num_epochs=None if train else 1,
        flip=train and config.model.cameras == ("CAM_FRONT",),
        jitter=ColorJitter(0.2, 0.2, 0.2) if train else ColorJitter(),
        remainder="drop" if train else "keep",
        fields=("image", "labels", "speed", "command", "future"),
    )


def planning_error(model: DrivingVLA, config: TrainVLAConfig, shards: Shards) -> Callable:
    """Mean L2 over all waypoints of the validation split in metres, a function of VLA params."""
    plan = jax.jit(plan_pictures, static_argnums=0)

    def evaluate(params: dict) -> dict[str, float]:
        errors = []
        params = jax.device_get(params)
        for batch in make_loader(shards, "val", loader_config(config, train=False)):
            count = len(batch["speed"])
            rows = np.arange(config.batch_size).clip(max=count - 1)  # keeps one compiled shape
            inputs = (batch[name][rows] for name in ("image", "speed", "command"))
            planned = np.asarray(plan(model, params, *inputs))[:count]
            errors.append(np.linalg.norm(planned - batch["future"], axis=-1).mean(axis=1))
        return {"l2": float(np.concatenate(errors).mean())}

    return evaluate


def plan_pictures(model: DrivingVLA, params: dict, images, speed, command) -> jax.Array:
    """Waypoints [B, T, 2] of the unpruned VLA."""
    variables = {"params": params}
    tokens = model.apply(variables, images, method="encode")
    prompt = model.config.vocabulary.prompt(speed, command)
    where = visual_positions(model.config, len(command))
    return generate_plan(model, variables, tokens, where, prompt)


def prepare_data(workdir: Path, world: WorldConfig, progress: bool = True) -> Shards:
    """The shards of a world under `workdir`, written if they are not there."""
    root = generate(workdir / "world", world, progress=progress)
    if (workdir / "shards").exists():
        return open_shards(workdir / "shards")
    return build_shards(read_nuscenes(root), workdir / "shards", progress=progress)


def train_vla(workdir: Path, config: TrainVLAConfig, quiet: bool = False) -> dict:
    """Trains, or goes on with, the run in `workdir`; all devices share each batch.

    Returns:
        The VLA's parameters.
    """
    shards = prepare_data(workdir, config.world, progress=not quiet)
    model = DrivingVLA(config.model)
    evaluate = planning_error(model, config, shards)
    optimizer = make_optimizer(config.optimizer)

    def init_state():
        return init_train_state(
            lambda key: init_driving(model, config.loss, key), optimizer, config.seed
        )

    step = make_train_step(
        lambda params, batch, key: driving_loss(model, config.loss, params, batch, key), optimizer
    )
    batches = make_loader(shards, "train", loader_config(config, train=True))
    result = fit(
        workdir / "train",
        config,
        init_state,
        step,
        iter(batches),
        config.optimizer.total_steps,
        mesh=make_mesh(),
        checkpoint_every=200,
        evaluate=lambda state: evaluate(state.params["vla"]),
        evaluate_every=400,
        quiet=quiet,
        name="train VLA",
    )
    return result.state.params["vla"]


@dataclass(frozen=True)
class TrainVLAArgs:
    """Train the tiny driving VLA from scratch; the bundled weights were made this way.

    Attributes:
        out: Run folder; a run found there is resumed.
        config: Configuration of the training.
    """

    out: Path
    config: TrainVLAConfig = field(default_factory=TrainVLAConfig)


def write_vla(args: TrainVLAArgs) -> None:
    """Trains and writes OUT/vla.safetensors."""
    params = train_vla(args.out, args.config)
    save_vla(args.out / "vla.safetensors", params, args.config.model.cameras)
