"""A state saved on one mesh and restored on others, of the tests' eight virtual devices."""

import jax
import numpy as np
import optax
import pytest

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
    mesh = make_mesh(data, fsdp, tensor)
    return abstract_state(init, tree_shardings(jax.eval_shape(init), mesh))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run, and the state that was saved there."""
    folder, state = tmp_path_factory.mktemp("run"), materialize(init, place(4, 2))
    with RunCheckpoints(folder, {"a": 1}) as checkpoints:
        checkpoints.save(3, state, Position())
    return folder, state


@pytest.mark.parametrize(
    ("sides", "devices", "local"),
    [
        ((2, 1), 2, (64, 32)),
        ((1, 2), 2, (32, 32)),
        ((8, 1), 8, (64, 32)),
        ((1, 8), 8, (8, 32)),
        ((2, 2, 2), 8, (32, 16)),
        (None, 1, (64, 32)),
    ],
)
def test_a_checkpoint_of_four_by_two_devices_comes_back_bit_by_bit_on_any_mesh(
    saved, sides, devices, local
):
    folder, wanted = saved
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    abstract = place(*sides) if sides else abstract_state(init, one)
    position = Position()
    with RunCheckpoints(folder, {"a": 1}) as checkpoints:
        state = checkpoints.restore(abstract, position)
    assert position.state == {"next": 7}
    for found, want, where in zip(*map(jax.tree.leaves, (state, wanted, abstract)), strict=True):
        assert found.dtype == want.dtype
        assert found.sharding == where.sharding
        assert np.asarray(found).tobytes() == np.asarray(want).tobytes()
    kernel = state.params["up_proj"]["kernel"]
    assert state.ema["up_proj"]["kernel"].sharding == kernel.sharding
    assert len(kernel.sharding.device_set) == devices
    assert kernel.addressable_shards[0].data.shape == local
