"""Runs whose params are split over the eight virtual devices of the tests."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_run import TinyConfig, make_batches

from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import constrain, tree_shardings
from fastdrive_jax.training.loop import fit
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.state import init_train_state, make_train_step
from fastdrive_jax.training.watch import WatchConfig

CONFIG = TinyConfig()
OPTIMIZER = make_optimizer(CONFIG.optimizer)


def params(key):
    one, two = jax.random.split(key)
    return {
        "up_proj": {"kernel": jax.random.normal(one, (16, 8)), "bias": jnp.zeros(8)},
        "down_proj": {"kernel": jax.random.normal(two, (8, 3))},
    }


def init():
    return init_train_state(params, OPTIMIZER, 3, ema=True)


def loss(params, batch, key):
    hidden = batch["x"] @ params["up_proj"]["kernel"] + params["up_proj"]["bias"]
    hidden = constrain(jnp.tanh(hidden), "batch", "hidden")
    return jnp.square(hidden @ params["down_proj"]["kernel"] - batch["y"]).mean(), {}


def run(folder, steps, *sides):
    mesh = make_mesh(*sides)
    step = make_train_step(loss, OPTIMIZER, ema_decay=0.9, accumulate=2)
    with jax.set_mesh(mesh):
        return fit(
            folder, CONFIG, init, step, make_batches(CONFIG), steps, mesh=mesh,
            state_shardings=tree_shardings(jax.eval_shape(init), mesh), log_every=1,
            checkpoint_every=3, quiet=True, watch=WatchConfig(on_recompile="raise"),
        )  # fmt: skip


def test_params_and_average_are_split_alike_and_train_as_on_one_device(tmp_path):
    one = run(tmp_path / "one", 6, 1)
    run(tmp_path / "split", 4, 2, 2)
    moved = run(tmp_path / "split", 6, 1, 2, 2)
    for tree in (moved.state.params, moved.state.ema):
        assert tree["up_proj"]["kernel"].addressable_shards[0].data.shape == (8, 4)
    losses = [[record["loss"] for record in result.history] for result in (moved, one)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for split, whole in zip(*map(jax.tree.leaves, (moved.state.ema, one.state.ema)), strict=True):
        np.testing.assert_allclose(split, whole, atol=1e-4)
