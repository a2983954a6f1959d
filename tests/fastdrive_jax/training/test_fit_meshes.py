"""Runs whose params are split, in a process with eight virtual devices."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, sys.argv[2])
import jax.numpy as jnp
from tiny_run import TinyConfig, make_batches
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import constrain, tree_shardings
from fastdrive_jax.training.loop import fit
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.state import init_train_state, make_train_step
from fastdrive_jax.training.watch import WatchConfig

config = TinyConfig()
optimizer = make_optimizer(config.optimizer)

def params(key):
    one, two = jax.random.split(key)
    return {"up_proj": {"kernel": jax.random.normal(one, (16, 8)), "bias": jnp.zeros(8)},
            "down_proj": {"kernel": jax.random.normal(two, (8, 3))}}

def init():
    return init_train_state(params, optimizer, 3, ema=True)

def loss(params, batch, key):
    hidden = batch["x"] @ params["up_proj"]["kernel"] + params["up_proj"]["bias"]
    hidden = constrain(jnp.tanh(hidden), "batch", "hidden")
    return jnp.square(hidden @ params["down_proj"]["kernel"] - batch["y"]).mean(), {}

step = make_train_step(loss, optimizer, ema_decay=0.9, accumulate=2)

def run(name, steps, *sides):
    mesh = make_mesh(*sides)
    with jax.set_mesh(mesh):
        result = fit(
            Path(sys.argv[1]) / name, config, init, step, make_batches(config), steps, mesh=mesh,
            state_shardings=tree_shardings(jax.eval_shape(init), mesh), log_every=1,
            checkpoint_every=3, quiet=True, watch=WatchConfig(on_recompile="raise"),
        )
    return result

one, split = run("one", 6, 1), run("split", 4, 2, 2)
moved = run("split", 6, 1, 2, 2)
kernel, mean = (tree["up_proj"]["kernel"] for tree in (moved.state.params, moved.state.ema))
print(json.dumps({
    "one": [record["loss"] for record in one.history],
    "moved": [record["loss"] for record in moved.history],
    "ema": [leaf.tolist() for leaf in jax.tree.leaves(one.state.ema)],
    "moved_ema": [leaf.tolist() for leaf in jax.tree.leaves(moved.state.ema)],
    "shards": [kernel.addressable_shards[0].data.shape, mean.addressable_shards[0].data.shape],
}))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    helpers = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path_factory.mktemp("fit"), helpers],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_params_and_average_are_split_alike_and_train_as_on_one_device(report):
    assert report["shards"] == [[8, 4], [8, 4]]
    assert len(report["moved"]) == 6
    np.testing.assert_allclose(report["moved"], report["one"], rtol=1e-4)
    for split, whole in zip(report["moved_ema"], report["ema"], strict=True):
        np.testing.assert_allclose(split, whole, atol=1e-4)
