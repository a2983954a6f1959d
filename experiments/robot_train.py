"""Train the tiny OpenVLA by behaviour cloning on demonstrations of the tabletop.

fastdrive robot demos --out demos --episodes 200 --workers 2
fastdrive robot train --demos demos --out runs/robot_policy
fastdrive robot eval --policies openvla --weights runs/robot_policy/policy.safetensors

Once more, on states that the policy itself gets into (DAgger):

fastdrive robot demos --out corrections --seed 1 --policy runs/robot_policy/policy.safetensors
fastdrive robot train --demos demos corrections --start runs/robot_policy --out runs/robot_corrected
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.loader import Loader
from data_pipelines.robot.episode_loader import (
    EpisodeLoaderConfig,
    identity,
    make_episode_loader,
)
from data_pipelines.robot.episodes import Episodes, open_together
from data_pipelines.robot.policies import ACTION_SIZE, GRIPPER
from data_pipelines.robot.tabletop import target_segment
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.openvla.actions import (
    Bounds,
    decode_actions,
    normalise,
    read_statistics,
)
from fastdrive_jax.models.openvla.config import TINY_OPENVLA, OpenVLAConfig
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.policy_file import POLICY_FILE, PolicySpec, save_policy
from fastdrive_jax.models.openvla.prompt import word_prompts
from fastdrive_jax.parallel.mesh import make_mesh, replicated_sharding
from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.loop import fit
from fastdrive_jax.training.optimizer import OptimizerConfig, make_optimizer
from fastdrive_jax.training.robot import RobotLossConfig, fed_ids, init_robot, robot_loss
from fastdrive_jax.training.run_config import claim_run_folder
from fastdrive_jax.training.state import (
    TrainState,
    abstract_state,
    init_train_state,
    make_train_step,
)


def _tabletop_model() -> OpenVLAConfig:
    """Two views of 6 x 6 tokens; small, since the samples that it sees count more than its size."""
    encoders = tuple(replace(vit, patch_size=16, num_heads=2) for vit in TINY_OPENVLA.encoders)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "vocab_size": 320}
    heads = {"num_heads": 3, "num_kv_heads": 3, "mrope_section": (16, 0, 0)}
    text = replace(TINY_OPENVLA.text, **sizes, **heads)
    return replace(TINY_OPENVLA, encoders=encoders, text=text, views=2)


@dataclass(frozen=True)
class RobotTrainConfig:
    """Train the tiny OpenVLA by behaviour cloning.

    Attributes:
        demos: Folders from `fastdrive robot demos`, read as one; the ranges of the first scale the
            actions.
        out: Run folder; a run found there is resumed.
        start: Run folder whose newest parameters this run starts from; by default parameters are
            random.
        model: The VLA; it decodes actions as tokens.
        loss: Weights of the parts of the loss.
        optimizer: AdamW and its schedule; total_steps is the length of the run.
        batch_size: Demonstration steps per training step.
        seed: Seed of parameters and data order.
        quiet: No progress bars.
    """

    demos: tuple[Path, ...]
    out: Path = Path("runs/robot_policy")
    start: Path | None = None
    model: OpenVLAConfig = field(default_factory=_tabletop_model)
    loss: RobotLossConfig = field(default_factory=RobotLossConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=2e-3,
            warmup_steps=100,
            total_steps=2000,
            weight_decay=0.02,
            clip_norm=1.0,
        )
    )
    batch_size: int = 64
    seed: int = 0
    quiet: bool = False


def robot_train(config: RobotTrainConfig) -> Path:
    """Trains, or goes on with, the run, and writes OUT/policy.safetensors.

    Raises:
        UserError: The demonstrations, or the run that this one starts from, do not fit the model.
    """
    episodes = open_together(config.demos)
    check_views(config.model, episodes)
    statistics = read_statistics(config.demos[0])
    prompts = word_prompts(episodes.instructions, config.model)
    model = OpenVLA(config.model)
    optimizer = make_optimizer(config.optimizer)
    ids, lengths = prompts.encode(episodes.instructions)
    targets = [target_segment(instruction) for instruction in episodes.instructions]
    told = {"ids": ids, "lengths": lengths, "target": np.array(targets, np.int32)}
    with_prompts = partial(add_told, jax.tree.map(jnp.asarray, told))

    def loss(params, batch, key):
        bounds = statistics.action
        return robot_loss(model, config.loss, bounds, params, with_prompts(batch), key)

    def init(key):
        return init_robot(model, config.loss, key)

    views = episodes.views[: config.model.views]
    loaded = loader_config(config, views, train=True)
    claim_run_folder(config.out, {"data": identity(episodes, "train", loaded)})
    validation = partial(
        make_episode_loader, episodes, "val", loader_config(config, views, train=False)
    )
    mesh = make_mesh()
    init_state = partial(init_train_state, init, optimizer, config.seed)
    if config.start is not None:
        params = newest_params(config.start, init_state, mesh)
        init_state = partial(init_train_state, lambda key: params, optimizer, config.seed)
    evaluate = action_error(model, statistics.action, validation, with_prompts)
    result = fit(
        config.out / "train",
        config,
        init_state,
        make_train_step(loss, optimizer),
        iter(make_episode_loader(episodes, "train", loaded)),
        config.optimizer.total_steps,
        mesh=mesh,
        checkpoint_every=200,
        evaluate=lambda state: evaluate(state.params["vla"]),
        evaluate_every=500,
        quiet=config.quiet,
        ignore=("demos", "out", "quiet"),
        name="train robot VLA",
    )
    path = config.out / POLICY_FILE
    spec = PolicySpec(config.model, prompts, statistics, views)
    save_policy(path, jax.device_get(result.state.params["vla"]), spec)
    return path


def newest_params(run: Path, init_state: Callable[[], TrainState], mesh: Mesh) -> Any:
    """Parameters of a run's newest checkpoint.

    Raises:
        UserError: It has none, or is of another model.
    """
    folder = run / "train"
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{run} has no checkpoint; give a run folder of `fastdrive robot train`.")
    abstract = abstract_state(init_state, replicated_sharding(mesh))
    with RunCheckpoints(folder, None, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            raise UserError(f"{run} has no whole checkpoint; let its training go on for longer.")
        return checkpoints.restore(abstract).params


def check_views(model: OpenVLAConfig, episodes: Episodes) -> None:
    """Refuses a model that these demonstrations cannot train.

    Raises:
        UserError: It has other views, pictures or actions, or does not decode tokens.
    """
    edge = model.image_size
    if model.views > len(episodes.views) or episodes.image_size != (edge, edge):
        raise UserError(
            f"The model has {model.views} views of {edge} x {edge} pixels, but {episodes.path} has "
            f"{len(episodes.views)} of {episodes.image_size[0]} x {episodes.image_size[1]}; record "
            "with --image-size or set model."
        )
    if model.parallel or model.proprio_dim:
        raise UserError("model.head must be 'tokens' without proprio_dim; others are not trained.")


def loader_config(
    config: RobotTrainConfig, views: tuple[str, ...], train: bool
) -> EpisodeLoaderConfig:
    """Training batches are shuffled; validation ones come once, in order."""
    return EpisodeLoaderConfig(
        batch_size=config.batch_size,
        chunk=config.model.chunk,
        views=views,
        segments=train,
        failures=True,  # what the expert wants is right however the episode ended
        shuffle=train,
        seed=config.seed,
        num_epochs=None if train else 1,
    )


def add_told(told: dict[str, jax.Array], batch: dict) -> dict:
    """The batch with what is known of its instructions: tables that have a row for each."""
    return batch | {name: table[batch["instruction"]] for name, table in told.items()}


def action_error(
    model: OpenVLA,
    bounds: Bounds,
    validation: Callable[[], Loader],
    with_prompts: Callable[[dict], dict],
) -> Callable[[dict], dict[str, float]]:
    """Mean error of normalised actions on the validation split, a function of VLA params.

    Each number is given the true ones before it; with all visual tokens.
    """

    @jax.jit
    def errors(params, batch):
        batch = with_prompts(batch)
        true = normalise(batch["action"], bounds).reshape(len(batch["image"]), -1)
        variables = {"params": params}
        tokens = model.apply(variables, batch["image"], method="encode")
        given = tokens, batch["ids"], batch["lengths"], fed_ids(model.config, true)
        logits = model.apply(variables, *given, method="action_logits")
        found = decode_actions(jnp.argmax(logits, axis=-1), model.config)
        return jnp.abs(found - true).mean(axis=0)

    def evaluate(params):
        found = [np.asarray(errors(params, batch)) for batch in validation()]
        moved, _, grip = np.split(np.mean(found, axis=0)[:ACTION_SIZE], [3, GRIPPER])
        return {"move_error": float(moved.mean()), "grip_error": float(grip.mean())}

    return evaluate
