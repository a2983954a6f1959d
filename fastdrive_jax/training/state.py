"""The train state, a pytree, and the pure step that advances it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.accumulate import accumulated_grads
from fastdrive_jax.training.ema import check_decay, start_average, update_average

Params = Any
Batch = Any
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that an update changes, and nothing else.

    Attributes:
        step: number of updates made, int32 scalar.
        params: the trained parameters; frozen ones are passed to the step apart.
        opt_state: of the optax transformation.
        key_data: uint32 data of the run's one PRNG key, which never changes; a step draws its own
            key by folding in `step`, so that there is no generator state to lose.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    key_data: jax.Array

    def step_key(self) -> jax.Array:
        """The PRNG key of the coming step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key_data), self.step)


class AveragedState(TrainState):
    """A train state that carries an average of its params.

    A class of its own, and not a field that may be None: Orbax writes even a None into a
    checkpoint, and runs that were saved without the field could not be read any more.

    Attributes:
        ema: like the params, in float32 at least.
    """

    ema: Params


def evaluation_params(state: TrainState) -> Params:
    """The params to measure and export: the average if there is one, in the params' dtypes."""
    if not isinstance(state, AveragedState):
        return state.params
    return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), state.ema, state.params)


def init_train_state(
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first update.

    Args:
        init_params: PRNG key to the params.
        optimizer: whose state is initialised from them.
        seed: of the run.
        ema: makes an `AveragedState`, for a step with `ema_decay`.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = init_params(init_key)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key_data=jax.random.key_data(run_key),
    )
    if not ema:
        return state
    return AveragedState(
        state.step, params, state.opt_state, state.key_data, ema=start_average(params)
    )


def abstract_state(init: Callable[[], Any], shardings: Any) -> Any:
    """What `init()` returns as shapes with shardings, without computing it.

    Args:
        init: builds the state.
        shardings: one sharding for every leaf, or a tree of them like the state.
    """
    shapes = jax.eval_shape(init)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def materialize(init: Callable[[], Any], abstract: Any) -> Any:
    """Run `init()` with each leaf built where `abstract` says that it belongs."""
    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def make_train_step(
    loss_fn: Callable[..., tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure step of gradient descent.

    Args:
        loss_fn: `(params, batch, key, *frozen) -> (scalar loss, metrics)`.
        optimizer: turns gradients into updates.
        ema_decay: of the average in an `AveragedState`; None for a plain `TrainState`.
        accumulate: into how many equal parts a batch is divided, whose losses and gradients are
            averaged within the one step; for batches that do not fit at once.

    Returns:
        `(state, batch, *frozen) -> (state, metrics)`; the metrics are those of `loss_fn` on the
        params before the update, with `loss`, `grad_norm` (before clipping), `update_norm`, and
        `grad_norm/NAME` for each of several top-level groups of params.

    Raises:
        UserError: `accumulate` is below 1 or `ema_decay` not in (0, 1).
    """
    if accumulate < 1:
        raise UserError(f"accumulate must be at least 1, not {accumulate}.")
    if ema_decay is not None:
        check_decay(ema_decay)
    if accumulate == 1:
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    else:
        value_and_grad = accumulated_grads(loss_fn, accumulate)

    def train_step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, Metrics]:
        _check_average(state, ema_decay)
        (loss, metrics), grads = value_and_grad(state.params, batch, state.step_key(), *frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = dict(
            metrics,
            loss=loss,
            grad_norm=optax.tree.norm(grads),
            update_norm=optax.tree.norm(updates),
            **_group_norms(grads),
        )
        params = optax.apply_updates(state.params, updates)
        if ema_decay is not None:
            state = state.replace(ema=update_average(state.ema, params, state.step, ema_decay))
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def _check_average(state: TrainState, decay: float | None) -> None:
    """An average that is carried along and never updated would be measured as if it were."""
    if isinstance(state, AveragedState) != (decay is not None):
        raise ValueError(
            "init_train_state(ema=True) and make_train_step(ema_decay=...) need each other"
        )


def _group_norms(grads: Params) -> Metrics:
    """Which part of a model a gradient that explodes comes from."""
    if not isinstance(grads, dict) or len(grads) < 2:
        return {}
    return {f"grad_norm/{name}": optax.tree.norm(grads[name]) for name in grads}
