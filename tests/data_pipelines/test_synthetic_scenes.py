"""Scenes show what decides their plan, and their masks are exact."""

import dataclasses
from collections import Counter

import cv2
import numpy as np
import pytest
from world_figures import planning_figures

from data_pipelines.synthetic import sampler, scenery
from data_pipelines.synthetic.camera import make_camera
from data_pipelines.synthetic.config import (
    BARRIER,
    FOREGROUND_IDS,
    PERSON,
    ROAD,
    SIGN,
    TRAFFIC_LIGHT,
    VEHICLE,
    WorldConfig,
)
from data_pipelines.synthetic.mesh import MeshBuilder
from data_pipelines.synthetic.planner import DT, waypoints
from data_pipelines.synthetic.record import encode
from data_pipelines.synthetic.render import prepare, render
from data_pipelines.synthetic.sampler import (
    keyframe_indices,
    rollout,
    sample_scene,
    scenario_name,
)
from data_pipelines.synthetic.scenarios import CYCLE
from data_pipelines.synthetic.scene import Actor
from fastdrive_jax.errors import UserError

CONFIG = WorldConfig(seed=3)
KEYFRAMES = CONFIG.keyframes_per_scene


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(CONFIG, "train", k) for k in range(len(CYCLE))]


def _front(scene, states, k, stage=None, actors=None):
    if actors is not None:
        scene = dataclasses.replace(scene, actors=actors)
    camera = make_camera("CAM_FRONT", CONFIG.height, CONFIG.width, scene.pitch["CAM_FRONT"])
    step = keyframe_indices(KEYFRAMES)[k]
    return render(scene, stage or prepare(scene), camera, states[step], step * DT, scene.sway[k], k)


def test_every_cycle_holds_every_scenario(scenes):
    assert Counter(scene.scenario for scene in scenes) == Counter(CYCLE)
    again = [scenario_name(CONFIG.seed, "train", len(CYCLE) + k) for k in range(len(CYCLE))]
    assert Counter(again) == Counter(CYCLE)
    assert again != [scene.scenario for scene in scenes]


@pytest.mark.parametrize(
    ("scenario", "label", "least"),
    [
        ("red_light", TRAFFIC_LIGHT, 40),
        ("person_on_road", PERSON, 40),
        ("stop_sign", SIGN, 15),
        ("lead_stopped", VEHICLE, 80),
        ("lead_slow", VEHICLE, 20),
        ("lead_moving", VEHICLE, 60),
    ],
)
def test_what_the_plan_needs_is_seen_in_every_key_frame(scenes, scenario, label, least):
    for scene in [s for s in scenes if s.scenario == scenario]:
        states, stage = rollout(scene, KEYFRAMES), prepare(scene)
        kept = tuple(a for a in scene.actors if a.critical_height is None)
        assert len(kept) < len(scene.actors)
        for k in range(KEYFRAMES):
            with_it = _front(scene, states, k, stage)
            without = _front(scene, states, k, actors=kept)
            gained = (with_it.labels != without.labels) & (with_it.labels == label)
            assert gained.sum() >= least, (scene.name, k)


def test_scenery_never_hides_what_the_plan_needs(scenes):
    """A tree half way to the hazard is dropped, the same tree well beside the line is kept."""
    tree = scenery.tree(np.random.default_rng(0), 6.0, (60, 100, 40))
    checked = 0
    for scene in scenes:
        hazards = [k for k, a in enumerate(scene.actors) if a.critical_height]
        if not hazards or scene.scenario == "barrier_avoid":
            continue
        states = rollout(scene, KEYFRAMES)
        lines = sampler._sight_lines(scene, states, KEYFRAMES)
        state = states[keyframe_indices(KEYFRAMES)[0]]
        hazard, _ = scene.actors[hazards[0]].pose(0.5, state.s)
        eye = np.array([state.x, state.y])
        across = np.array([eye[1] - hazard[1], hazard[0] - eye[0]])
        across = across / np.linalg.norm(across)
        for place, hides in (((eye + hazard) / 2, True), ((eye + hazard) / 2 + 30 * across, False)):
            actor = Actor(tree, (float(place[0]), float(place[1])), 0.0)
            assert sampler._blocks(actor, lines) == hides, (scene.name, hides)
        kept = [a for a in scene.actors if not a.critical_height and a.motion is None]
        assert not any(sampler._blocks(a, lines) for a in kept if not a.category)
        checked += 1
    assert checked >= 8


def test_barriers_are_seen_before_they_are_passed(scenes):
    for scene in [s for s in scenes if s.scenario == "barrier_avoid"]:
        states = rollout(scene, KEYFRAMES)
        assert (_front(scene, states, 0).labels == BARRIER).sum() >= 60
        lateral = [waypoints(states, k)[:, 1].max() for k in keyframe_indices(KEYFRAMES)]
        assert max(lateral) > 0.8  # passes on the left


def test_red_and_green_differ_in_the_lamp_and_in_the_plan(scenes):
    green = next(s for s in scenes if s.scenario == "green_light")
    red = next(s for s in scenes if s.scenario == "red_light")
    assert not green.task.stops
    assert red.task.stops
    for scene, channel in ((red, 0), (green, 1)):
        picture = _front(scene, rollout(scene, KEYFRAMES), 0)
        lamp = picture.image[picture.labels == TRAFFIC_LIGHT].astype(int)
        lit = lamp[:, channel] - lamp[:, 1 - channel]
        assert (lit > 60).sum() >= 6


