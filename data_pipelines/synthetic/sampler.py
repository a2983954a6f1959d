"""Draws whole scenes; a scene depends on (seed, split, index) and nothing else."""

import itertools
import math
from dataclasses import replace

import numpy as np

from data_pipelines.schema import CAMERAS, STEP_SECONDS
from data_pipelines.synthetic import decor
from data_pipelines.synthetic.camera import make_camera
from data_pipelines.synthetic.config import SPLITS, WorldConfig
from data_pipelines.synthetic.geometry import Terrain, pose_on
from data_pipelines.synthetic.planner import DT, FRONT_OVERHANG, EgoState, simulate
from data_pipelines.synthetic.roads import surface
from data_pipelines.synthetic.scenarios import CYCLE, Situation, build
from data_pipelines.synthetic.scene import WARM_UP, Look, Scene

TILE = 160.0  # metres of map that each scene gets
TILES = 4  # tiles on each side of a map
STANDING = 0.4  # of the scenes that begin as the driver's own never do
OFF_LANE = np.array([1.2, 0.2])  # metres and radians, at most, of the others of them
_ATTEMPTS = 400


def keyframe_indices(keyframes: int) -> list[int]:
    """Simulation steps at which the key frames lie."""
    return [round((WARM_UP + STEP_SECONDS * k) / DT) for k in range(keyframes)]


def rollout(scene: Scene, keyframes: int, task=None) -> list[EgoState]:
    """Ego states every 0.1 s until 3 s after the last key frame."""
    seconds = WARM_UP + STEP_SECONDS * (keyframes - 1) + 3.0
    return simulate(task or scene.task, scene.start, seconds)


def scenario_name(seed: int, split: str, index: int) -> str:
    """Scenario of a scene: every run of len(CYCLE) scenes holds the whole cycle, shuffled."""
    block, place = divmod(index, len(CYCLE))
    rng = np.random.default_rng([seed, SPLITS.index(split), 1, block])
    return CYCLE[rng.permutation(len(CYCLE))[place]]


def sample_scene(config: WorldConfig, split: str, index: int) -> Scene:
    """Scene `index` of `split`, redrawn until all that the driver reacts to is in the picture."""
    name = scenario_name(config.seed, split, index)
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng([config.seed, SPLITS.index(split), 2, index, attempt])
        scene = _draw(config, split, index, name, rng)
        if scene is not None:
            return scene
    raise RuntimeError(f"no valid {name} scene for seed {config.seed} {split} {index}")


