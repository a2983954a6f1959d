"""SIMPLER in its published protocol, on a stand-in for the simulator; with SIMPLER a few steps."""

import json
import os

import numpy as np
import pytest
from fake_simpler import write_simulator
from scipy.spatial.transform import Rotation

from data_pipelines.robot import simpler
from data_pipelines.robot.environment import make_suite
from data_pipelines.robot.policies import random_policy
from data_pipelines.robot.simpler_protocol import SUITES
from data_pipelines.robot.worker import Job
from data_pipelines.robot.workers import run_episodes
from fastdrive_jax.errors import UserError

installed = pytest.mark.skipif(simpler.absent() is not None, reason=str(simpler.absent()))
BRIDGE = "simpler_bridge"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Reads what the stand-in was made with so far."""
    log = tmp_path / "log"
    monkeypatch.setenv("SIMPLER_PYTHON", str(write_simulator(tmp_path)))
    monkeypatch.setenv("FAKE_SIMPLER_LOG", str(log))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def action(first=0.0, second=0.0, gripper=-1.0):
    return np.array([first, second, 0, 0, 0, 0, gripper])


@pytest.mark.parametrize(
    ("suite", "tasks", "trials", "steps"),
    [
        ("simpler_pick_coke_can", 3, 100, 80),
        ("simpler_move_near", 1, 240, 80),
        ("simpler_drawer", 6, 36, 113),
        ("simpler_bridge", 3, 24, 60),
        ("simpler_bridge_sink", 1, 24, 120),
    ],
)
def test_the_grids_are_the_published_ones(suite, tasks, trials, steps):
    found = SUITES[suite]
    assert (len(found.tasks), found.trials, found.max_steps) == (tasks, trials, steps)
    for scenes in found.tasks.values():
        assert len(scenes) == trials
        assert len({json.dumps([one.overlay, one.settings, one.reset]) for one in scenes}) == trials


def test_scenes_are_those_of_the_published_scripts():
    can = SUITES["simpler_pick_coke_can"].tasks["pick coke can that stands"]
    first, last = can[0], can[-1]
    assert first.environment == "GraspSingleOpenedCokeCanInScene-v0"
    assert first.overlay == "google_coke_can_real_eval_1.png"
    assert first.settings == {
        "robot": "google_robot_static",
        "scene_name": "google_pick_coke_can_1_v4",
        "upright": True,
        "urdf_version": None,
    }
    assert first.reset["robot_init_options"]["init_xy"] == [0.35, 0.20]
    assert first.reset["obj_init_options"] == {"init_xy": [-0.35, -0.02]}
    assert last.settings["urdf_version"] == "recolor_cabinet_visual_matching_1"
    assert last.reset["obj_init_options"]["init_xy"] == pytest.approx([-0.12, 0.42])
    places = {tuple(np.round(one.reset["obj_init_options"]["init_xy"], 4)) for one in can}
    assert {x for x, _ in places} == {-0.35, -0.2925, -0.235, -0.1775, -0.12}
    drawer = SUITES["simpler_drawer"].tasks["close bottom drawer"][7]
    assert drawer.environment == "CloseBottomDrawerCustomInScene-v0"
    assert drawer.overlay == "open_drawer_c1.png"
    assert drawer.reset["robot_init_options"]["init_xy"] == [0.765, 0.222]
    assert drawer.settings["shader_dir"] == "rt"
    # The robot is turned by half a circle and then by its heading.
    turned = drawer.reset["robot_init_options"]["init_rot_quat"]
    expected = Rotation.from_euler("z", -0.025) * Rotation.from_quat([0, 0, 1, 0])
    np.testing.assert_allclose(
        Rotation.from_quat([*turned[1:], turned[0]]).as_matrix(), expected.as_matrix(), atol=1e-12
    )
    (basket,) = SUITES["simpler_bridge_sink"].tasks.values()
    assert basket[0].settings["robot"] == "widowx_sink_camera_setup"
    assert basket[23].reset["obj_init_options"] == {"episode_id": 23}


def test_turns_are_about_fixed_axes():
    rng = np.random.default_rng(0)
    for angles in [*rng.uniform(-1, 1, (20, 3)), np.zeros(3), np.array([1e-4, 0, 0])]:
        expected = Rotation.from_euler("xyz", angles).as_rotvec()
        np.testing.assert_allclose(simpler.rotation_vector(*angles), expected, atol=1e-12)


def test_a_change_of_the_google_robots_gripper_is_carried_on_for_15_steps():
    opens = [1.0, 1.0, 0.0, *[1.0] * 14, 0.8, 0.0, 0.0]
    told, gripper = [], simpler.Gripper()
    for open in opens:
        change, gripper = gripper.follow(open)
        told.append(change)
    # Nothing at first; closing goes on whatever is asked for, and then small changes are as asked.
    np.testing.assert_allclose(told, [0, 0, *[1.0] * 15, 0.2, 0.8, 0.8], atol=1e-12)


def test_what_the_robots_are_told():
    gripper = simpler.Gripper()
    for gripped, expected in ((-1.0, 1.0), (-0.01, 1.0), (0.0, -1.0), (1.0, -1.0)):
        given = np.array([0.1, 0.2, 0.3, 0.3, 0, 0, gripped])
        told, after = simpler.robot_command("widowx", given, gripper)
        np.testing.assert_allclose(told, [0.1, 0.2, 0.3, 0.3, 0, 0, expected])
        assert after == gripper
    _, gripper = simpler.robot_command("google_robot", action(gripper=-1.0), gripper)
    told, gripper = simpler.robot_command("google_robot", action(gripper=0.5), gripper)
    assert told[6] == pytest.approx(0.75)  # from wholly open to a quarter


def test_openvlas_gripper_and_picture():
    given = np.full((2, 1, 7), 0.25)
    given[1, 0, 6] = 0.996
    turned = simpler.openvla_action(given)
    np.testing.assert_allclose(turned[..., 6], [[0.5], [-0.992]], rtol=1e-6)
    np.testing.assert_array_equal(turned[..., :6], given[..., :6])
    assert given[0, 0, 6] == 0.25
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, 32:] = 200
    shown = simpler.openvla_picture(image, 4)  # each pixel the mean of 12 x 16
    np.testing.assert_array_equal(shown[..., 0], [[0, 0, 200, 200]] * 4)


def test_an_episode_is_judged_after_its_last_step(made):
    env = make_suite(BRIDGE).open()
    seen = env.reset(1, 5)
    assert seen.instruction == "episode 5"
    assert seen.images.shape == (1, 48, 64, 3)
    quarter = [np.pi / 2, 0, 0]
    np.testing.assert_allclose(seen.proprio, [1, 2, 3, *quarter, 0, 0.5], atol=1e-6)
    for early in (True, False):
        env.reset(1, 5)
        firsts = [1.0 if early else 0.0] + [0.0] * 58 + [-1.0 if early else 1.0]
        ends = []
        for number, first in enumerate(firsts, 1):
            seen, done = env.step(action(first))
            ends.append(done)
            assert seen.images.max() == seen.step == number
        # Done early and undone at the end is a failure, done at the end is a success.
        assert ends == [False] * 59 + [not early]
    env.close()


def test_the_simulator_is_made_as_published_and_only_when_another_is_needed(made):
    env = make_suite("simpler_pick_coke_can").open()
    env.reset(2, 0)
    env.reset(2, 24)
    assert len(made()) == 1
    env.reset(2, 25)  # another colour
    first, second = made()
    assert second.pop("urdf_version") == "recolor_tabletop_visual_matching_1"
    assert first.pop("urdf_version") is None
    assert first == second == {
        "made": "GraspSingleOpenedCokeCanInScene-v0",
        "obs_mode": "rgbd",
        "robot": "google_robot_static",
        "control_mode": "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target"
        "_delta_pos_interpolate_by_planner",
        "control_freq": 3,
        "sim_freq": 513,
        "max_episode_steps": 80,
        "scene_name": "google_pick_coke_can_1_v4",
        "camera_cfgs": {"add_segmentation": True},
        "rgb_overlay_path": "/assets/real_inpainting/google_coke_can_real_eval_1.png",
        "rgb_overlay_cameras": ["overhead_camera"],
        "upright": True,
    }  # fmt: skip
    env.close()


def test_episodes_run_beside_each_other(made):
    suite = make_suite(BRIDGE)
    jobs = [Job(task, trial) for task in (0, 2) for trial in (0, 23)]
    ended = list(run_episodes(suite, jobs, random_policy(1), workers=2, batch=2))
    assert {(one.task, one.trial) for one in ended} == {(0, 0), (0, 23), (2, 0), (2, 23)}
    assert {one.steps for one in ended} == {60}
    assert suite.hz == 5


def test_a_simulator_that_fails_or_ends_is_named(made):
    env = make_suite(BRIDGE).open()
    env.reset(0, 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: the arm fell off"):
        env.step(action(second=9))
    with pytest.raises(UserError, match=r"(?s)SIMPLER_PYTHON.*exit code 3.*no Vulkan here"):
        env.step(action(second=8))
    env.close()


def test_what_is_missing_is_named(tmp_path, monkeypatch, made):
    with pytest.raises(UserError, match=r"no trial 24 of task 0; 3 tasks have 24 trials"):
        make_suite(BRIDGE).open().reset(0, 24)
    with pytest.raises(UserError, match="simpler_bridge has its own cameras"):
        make_suite(BRIDGE, image_size=(64, 64))
    monkeypatch.setenv("SIMPLER_PYTHON", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"SIMPLER_PYTHON names .*none, which is no program"):
        make_suite(BRIDGE)
    monkeypatch.delenv("SIMPLER_PYTHON")
    with pytest.raises(UserError, match=r"set SIMPLER_PYTHON .*docs/robot\.md"):
        make_suite(BRIDGE)


@installed
def test_a_few_steps_of_simpler():
    env = make_suite(os.environ.get("SIMPLER_SUITE", BRIDGE)).open()
    first = env.reset(0, 3)
    assert first.images.shape[0] == 1
    assert first.images.std() > 20
    assert first.proprio.shape == (8,)
    for step in range(1, 4):
        seen, done = env.step(action(0.02))
        assert seen.step == step
        assert not done
    assert not np.array_equal(seen.images, first.images)
    again = env.reset(0, 3)
    np.testing.assert_array_equal(again.images, first.images)
    np.testing.assert_array_equal(again.proprio, first.proprio)
    env.close()