def test_turns_follow_the_command(scenes):
    for scene in scenes:
        states = rollout(scene, KEYFRAMES)
        turned = states[-1].yaw - states[0].yaw
        if scene.scenario == "turn_left":
            assert scene.command_at(states[0]) == 0
            assert turned > 0.25
        elif scene.scenario == "turn_right":
            assert scene.command_at(states[0]) == 2
            assert turned < -0.25
        else:
            assert scene.command_at(states[0]) == 1


def test_nothing_stands_in_the_way_of_the_ego_car(scenes):
    for scene in scenes:
        states = rollout(scene, KEYFRAMES)
        for k, state in enumerate(states):
            along = np.array([np.cos(state.yaw), np.sin(state.yaw)])
            for actor in scene.actors:
                if not actor.category:
                    continue
                xy, _ = actor.pose(k * DT, state.s)
                offset = xy - [state.x, state.y]
                ahead, aside = offset @ along, abs(offset @ [-along[1], along[0]])
                half = min(actor.size[:2]) / 2
                inside = -0.8 - half < ahead < 3.7 + half and aside < 0.85 + half * 0.8
                assert not inside, (scene.name, scene.scenario, actor.category, k * DT)


def test_mask_is_the_foreground_of_the_labels(scenes):
    picture = _front(scenes[0], rollout(scenes[0], KEYFRAMES), 0)
    jpeg, mask, labels = encode(picture, 92)
    mask = cv2.imdecode(np.frombuffer(mask, np.uint8), cv2.IMREAD_UNCHANGED)
    labels = cv2.imdecode(np.frombuffer(labels, np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(labels, picture.labels)
    assert np.array_equal(mask > 0, np.isin(labels, FOREGROUND_IDS))
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert image.shape == (224, 392, 3)
    assert np.abs(image.astype(int) - picture.image).mean() < 12


def test_near_things_hide_far_things(scenes):
    """A wall set before the car leaves no trace of what is behind it, in labels or visibility."""
    scene = next(s for s in scenes if s.scenario == "lead_stopped")
    states = rollout(scene, KEYFRAMES)
    state = states[keyframe_indices(KEYFRAMES)[0]]
    wall = MeshBuilder(1)
    wall.box((0, 0, 0), (0.2, 40.0, 40.0), (200, 100, 50))
    place = (state.x + 6 * np.cos(state.yaw), state.y + 6 * np.sin(state.yaw))
    actors = (*scene.actors, Actor(wall.build(), place, state.yaw))
    hidden = _front(scene, states, 0, actors=actors)
    assert (hidden.labels == 1).mean() > 0.95
    lead = next(k for k, a in enumerate(scene.actors) if a.critical_height)
    assert _front(scene, states, 0).visible[lead] > 0.5
    assert hidden.visible[lead] == 0


def test_road_lies_below_the_car(scenes):
    hits = 0
    for scene in scenes:
        labels = _front(scene, rollout(scene, KEYFRAMES), 0).labels
        hits += (labels[-20:, 150:250] >= ROAD).mean() > 0.8
    assert hits >= 0.9 * len(scenes)


def test_render_is_a_pure_function(scenes):
    states = rollout(scenes[4], KEYFRAMES)
    first, second = (_front(scenes[4], states, 2) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.labels, second.labels)


def test_plans_depend_on_more_than_the_speed():
    figures = planning_figures(WorldConfig(seed=1, train_scenes=63, val_scenes=0))
    assert figures["hazard_share"] >= 0.65
    assert figures["constant_velocity_l2"] > 2.4
    assert figures["standing_share"] < 0.15


def test_recovery_scenes_get_back_to_the_lane_and_set_off(scenes):
    config = dataclasses.replace(CONFIG, recovery=1.0)
    found = [sample_scene(config, "train", k) for k in range(len(CYCLE))]
    standing = [scene for scene in found if scene.task.hold]
    assert 2 < len(standing) < len(CYCLE) - 4
    first = keyframe_indices(KEYFRAMES)[0]
    for scene in found:
        states = rollout(scene, KEYFRAMES)
        lane = [scene.task.route.at(state.s)[0] for state in states]
        off = np.hypot(*(np.array([(s.x, s.y) for s in states]) - lane).T)
        if scene in standing:
            assert states[first].speed == 0
            assert waypoints(states, first)[-1, 0] > 1.5  # nothing keeps it
        elif off[0] > 0.6:
            assert off[-1] < 0.5 * off[0], scene.scenario
    assert sum(not s.task.hold for s in found) == len(found) - len(standing)
    # Without recovery all is as it was, and scenes keep their situations with it.
    assert [s.scenario for s in found] == [s.scenario for s in scenes]
    none = sample_scene(dataclasses.replace(CONFIG, recovery=0.0), "train", 0)
    assert none.start == scenes[0].start


def test_a_share_of_recovery_scenes_is_in_its_range():
    with pytest.raises(UserError, match=r"recovery=1\.5 is outside 0 to 1"):
        WorldConfig(recovery=1.5)
