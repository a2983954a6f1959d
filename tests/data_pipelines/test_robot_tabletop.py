"""The tabletop: same again, actions and success, pictures, and its expert."""

import ctypes.util
import importlib.util

import numpy as np
import pytest

from data_pipelines.robot import rendering, scene
from data_pipelines.robot.environment import SUITES, TABLETOP_STEPS, make_suite
from data_pipelines.robot.expert import expert_action, expert_policy
from data_pipelines.robot.tabletop import (
    SEGMENTS,
    STEP,
    TURN,
    Tabletop,
    TabletopState,
    target_segment,
)
from data_pipelines.robot.tasks import COLOURS, DISTRACTORS, TASKS
from fastdrive_jax.errors import UserError

SIZE = (64, 64)
simulated = pytest.mark.skipif(rendering.absent() is not None, reason=str(rendering.absent()))


@pytest.fixture
def env():
    with Tabletop(SIZE) as env:
        yield env


def run(env, task, trial, noise=0.0):
    """Has the expert run an episode; returns whether it succeeded and its length."""
    observation, done = env.reset(task, trial), False
    rng = np.random.default_rng(trial)
    while not done and observation.step < TABLETOP_STEPS:
        action = expert_action(TabletopState.unpack(observation.state))
        stray = rng.uniform(-1, 1, 7)
        observation, done = env.step(stray if rng.random() < noise else action)
    return done, observation.step


def test_scenes_are_drawn_by_their_numbers_with_room_between_things():
    assert scene.draw_scene(1, 2, 3) == scene.draw_scene(1, 2, 3)
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert scene.draw_scene(1, 2, 3).things != scene.draw_scene(*other).things
    counts = set()
    for trial in range(200):
        task = trial % len(TASKS)
        drawn = scene.draw_scene(task, 0, trial)
        kinds = [placed.thing for placed in drawn.things]
        assert kinds[0] == TASKS[task].target
        assert len(set(kinds)) == len(kinds)
        counts.add(len(kinds) - 1)
        places = np.array([(placed.x, placed.y) for placed in drawn.things])
        gaps = np.linalg.norm(places[:, None] - places, axis=-1) + np.eye(len(places))
        assert gaps.min() > 0.08
        assert np.linalg.norm(places - drawn.tray, axis=-1).min() > 0.1
    assert counts == set(range(DISTRACTORS[0], DISTRACTORS[1] + 1))


def test_tasks_have_instructions_of_their_own():
    assert len({task.instruction for task in TASKS}) == len(TASKS)
    assert TASKS[0].instruction == "pick up the red cube"
    assert TASKS[4].instruction == "put the blue ball in the tray"


