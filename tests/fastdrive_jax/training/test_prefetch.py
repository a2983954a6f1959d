import grain
import jax
import numpy as np
import pytest

from fastdrive_jax.parallel.mesh import make_mesh, shard_batch
from fastdrive_jax.training.prefetch import DevicePrefetch


def numbers(count=10):
    return iter(grain.MapDataset.range(count).batch(2).to_iter_dataset())


def prefetch(depth, drawn=None, count=10):
    mesh = make_mesh(1, devices=jax.local_devices()[:1])

    def put(batch):
        if drawn is not None:
            drawn.append(batch.tolist())
        return shard_batch(batch, mesh)

    return DevicePrefetch(numbers(count), put, depth)


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_the_same_batches_on_the_device(depth):
    found = list(prefetch(depth))
    assert all(isinstance(batch, jax.Array) for batch in found)
    assert [np.asarray(batch).tolist() for batch in found] == [[k, k + 1] for k in range(0, 10, 2)]


def test_it_runs_ahead_by_its_depth():
    drawn = []
    batches = prefetch(3, drawn)
    assert drawn == []
    next(batches)
    assert drawn == [[0, 1], [2, 3], [4, 5]]  # one given, two ahead
    next(batches)
    assert len(drawn) == 4


@pytest.mark.parametrize("taken", range(6))
def test_a_position_is_that_of_the_batch_given_next(taken):
    running = prefetch(2)
    for _ in range(taken):
        next(running)
    state = running.get_state()
    rest = [np.asarray(batch).tolist() for batch in running]
    resumed = prefetch(3)
    next(resumed)
    resumed.set_state(state)
    assert [np.asarray(batch).tolist() for batch in resumed] == rest
    assert len(rest) == 5 - taken


def test_depth_is_positive():
    with pytest.raises(ValueError, match="depth=0"):
        prefetch(0)
