"""A plan from the car's own past alone: the control that no picture was needed for.

On nuScenes a small network of this kind comes within centimetres of models that see (AD-MLP, arXiv
2305.10430; BEV-Planner, 2312.03031), because a car mostly goes on as it did. Where it does as well
as a model, that model's error says nothing about what it saw.
"""

from dataclasses import dataclass

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.errors import UserError

COMMANDS = 3
STEP_SECONDS = 0.5


@dataclass(frozen=True)
class EgoHistoryConfig:
    """The network and its training.

    Attributes:
        hidden: Width of its two layers.
        steps: Updates, each of all training samples.
        learning_rate: Peak of a cosine.
        weight_decay: Of AdamW.
        held_out: Every how-many-th scene of the training split chooses the step that is taken.
        seed: Of the parameters.
    """

    hidden: int = 256
    steps: int = 1000
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    held_out: int = 5
    seed: int = 0

    def __post_init__(self):
        if self.held_out < 2 or self.steps < 1:
            raise UserError(
                f"held_out={self.held_out} must be at least 2, and steps={self.steps} at least 1: "
                "of every 2 scenes one trains at least."
            )


class EgoSamples(flax.struct.PyTreeNode):
    """What the car knows of itself.

    Attributes:
        state: [S, 3] speed, acceleration, yaw rate.
        command: [S] 0 left, 1 straight, 2 right.
        history: [S, H, 2] places before now in metres, present ego frame, oldest first.
        history_valid: [S, H].
    """

    state: Float[Array, "S 3"]
    command: Int[Array, " S"]
    history: Float[Array, "S H 2"]
    history_valid: Bool[Array, "S H"]


class EgoHistory(nn.Module):
    """Waypoints [S, T, 2] as a correction of going straight on at the present speed."""

    hidden: int
    steps: int

    @nn.compact
    def __call__(self, ego: EgoSamples) -> Float[Array, "S T 2"]:
        """Plans in metres."""
        known = jnp.asarray(ego.history_valid, jnp.float32)[..., None]
        past = jnp.concatenate([ego.history * known / 10, known], axis=-1)
        scale = jnp.array([10.0, 3.0, 0.5])
        x = [past.reshape(len(past), -1), ego.state / scale, jax.nn.one_hot(ego.command, COMMANDS)]
        x = jnp.concatenate(x, axis=-1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden)(x))
        off = nn.Dense(2 * self.steps, kernel_init=nn.initializers.zeros)(x)
        times = STEP_SECONDS * jnp.arange(1, self.steps + 1)
        going_on = ego.state[:, :1] * times
        straight = jnp.stack([going_on, jnp.zeros_like(going_on)], axis=-1)
        return straight + 10 * off.reshape(len(off), self.steps, 2)


def fit_ego_history(
    config: EgoHistoryConfig,
    ego: EgoSamples,
    future: Float[np.ndarray, "S T 2"],
    valid: Bool[np.ndarray, "S T"],
    scene: Int[np.ndarray, " S"],
) -> tuple[EgoHistory, dict]:
    """Trains on the mean distance of all known waypoints.

    Args:
        config: How.
        ego: Of the training samples.
        future: What was driven.
        valid: Which waypoints are known.
        scene: Drive of each sample; whole drives are held out.

    Returns:
        The module and the parameters of the step with the least error on what was held out.

    Raises:
        UserError: There are too few drives to hold some out.
    """
    names = np.unique(scene)
    if len(names) < 2:
        raise UserError(
            f"The ego-history control needs at least 2 training scenes, not {len(names)}; train on "
            "more, or leave it out."
        )
    out = np.isin(scene, names[:: min(config.held_out, len(names))])
    model = EgoHistory(config.hidden, future.shape[1])
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)
    known = [np.asarray(valid) & rows[:, None] for rows in (~out, out)]
    if not all(rows.any() for rows in known):
        raise UserError(
            f"The ego-history control finds no known waypoint in the {out.sum()} samples that it "
            f"holds out or in the {(~out).sum()} others; give it more drives, or leave it out."
        )
    weights = [jnp.asarray(rows, jnp.float32) for rows in known]
    future = np.where(np.asarray(valid)[..., None], future, 0)  # NaN times a weight of 0 is NaN

    def error(params, weight):
        # Not the bare norm, whose slope is infinite at 0.
        square = jnp.square(model.apply(params, ego) - future).sum(axis=-1)
        return (jnp.sqrt(square + 1e-6) * weight).sum() / jnp.maximum(weight.sum(), 1)

    def step(carry, _):
        params, state, best, least = carry
        held = error(params, weights[1])
        best = jax.tree.map(lambda new, old: jnp.where(held < least, new, old), params, best)
        updates, state = optimizer.update(jax.grad(error)(params, weights[0]), state, params)
        carry = optax.apply_updates(params, updates), state, best, jnp.minimum(held, least)
        return carry, held

    @jax.jit
    def run():
        params = model.init(jax.random.key(config.seed), ego)
        start = params, optimizer.init(params), params, jnp.inf
        return jax.lax.scan(step, start, length=config.steps)[0][2]

    return model, run()


def constant_velocity(speed: Float[np.ndarray, " S"], steps: int) -> Float[np.ndarray, "S T 2"]:
    """Going straight on at the present speed."""
    times = STEP_SECONDS * np.arange(1, steps + 1)
    return np.stack([speed[:, None] * times, np.zeros((len(speed), steps))], axis=-1)