@simulated
def test_the_same_again(env):
    def pictures():
        first = env.reset(3, 7)
        after, _ = env.step(np.array([0.3, -0.2, -1, 0, 0, 0.5, 1]))
        return [first.images, first.proprio, after.images, after.proprio, after.state]

    once = pictures()
    env.reset(0, 1)
    for a, b in zip(once, pictures(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert once[0].shape == (2, *SIZE, 3)
    assert once[0].dtype == np.uint8
    assert once[0].std() > 10
    with Tabletop(SIZE, seed=1) as other:
        assert not np.array_equal(other.reset(3, 7).images, once[0])


@simulated
def test_actions_are_metres_radians_and_a_grip(env):
    before = env.reset(0, 0).proprio
    assert before.shape == (8,)
    np.testing.assert_allclose(before[6:], [0.04, -0.04], atol=1e-3)
    after, done = env.step(np.array([0.4, -0.4, -0.5, 1, -1, 0.5, 1]))
    moved = after.proprio - before
    np.testing.assert_allclose(moved[:3], STEP * np.array([0.4, -0.4, -0.5]), atol=2e-3)
    np.testing.assert_allclose(moved[3:6], [0, 0, 0.5 * TURN], atol=0.02)
    assert after.proprio[6] < 0.01
    assert not done
    opened, _ = env.step(np.array([0, 0, 0, 0, 0, 0, -1]))
    np.testing.assert_allclose(opened.proprio[6:], [0.04, -0.04], atol=2e-3)
    assert (opened.step, opened.instruction) == (2, "pick up the red cube")
    with pytest.raises(ValueError, match="7 finite"):
        env.step(np.full(7, np.nan))


@simulated
def test_the_gripper_stays_within_its_reach(env):
    env.reset(0, 0)
    for _ in range(14):
        observation, _ = env.step(np.array([1, 1, -1, 0, 0, 1, -1]))
    assert (observation.proprio[:3] > scene.REACH[0] - 0.01).all()
    assert (observation.proprio[:3] < scene.REACH[1] + 0.01).all()


@simulated
def test_the_expert_does_every_task(env):
    results = [run(env, task, trial) for task in range(len(TASKS)) for trial in range(2)]
    assert all(done for done, _ in results)
    assert max(steps for _, steps in results) < TABLETOP_STEPS // 2


@simulated
def test_the_expert_recovers_from_what_goes_wrong(env):
    results = [run(env, task, 50 + task, noise=0.25) for task in range(len(TASKS))]
    assert sum(done for done, _ in results) >= len(TASKS) - 1


@simulated
def test_what_is_held_over_the_tray_is_not_in_it_and_what_is_moved_is_not_lifted(env):
    observation = env.reset(5, 0)
    held = False
    for _ in range(TABLETOP_STEPS):
        state = TabletopState.unpack(observation.state)
        action = expert_action(state)
        low = np.abs(np.subtract(state.target[:2], state.tray)).max() < 0.02
        if low and action[6] < 0:
            held = True
            break
        observation, done = env.step(action)
        assert not done
    assert held
    assert not env.success()
    for _ in range(3):
        observation, done = env.step(action)
    assert done
    env.reset(0, 0)
    assert not env.success()


@simulated
def test_segments_fall_on_what_they_name(env):
    env.reset(0, 3)
    images, segments = env.reset(0, 3).images, env.segmentation()
    assert segments.shape == (2, *SIZE)
    things = {placed.thing for placed in scene.draw_scene(0, 0, 3).things}
    shown = {SEGMENTS[number] for number in np.unique(segments)}
    assert shown == {"background", "gripper", "tray", *(thing.name for thing in things)}
    assert (segments[0] == SEGMENTS.index("tray")).sum() > 20
    assert SEGMENTS[target_segment(TASKS[0].instruction)] == "red cube"
    for thing in things:
        here = segments[0] == SEGMENTS.index(thing.name)
        seen, true = images[0][here].astype(float).mean(0), np.array(COLOURS[thing.colour])
        # In the light of the lamp, but of its own colour.
        assert seen @ true > 0.95 * np.linalg.norm(seen) * np.linalg.norm(true), thing
    with pytest.raises(UserError, match="'sing'"):
        target_segment("sing")
    np.testing.assert_array_equal(env.reset(0, 3).images, images)  # colours are back


@simulated
def test_closing_one_leaves_the_pictures_of_another(env):
    before = env.reset(0, 0).images
    with Tabletop((80, 48), views=("front",)) as other:
        assert other.reset(1, 1).images.shape == (1, 80, 48, 3)
        np.testing.assert_array_equal(env._observe().images, before)
    np.testing.assert_array_equal(env._observe().images, before)


@simulated
def test_the_state_survives_packing_and_the_policy_is_the_expert(env):
    observation = env.reset(3, 0)
    state = env.state()
    unpacked = TabletopState.unpack(observation.state)
    np.testing.assert_allclose(unpacked.pack(), state.pack())
    assert (unpacked.square, unpacked.place) == (True, True)
    acted = expert_policy().act([observation], None, np.ones(1, bool))
    np.testing.assert_array_equal(acted.actions, expert_action(unpacked)[None, None])


@simulated
def test_senseless_requests_are_refused(env):
    with pytest.raises(UserError, match="no task 6"):
        env.reset(6, 0)
    with pytest.raises(UserError, match="too small"):
        Tabletop((4, 4))


def test_an_unknown_suite_is_refused():
    assert SUITES[0] == "tabletop"
    with pytest.raises(UserError, match="did you mean 'libero_spatial'"):
        make_suite("libero_spacial")


def test_what_is_missing_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    there = {"mujoco": True}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: there[name] or None if name in there else find_spec(name, *rest),
    )
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(UserError, match="libosmesa6"):
        Tabletop(SIZE)
    there["mujoco"] = False
    with pytest.raises(UserError, match=r"pip install -e '\.\[robot\]'"):
        Tabletop(SIZE)
