import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from fastdrive_jax.training.state import (
    abstract_state,
    init_train_state,
    make_train_step,
    materialize,
)


def init(seed=0, optimizer=optax.sgd(0.1)):  # noqa: B008
    return init_train_state(lambda key: {"w": jax.random.normal(key, (3,))}, optimizer, seed)


def test_abstract_state_allocates_nothing_and_materializes_to_the_same():
    where = SingleDeviceSharding(jax.devices()[0])
    abstract = abstract_state(init, where)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    state = materialize(init, abstract)
    jax.tree.map(np.testing.assert_array_equal, state, init())
    assert all(leaf.sharding == where for leaf in jax.tree.leaves(state))


def test_step_key_depends_on_seed_and_step_only():
    state = init(seed=1)
    later = state.replace(step=state.step + 1)

    def draw(some):
        return float(jax.random.uniform(some.step_key()))

    assert draw(state) == draw(init(seed=1))
    assert len({draw(state), draw(later), draw(init(seed=2))}) == 3


def test_one_step_of_gradient_descent():
    state = init()

    def loss_fn(params, batch, key, frozen):
        return jnp.vdot(params["w"], batch) * frozen, {"seen": batch.sum()}

    batch = jnp.asarray([1.0, 2.0, 2.0])
    new, metrics = make_train_step(loss_fn, optax.sgd(0.1))(state, batch, jnp.float32(2.0))
    np.testing.assert_allclose(new.params["w"], state.params["w"] - 0.2 * batch, rtol=1e-6)
    assert int(new.step) == 1
    assert float(metrics["seen"]) == 5.0
    assert float(metrics["grad_norm"]) == pytest.approx(6.0)
    assert float(metrics["update_norm"]) == pytest.approx(0.6)
    assert float(metrics["loss"]) == pytest.approx(2 * float(state.params["w"] @ batch))


def test_gradient_norms_of_groups_add_up_to_the_whole():
    def loss_fn(params, batch, key):
        return jnp.vdot(params["a"], batch) + 3 * params["b"]["c"].sum(), {}

    params = {"a": jnp.zeros(3), "b": {"c": jnp.zeros(2)}}
    state = init_train_state(lambda key: params, optax.sgd(0.1), 0)
    _, metrics = make_train_step(loss_fn, optax.sgd(0.1))(state, jnp.asarray([1.0, 2.0, 2.0]))
    assert float(metrics["grad_norm/a"]) == pytest.approx(3.0)
    assert float(metrics["grad_norm/b"]) == pytest.approx(3 * 2**0.5)
    assert float(metrics["grad_norm"]) == pytest.approx((9 + 18) ** 0.5)
