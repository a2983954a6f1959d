import jax
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.ego_history import (
    EgoHistoryConfig,
    EgoSamples,
    constant_velocity,
    fit_ego_history,
)

T = 6
QUICK = EgoHistoryConfig(hidden=32, steps=300)


def braking(count, seed):
    """Cars whose past tells their deceleration, which their speed does not."""
    rng = np.random.default_rng(seed)
    speed, gain = rng.uniform(6, 10, count), rng.uniform(-2, 1, count)
    times = 0.5 * np.arange(1, T + 1)
    way = speed[:, None] * times + 0.5 * gain[:, None] * times**2
    past = -speed[:, None] * times[::-1] + 0.5 * gain[:, None] * times[::-1] ** 2
    zero = np.zeros_like(way)
    ego = EgoSamples(
        np.stack([speed, np.zeros(count), np.zeros(count)], 1).astype(np.float32),
        np.ones(count, np.int32),
        np.stack([past, zero], -1).astype(np.float32),
        np.ones((count, T), bool),
    )
    return ego, np.stack([way, zero], -1).astype(np.float32), np.repeat(np.arange(count // 4), 4)


def test_it_learns_what_the_past_tells_and_a_constant_speed_does_not():
    ego, future, scene = braking(200, 0)
    model, params = fit_ego_history(QUICK, ego, future, np.ones((200, T), bool), scene)
    ego, future, _ = braking(100, 1)
    error = np.linalg.norm(model.apply(params, ego) - future, axis=-1).mean()
    going_on = constant_velocity(ego.state[:, 0], T)
    np.testing.assert_allclose(going_on[:, 1, 0], ego.state[:, 0], rtol=1e-6)
    assert error < 0.25 * np.linalg.norm(going_on - future, axis=-1).mean()


def test_unknown_pasts_and_futures_do_not_matter():
    ego, future, scene = braking(40, 0)
    valid = np.ones((40, T), bool)
    valid[::2, 3:] = False
    known = np.ones((40, T), bool)
    known[:, :2] = False
    config = EgoHistoryConfig(hidden=16, steps=20)
    ego = ego.replace(history_valid=known)
    first = fit_ego_history(config, ego, future, valid, scene)[1]
    noisy = np.where(known[..., None], ego.history, 99).astype(np.float32)
    other = np.where(valid[..., None], future, -50).astype(np.float32)
    second = fit_ego_history(config, ego.replace(history=noisy), other, valid, scene)[1]
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_drive_is_too_few():
    ego, future, _ = braking(8, 0)
    with pytest.raises(UserError, match="at least 2 training scenes, not 1"):
        fit_ego_history(QUICK, ego, future, np.ones((8, T), bool), np.zeros(8, int))


def test_waypoints_that_are_not_known_may_be_anything():
    ego, future, scene = braking(40, 0)
    valid = np.ones((40, T), bool)
    valid[3, 2] = False
    odd = future.copy()
    odd[3, 2] = np.nan
    config = EgoHistoryConfig(hidden=16, steps=20)
    params = [fit_ego_history(config, ego, x, valid, scene)[1] for x in (future, odd)]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_control_that_would_learn_nothing_is_refused():
    for wrong in ({"held_out": 1}, {"held_out": 0}, {"steps": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            EgoHistoryConfig(**wrong)
    ego, future, scene = braking(40, 0)
    valid = np.broadcast_to((scene % 5 != 0)[:, None], (40, T))
    with pytest.raises(UserError, match="no known waypoint in the 8 samples that it holds out"):
        fit_ego_history(QUICK, ego, future, valid, scene)
