import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.accumulate import accumulated_grads
from fastdrive_jax.training.state import init_train_state, make_train_step


def mean_loss(params, batch, key, *frozen):
    hidden = jnp.tanh(batch["x"] @ params["a"]["w"])
    error = jnp.square(hidden @ params["b"]["w"] - batch["y"])
    return error.mean(), {"error": error.mean(), "largest": jnp.abs(params["a"]["w"]).max()}


def init(dtype=jnp.float32):
    def params(key):
        one, two = jax.random.split(key)
        return {
            "a": {"w": jax.random.normal(one, (5, 7), dtype)},
            "b": {"w": jax.random.normal(two, (7, 2), dtype)},
        }

    return init_train_state(params, optax.adam(1e-2), 0)


def batch(size=12):
    rng = np.random.default_rng(0)
    return {
        "x": jnp.asarray(rng.standard_normal((size, 5)), jnp.float32),
        "y": jnp.asarray(rng.standard_normal((size, 2)), jnp.float32),
    }


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_give_the_gradients_of_the_whole_batch(parts):
    params, key = init().params, jax.random.key(0)
    whole = jax.value_and_grad(mean_loss, has_aux=True)(params, batch(), key)
    divided = jax.jit(accumulated_grads(mean_loss, parts))(params, batch(), key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), divided, whole)


def test_a_step_in_parts_equals_the_step():
    one = jax.jit(make_train_step(mean_loss, optax.sgd(0.1)))
    many = jax.jit(make_train_step(mean_loss, optax.sgd(0.1), accumulate=4))
    state = init().replace(opt_state=optax.sgd(0.1).init(init().params))
    (left, seen), (right, found) = one(state, batch()), many(state, batch())
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # noqa: E731
    jax.tree.map(close, left, right)
    jax.tree.map(close, seen, found)
    assert int(right.step) == 1


def test_each_part_draws_for_itself():
    def noisy(params, batch, key):
        return params["w"] * jax.random.uniform(key), {"drawn": jax.random.uniform(key)}

    def run(parts):
        params, data = {"w": jnp.ones(())}, jnp.zeros(4)
        (_, metrics), _ = accumulated_grads(noisy, parts)(params, data, jax.random.key(1))
        return float(metrics["drawn"])

    keys = [jax.random.fold_in(jax.random.key(1), number) for number in range(4)]
    assert run(4) == pytest.approx(np.mean([float(jax.random.uniform(key)) for key in keys]))


def test_sums_of_bfloat16_gradients_do_not_lose_small_parts():
    def linear(params, batch, key):
        return (params["w"] * batch.astype(jnp.bfloat16)).sum(), {}

    # In bfloat16 256 + 1 is 256: a sum in that dtype would stay at the first part.
    data = jnp.asarray([256.0] + [1.0] * 127)
    _, grads = accumulated_grads(linear, 128)({"w": jnp.ones((), jnp.bfloat16)}, data, KEY)
    assert grads["w"].dtype == jnp.bfloat16
    assert float(grads["w"]) == pytest.approx((256 + 127) / 128, rel=0.01)


KEY = jax.random.key(0)


def test_a_batch_that_does_not_divide_is_refused():
    step = jax.jit(make_train_step(mean_loss, optax.adam(1e-2), accumulate=5))
    with pytest.raises(UserError, match=r"batch of 12 does not divide into accumulate=5"):
        step(init(), batch())
    step = jax.jit(make_train_step(mean_loss, optax.adam(1e-2), accumulate=2))
    with pytest.raises(UserError, match=r"leading sizes \['12', '4'\]"):
        step(init(), batch() | {"more": jnp.zeros(4)})
    with pytest.raises(UserError, match="accumulate must be at least 1, not 0"):
        make_train_step(mean_loss, optax.adam(1e-2), accumulate=0)
