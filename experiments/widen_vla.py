"""Teach the package's front-camera VLA to look through all six cameras.

    fastdrive widen-vla --out runs/vla_six

Encoder and decoder start from the packaged weights. The encoder stays as it is, so that every
picture is encoded once; the decoder learns six times as many tokens in new places. Give what comes
out to `fastdrive eval-planning --benchmark.cameras six --benchmark.vla OUT/vla.safetensors`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from data_pipelines.features import cache_features
from data_pipelines.schema import CAMERAS
from data_pipelines.synthetic.config import WorldConfig
from experiments.encoders import frozen_vla
from experiments.planning import PlanningSplit, plan_split, planning_split
from experiments.train_vla import prepare_data
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla, save_vla
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.training.driving import (
    DrivingLossConfig,
    class_fractions,
    init_driving,
    planning_loss,
)
from fastdrive_jax.training.loop import fit
from fastdrive_jax.training.optimizer import OptimizerConfig, make_optimizer
from fastdrive_jax.training.state import init_train_state, make_train_step


@dataclass(frozen=True)
class WidenVLAConfig:
    """Train the decoder for more cameras.

    Attributes:
        out: Run folder; a run found there is resumed.
        world: The data set to generate and train on.
        cameras: Cameras of the VLA.
        loss: Weights of the parts of the loss; fewer tokens make faster steps.
        optimizer: AdamW and its schedule; total_steps is the length of the run.
        batch_size: Samples per step.
        seed: Seed of parameters and data order.
        quiet: No progress bars.
    """

    out: Path = Path("runs/vla_six")
    world: WorldConfig = field(
        default_factory=lambda: WorldConfig(seed=1, train_scenes=840, val_scenes=42)
    )
    cameras: tuple[str, ...] = CAMERAS
    loss: DrivingLossConfig = field(
        default_factory=lambda: DrivingLossConfig(keep_choices=(1.0, 0.5, 0.5, 0.25, 0.25, 0.25))
    )
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=8e-4,
            warmup_steps=100,
            total_steps=2100,
            weight_decay=0.02,
            clip_norm=1.0,
        )
    )
    batch_size: int = 16
    seed: int = 0
    quiet: bool = False

    def __post_init__(self):
        if odd := sorted(set(self.cameras) - set(self.world.cameras)):
            raise UserError(f"The world has no camera {odd[0]}; it has {self.world.cameras}.")


def widen_vla(config: WidenVLAConfig) -> Path:
    """Trains and writes OUT/vla.safetensors."""
    shards = prepare_data(config.out, config.world, progress=not config.quiet)
    front, known = load_vla()
    model = DrivingVLA(DrivingConfig(cameras=config.cameras))
    size = model.config.image_size
    features = cache_features(
        shards,
        frozen_vla(front, known).tokens(),
        config.out / "features",
        batch_size=24,
        image_size=size,
        progress=not config.quiet,
    )
    splits = {
        name: planning_split(shards, name, features.splits[name], size, config.cameras)
        for name in ("train", "val")
    }
    optimizer = make_optimizer(config.optimizer)

    def init(key):
        fresh = init_driving(model, config.loss, key)
        decoder = {"language_model": known["language_model"]}
        return {"vla": decoder, "place_head": fresh["place_head"]}

    def whole(params) -> dict:
        return {"visual": known["visual"], **jax.device_get(params["vla"])}

    result = fit(
        config.out / "train",
        config,
        lambda: init_train_state(init, optimizer, config.seed),
        make_train_step(token_loss(model, config.loss), optimizer),
        token_batches(splits["train"], config),
        config.optimizer.total_steps,
        mesh=make_mesh(),
        checkpoint_every=200,
        evaluate=lambda state: {"l2": planning_error(model, whole(state.params), splits["val"])},
        evaluate_every=300,
        quiet=config.quiet,
        ignore=("out", "quiet"),
        name="widen VLA",
    )
    path = config.out / "vla.safetensors"
    save_vla(path, whole(result.state.params), config.cameras)
    return path


def token_loss(model: DrivingVLA, loss: DrivingLossConfig) -> Callable:
    """`planning_loss` on tokens and label maps of a batch."""

    def run(params: Any, batch: dict, key: jax.Array):
        labels = batch["labels"].reshape(-1, *batch["labels"].shape[2:])
        content = class_fractions(labels, loss.classes, model.config.vision.token_pixels)
        content = content.reshape(*batch["tokens"].shape[:2], -1)
        return planning_loss(model, loss, params, batch["tokens"], content, batch, key)

    return run


def token_batches(data: PlanningSplit, config: WidenVLAConfig) -> Iterator[dict]:
    """Endless batches of samples whose tokens are there, at an exactly resumable position."""

    def item(index: int) -> dict[str, np.ndarray]:
        return {
            "tokens": np.asarray(data.tokens[index], np.float32),
            "labels": np.asarray(data.labels[index]),
            "speed": data.speed[index],
            "command": data.command[index],
            "future": data.future[index],
        }

    samples = grain.MapDataset.range(len(data.speed)).seed(config.seed).shuffle()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * config.batch_size)
    stream = samples.repeat(None).map(item).to_iter_dataset(options)
    return iter(stream.batch(config.batch_size, drop_remainder=True))


def planning_error(model: DrivingVLA, params: dict, data: PlanningSplit) -> float:
    """Mean L2 over all waypoints in metres, with all tokens kept."""
    count, tokens = data.tokens.shape[:2]
    everything = np.broadcast_to(np.arange(tokens, dtype=np.int32), (count, tokens))
    planned = plan_split(model, params, data, everything, batch_size=42)
    return float(np.linalg.norm(planned - data.future, axis=-1).mean())
