import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import TinyConfig, init_params, loss_fn, make_batches

from fastdrive_jax.errors import UserError
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import tree_shardings
from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.loop import fit
from fastdrive_jax.training.state import (
    AveragedState,
    TrainState,
    abstract_state,
    evaluation_params,
    init_train_state,
    make_train_step,
    materialize,
)

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def moving(dtype=jnp.float32, ema=True):
    """Params that go down by 1 a step."""

    def init():
        return init_train_state(lambda key: {"w": jnp.zeros(3, dtype)}, optax.sgd(1.0), 0, ema=ema)

    return init, lambda params, batch, key: (params["w"].astype(jnp.float32).sum(), {})


def run_steps(decay, steps):
    init, loss = moving()
    state, step = init(), make_train_step(loss, optax.sgd(1.0), ema_decay=decay)
    for _ in range(steps):
        state, _ = step(state, None)
    return state


def test_the_average_follows_the_formula_with_a_decay_that_warms_up():
    expected = 0.0
    for step in range(30):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * -(step + 1)
    state = run_steps(0.6, 30)
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], -30)


def test_the_first_updates_forget_the_beginning():
    assert -1 < float(run_steps(0.999, 1).ema["w"][0]) <= -0.9 + 1e-6


def test_evaluation_params_are_the_average_in_the_params_dtype():
    init, loss = moving(jnp.bfloat16)
    state, _ = make_train_step(loss, optax.sgd(1.0), ema_decay=0.5)(init(), None)
    assert state.ema["w"].dtype == jnp.float32
    assert evaluation_params(state)["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(evaluation_params(state)["w"].astype(np.float32), -0.9, rtol=0.01)
    plain = moving(ema=False)[0]()
    assert evaluation_params(plain) is plain.params


def test_a_wrong_decay_is_refused():
    with pytest.raises(UserError, match=r"ema_decay must be between 0 and 1.*not 1\.0"):
        make_train_step(loss_fn, optax.sgd(1.0), ema_decay=1.0)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_state_and_step_must_agree_about_the_average(decay):
    init, loss = moving(ema=decay is None)
    with pytest.raises(ValueError, match="need each other"):
        make_train_step(loss, optax.sgd(1.0), ema_decay=decay)(init(), None)


def test_without_an_average_the_tree_of_a_checkpoint_is_as_it_was():
    state = moving(ema=False)[0]()
    assert type(state) is TrainState
    names = [path[0].name for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert set(names) == {"step", "params", "key_data"}  # SGD has no state


def test_the_average_lies_as_its_params_and_can_be_donated():
    def init():
        return init_train_state(
            lambda key: {"q_proj": {"kernel": jnp.ones((8, 8))}}, optax.adam(0.1), 0, ema=True
        )

    shardings = tree_shardings(jax.eval_shape(init), make_mesh(1, devices=jax.devices()[:1]))
    kernel = shardings.params["q_proj"]["kernel"]
    assert shardings.ema["q_proj"]["kernel"] == kernel
    assert kernel.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    state = materialize(init, abstract_state(init, shardings))
    step = make_train_step(
        lambda params, batch, key: (params["q_proj"]["kernel"].sum(), {}),
        optax.adam(0.1),
        ema_decay=0.5,
    )
    state, _ = jax.jit(step, donate_argnums=0)(state, None)
    np.testing.assert_allclose(state.ema["q_proj"]["kernel"], 1 - 0.9 * 0.1, rtol=1e-5)


def test_a_resumed_run_has_the_same_average(tmp_path):
    config, optimizer = TinyConfig(), optax.adam(0.05)

    def init():
        return init_train_state(lambda key: init_params(config, key), optimizer, 3, ema=True)

    step = make_train_step(loss_fn, optimizer, ema_decay=0.9)

    def run(name, steps):
        return fit(tmp_path / name, config, init, step, make_batches(config), steps, quiet=True)

    straight = run("a", 6)
    run("b", 3)
    resumed = run("b", 6)
    assert isinstance(resumed.state, AveragedState)
    jax.tree.map(np.testing.assert_array_equal, straight.state, resumed.state)
    moved = np.abs(resumed.state.ema["kernel"] - resumed.state.params["kernel"]).max()
    assert moved > 1e-3  # the average is not just the params
    with pytest.raises(UserError, match=r"ema\.bias is \(3,\) there and absent here"):
        restore_plain(tmp_path / "b", config, optimizer)


def restore_plain(folder, config, optimizer):
    def init():
        return init_train_state(lambda key: init_params(config, key), optimizer, 3)

    with RunCheckpoints(folder, config) as checkpoints:
        checkpoints.restore(abstract_state(init, HERE), make_batches(config))
