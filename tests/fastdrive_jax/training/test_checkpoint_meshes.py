"""A state saved on one mesh and restored on others, in a process with eight virtual devices."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
import optax
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.parallel.rules import tree_shardings
from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.state import abstract_state, init_train_state, materialize

class Position:
    def get_state(self):
        return {"next": 7}
    def set_state(self, state):
        self.state = state

def params(key):
    one, two = jax.random.split(key)
    return {
        "up_proj": {"kernel": jax.random.normal(one, (64, 32)), "bias": jax.numpy.arange(32.0)},
        "down_proj": {"kernel": jax.random.normal(two, (32, 24), "bfloat16")},
    }

def init():
    return init_train_state(params, optax.adam(1e-3), 5, ema=True)

def place(data, fsdp, tensor=1):
    mesh = make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])
    return abstract_state(init, tree_shardings(jax.eval_shape(init), mesh))

folder = Path(sys.argv[1])
saved = materialize(init, place(4, 2))
with RunCheckpoints(folder, {"a": 1}) as checkpoints:
    checkpoints.save(3, saved, Position())
one = abstract_state(init, jax.sharding.SingleDeviceSharding(jax.devices()[3]))
shapes = {"2x1": place(2, 1), "1x2": place(1, 2), "8x1": place(8, 1), "1x8": place(1, 8),
          "2x2x2": place(2, 2, 2), "one": one}
for name, abstract in shapes.items():
    with RunCheckpoints(folder, {"a": 1}) as checkpoints:
        position = Position()
        state = checkpoints.restore(abstract, position)
    assert position.state == {"next": 7}
    for found, wanted, where in zip(*map(jax.tree.leaves, (state, saved, abstract)), strict=True):
        assert found.dtype == wanted.dtype
        assert found.sharding == where.sharding, (name, found.sharding, where.sharding)
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
    kernel = state.params["up_proj"]["kernel"]
    mean = state.ema["up_proj"]["kernel"]
    assert mean.sharding == kernel.sharding
    print(name, len(kernel.sharding.device_set), kernel.addressable_shards[0].data.shape)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path_factory.mktemp("run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_checkpoint_of_four_by_two_devices_comes_back_bit_by_bit_on_any_mesh(report):
    assert report == [
        "2x1 2 (64, 32)",
        "1x2 2 (32, 32)",
        "8x1 8 (64, 32)",
        "1x8 8 (8, 32)",
        "2x2x2 8 (32, 16)",
        "one 1 (64, 32)",
    ]
