"""The train state, a pytree, and the pure step that advances it."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

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


def init_train_state(
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    seed: int,
) -> TrainState:
    """The state before the first update.

    Args:
        init_params: PRNG key to the params.
        optimizer: whose state is initialised from them.
        seed: of the run.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = init_params(init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key_data=jax.random.key_data(run_key),
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
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure step of gradient descent.

    Args:
        loss_fn: `(params, batch, key, *frozen) -> (scalar loss, metrics)`.
        optimizer: turns gradients into updates.

    Returns:
        `(state, batch, *frozen) -> (state, metrics)`; the metrics are those of `loss_fn` on the
        params before the update, with `loss`, `grad_norm` (before clipping) and `update_norm`.
    """

    def train_step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, Metrics]:
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = value_and_grad(state.params, batch, state.step_key(), *frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = dict(
            metrics,
            loss=loss,
            grad_norm=optax.tree.norm(grads),
            update_norm=optax.tree.norm(updates),
        )
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics

    return train_step