def _draw(config, split, index, name, rng) -> Scene | None:
    # Drawn from a source of its own, so that all other scenes stay as they are without it.
    own = np.random.default_rng([config.seed, SPLITS.index(split), 3, index])
    recovers = own.random() < config.recovery
    stands = recovers and own.random() < STANDING
    sit = build(name, rng, stands)
    terrain = _terrain(rng)
    offset, turn = np.clip(rng.normal(0, 0.18), -0.45, 0.45), rng.normal(0, 0.03)
    turn = np.clip(turn, -0.08, 0.08)
    if stands:
        sit.task = replace(sit.task, hold=WARM_UP)  # at the first key frame it may go
    elif recovers:
        offset, turn = rng.uniform(-1, 1, 2) * OFF_LANE
    xy, heading = sit.task.route.beside(0.0, offset)
    yaw = float(heading + turn)
    start = EgoState(float(xy[0]), float(xy[1]), yaw, sit.speed, 0.0)
    keyframes = config.keyframes_per_scene
    pitch = float(rng.uniform(-0.11, 0.165))
    tile = index % (TILES * TILES)
    world_yaw = float(rng.uniform(-math.pi, math.pi))
    pavement = float(rng.uniform(1.6, 3.6))
    sway = np.clip(rng.normal(0, [0.008, 0.006], (keyframes, 2)), -0.02, 0.02)
    middle = np.array([25 * math.cos(world_yaw), 25 * math.sin(world_yaw)])
    corner = np.array([tile % TILES, tile // TILES]) * TILE + TILE / 2 - middle
    scene = Scene(
        name=f"scene-{SPLITS.index(split) + 1}{index:04d}",
        scenario=name,
        main=sit.main,
        branches=tuple(sit.branches),
        strips=tuple(surface(sit.main, sit.branches, pavement) + sit.strips),
        terrain=terrain,
        task=sit.task,
        command=sit.command,
        command_end=sit.command_end,
        start=start,
        actors=tuple(sit.actors),
        look=draw_look(rng),
        pitch={c: pitch + float(rng.normal(0, 0.012)) for c in CAMERAS},
        sway=sway,
        world_yaw=world_yaw,
        world_shift=np.append(corner, 0.0),
        location=f"synthetic-{split}-{index // (TILES * TILES):03d}",
        split=split,
    )
    states = rollout(scene, keyframes)
    if not _all_seen(scene, sit, states, config):
        return None
    scenery = decor.decorate(sit, rng, pavement)
    sight = _sight_lines(scene, states, keyframes)
    kept = [a for a in scenery if not _blocks(a, sight)]
    return _replace_actors(scene, (*sit.actors, *kept))


def _replace_actors(scene, actors):
    return Scene(**{**{f: getattr(scene, f) for f in scene.__dataclass_fields__}, "actors": actors})


def _terrain(rng) -> Terrain:
    angles, lengths = rng.uniform(-np.pi, np.pi, 2), rng.uniform(180, 380, 2)
    waves = (2 * np.pi / lengths)[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1)
    slopes = tuple(float(x) for x in rng.uniform(0.0, 0.035, 2))
    return Terrain(slopes, waves, tuple(float(x) for x in rng.uniform(-np.pi, np.pi, 2)))


def draw_look(rng: np.random.Generator) -> Look:
    """Weather and light of a scene."""
    kind = rng.choice(["day", "overcast", "dusk", "haze"], p=[0.45, 0.25, 0.18, 0.12])
    azimuth, height = rng.uniform(-np.pi, np.pi), rng.uniform(0.4, 1.2)
    sun = np.array(
        [np.cos(azimuth) * np.cos(height), np.sin(azimuth) * np.cos(height), np.sin(height)]
    )
    ambient, exposure, clouds, haze = rng.uniform(0.5, 0.62), rng.uniform(0.85, 1.12), 0.8, 260.0
    tint = rng.normal(1.0, 0.03, 3)
    sky = np.array([[86, 140, 216], [190, 212, 232]], float)
    if kind == "overcast":
        ambient, clouds, haze = 0.8, 0.4, 180.0
        sky = np.array([[150, 158, 168], [206, 210, 214]], float)
    elif kind == "dusk":
        exposure, haze = rng.uniform(0.6, 0.8), 200.0
        tint = tint * [1.08, 0.96, 0.88]
        sky = np.array([[58, 70, 128], [238, 164, 112]], float)
    elif kind == "haze":
        ambient, haze, clouds = 0.72, 90.0, 0.3
        sky = np.array([[176, 186, 194], [216, 218, 218]], float)
    grass = [(96, 122, 58), (124, 120, 72), (78, 104, 60), (146, 132, 96)][rng.integers(0, 4)]
    grey, asphalt = rng.uniform(128, 186), rng.uniform(62, 112)
    return Look(
        sun=sun,
        ambient=float(ambient),
        exposure=float(exposure),
        tint=tint,
        sky=np.clip(sky + rng.normal(0, 8, (2, 3)), 0, 255),
        clouds=float(clouds),
        haze=haze,
        grass=tuple(float(c + rng.normal(0, 10)) for c in grass),
        pavement=tuple(float(grey + d) for d in rng.normal(0, 8, 3)),
        asphalt=tuple(float(asphalt + d) for d in rng.normal(0, 4, 3)),
        noise=float(rng.uniform(1.0, 5.0)),
        texture=int(rng.integers(0, 2**31)),
    )


def _critical_points(scene: Scene, sit: Situation, time: float, state: EgoState):
    """Points `[3]` that must be in the picture now, in scene coordinates."""
    for actor in scene.actors:
        if actor.critical_height is None:
            continue
        xy, yaw = actor.pose(time, state.s)
        c, s = math.cos(yaw), math.sin(yaw)
        a, b = actor.centre
        spot = xy + np.array([a * c - b * s, a * s + b * c])
        if scene.scenario == "green_light" or actor.category == "movable_object.barrier":
            ahead = (spot - [state.x, state.y]) @ [math.cos(state.yaw), math.sin(state.yaw)]
            near = 18.0 if not actor.category else FRONT_OVERHANG + 4.0
            if ahead < near:
                continue
        yield scene.terrain.lift(spot, actor.critical_height)
    for point, until in sit.critical_points:
        if state.s < until:
            yield scene.terrain.lift(point[:2], point[2])


def _all_seen(scene, sit, states, config) -> bool:
    camera = make_camera("CAM_FRONT", config.height, config.width, scene.pitch["CAM_FRONT"])
    margin = 0.012 * config.width
    if any(b.s < a.s - 0.5 for a, b in itertools.pairwise(states)):
        return False
    for stop in scene.task.stops:
        if states[-1].s + FRONT_OVERHANG > stop - 0.3:
            return False
    if scene.task.lead is not None:
        rear, speed = scene.task.lead
        gaps = [rear + speed * k * DT - s.s - FRONT_OVERHANG for k, s in enumerate(states)]
        if min(gaps) < 1.0:
            return False
    for k, index in enumerate(keyframe_indices(config.keyframes_per_scene)):
        state = states[index]
        sway = scene.sway[k]
        rotation, origin = pose_on(scene.terrain, (state.x, state.y), state.yaw, *sway)
        for point in _critical_points(scene, sit, index * DT, state):
            pixel, depth = camera.project((point - origin) @ rotation)
            inside = margin <= pixel[0] <= config.width - margin
            if depth < 2.0 or not inside or not margin <= pixel[1] <= config.height - margin:
                return False
    return True


def _sight_lines(scene: Scene, states, keyframes):
    """(time, progress, eye `[2]`, target `[2]`, half width) of all that must stay in view."""
    lines = []
    for index in keyframe_indices(keyframes):
        state = states[index]
        eye = np.array([state.x + 1.7 * math.cos(state.yaw), state.y + 1.7 * math.sin(state.yaw)])
        for actor in scene.actors:
            if actor.critical_height is None:
                continue
            xy, yaw = actor.pose(index * DT, state.s)
            c, s = math.cos(yaw), math.sin(yaw)
            a, b = actor.centre
            target = xy + np.array([a * c - b * s, a * s + b * c])
            lines.append((index * DT, state.s, eye, target, 0.8))
        for ahead in (8.0, 16.0, 24.0):  # the road that the plan will use
            target, _ = scene.task.route.at(state.s + ahead)
            lines.append((index * DT, state.s, eye, target, 0.5))
    return lines


def _blocks(actor, lines) -> bool:
    if actor.mesh.billboard and not actor.category:
        radius = 0.35 * float(actor.mesh.vertices[..., 2].max())
    elif actor.category:
        radius = 0.5 * actor.size[0] + 0.3
    else:
        radius = float(np.linalg.norm(actor.mesh.vertices[..., :2], axis=-1).max())
    for time, progress, eye, target, half in lines:
        xy, _ = actor.pose(time, progress)
        ray = target - eye
        length = float(np.hypot(*ray))
        if length < 1e-3:
            continue
        along = float((xy - eye) @ ray) / length
        across = abs(float(ray[0] * (xy[1] - eye[1]) - ray[1] * (xy[0] - eye[0]))) / length
        if 0.0 < along < length + 0.3 and across < radius + half * along / length:
            return True
    return False
