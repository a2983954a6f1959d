"""What is driven: a situation of the world or a log, and how its own driver does there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import numpy as np

from data_pipelines.ego import command_of
from data_pipelines.nuscenes.scenario_log import ScenarioLog, read_scenario_log
from data_pipelines.schema import FUTURE_STEPS, STEP_SECONDS, STRAIGHT
from data_pipelines.synthetic import meshes
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.geometry import Path
from data_pipelines.synthetic.log_scene import log_scene, logged_states, scene_frame
from data_pipelines.synthetic.planner import DT, EgoState, simulate, step, waypoints
from data_pipelines.synthetic.sampler import sample_scene
from data_pipelines.synthetic.scene import WARM_UP, Actor, Scene
from fastdrive_jax.errors import UserError

GREEN = (10, 15)  # half seconds between which a red light turns green
STOP_KINDS = {"red_light": "red_light", "stop_sign": "stop_sign"}  # scenarios with a stop line


@dataclass(frozen=True)
class StopLine:
    """A line that the front bumper must not pass.

    Attributes:
        kind: "red_light", or "stop_sign", which may be passed after a halt.
        s: Arc length along the route.
        until: Seconds of the drive from which on it may be passed.
    """

    kind: str
    s: float
    until: float = math.inf


@dataclass(frozen=True)
class Route:
    """One drive.

    Attributes:
        name: Unique among the routes.
        scenario: Name of the situation, "log" for logs.
        phases: (begin in seconds of the drive, scene); scenes differ in what changes, such as a
            light.
        path: The way to go.
        lines: Stop lines on it.
        reference: `[steps + 1]` states of the world's own driver, or of the logged car, every
            `DT` seconds.
        commands: `[steps + 1]` command at each of the reference's places; of logs only.
        begin: Seconds of the scene at which the drive begins; its own time starts with 0 there.
    """

    name: str
    scenario: str
    phases: tuple[tuple[float, Scene], ...]
    path: Path
    lines: tuple[StopLine, ...]
    reference: tuple[EgoState, ...]
    commands: tuple[int, ...] = ()
    begin: float = 0.0

    @property
    def logged(self) -> bool:
        """Whether it is a log."""
        return self.scenario == "log"

    def phase(self, time: float) -> int:
        """Which phase it is at a time."""
        return sum(time >= begin for begin, _ in self.phases[1:])

    def scene(self, time: float) -> Scene:
        """The scene at a time."""
        return self.phases[self.phase(time)][1]

    def command(self, state: EgoState) -> int:
        """Navigation command at a state; in a log that of the logged car when it was as far."""
        if not self.logged:
            return self.phases[0][1].command_at(state)
        reached = np.maximum.accumulate([there.s for there in self.reference])
        return self.commands[min(int(np.searchsorted(reached, state.s)), len(reached) - 1)]


def world_route(config: WorldConfig, split: str, index: int, seconds: float) -> Route:
    """A scene of the world as a route; a red light turns green after a time the index decides.

    Args:
        config: The world, of which the seed and the picture's size matter.
        split: "train" or "val".
        index: Of the scene; it need not be among those that `config` writes.
        seconds: Duration.
    """
    scene = sample_scene(config, split, index)
    phases = [(0.0, scene)]
    if scene.scenario == "red_light":
        when = np.random.default_rng([config.seed, index, split == "val"]).integers(*GREEN) / 2
        phases.append((float(when), turned_green(scene)))
    kind = STOP_KINDS.get(scene.scenario)
    until = phases[1][0] if len(phases) > 1 else math.inf
    lines = tuple(StopLine(kind, s, until) for s in scene.task.stops) if kind else ()
    # As in the world's data, where cars that have just set off are never seen.
    states = simulate(scene.task, scene.start, WARM_UP)[-1:]
    kept = tuple(phases), scene.task.route, lines, ()
    route = Route(scene.name, scene.scenario, *kept, begin=WARM_UP)
    for k in range(round(seconds / DT)):
        states.append(step(route.scene(k * DT).task, states[-1], WARM_UP + k * DT))
    return replace(route, reference=tuple(states))


def turned_green(scene: Scene) -> Scene:
    """The scene of a red light once it is green: the driver need not stop."""

    def green(actor: Actor) -> Actor:
        if actor.category or actor.critical_height is None:
            return actor
        # The height and reach that `scenarios` gave the head, which its critical part tells.
        mesh = meshes.traffic_light("green", actor.centre[1], actor.critical_height - 2.4)
        return replace(actor, mesh=mesh)

    actors = tuple(green(actor) for actor in scene.actors)
    return replace(scene, actors=actors, task=replace(scene.task, stops=()))


def log_routes(folder: FilePath, seconds: float, seed: int = 0) -> list[Route]:
    """All logs `scene-*.json` and `scene-*.json.gz` in a folder.

    Args:
        folder: Where they are.
        seconds: Duration; the log must last three seconds longer.
        seed: Of the looks.

    Raises:
        UserError: There is no log, or one is too short.
    """
    files = sorted(FilePath(folder).glob("scene-*.json*"))
    if not files:
        raise UserError(f"There is no log scene-*.json.gz in {folder}; name another folder.")
    return [log_route(read_scenario_log(file), seconds, seed) for file in files]


def log_route(log: ScenarioLog, seconds: float, seed: int = 0) -> Route:
    """A log as a route, with the logged car as its reference.

    Raises:
        UserError: The log has another rate than 10 Hz, or is too short.
    """
    steps, ahead = round(seconds / DT), round(FUTURE_STEPS * STEP_SECONDS / DT)
    if abs(log.rate * DT - 1) > 1e-6:
        raise UserError(f"{log.name} has {log.rate} steps a second; 10 are needed.")
    if len(log.ego.heading) < steps + ahead + 1:
        last = (len(log.ego.heading) - ahead - 1) * DT
        raise UserError(f"{log.name} can be driven for {last:.1f} s, fewer than {seconds}.")
    scene = log_scene(log, seed)
    states = logged_states(log, scene_frame(scene), scene.task.route)
    known = np.ones(FUTURE_STEPS, bool)
    commands = [
        command_of(waypoints(states, k), known) if k + ahead < len(states) else STRAIGHT
        for k in range(len(states))
    ]
    return Route(
        log.name,
        "log",
        ((0.0, scene),),
        scene.task.route,
        (),
        tuple(states),
        tuple(commands),
    )


def expert_waypoints(route: Route, state: EgoState, time: float) -> np.ndarray:
    """What the route's own driver would do from a state on, `[6, 2]` in the flat ego frame.

    In the world that is its planner, which does not know when a light will change; in a log it is
    where the logged car was at those times.
    """
    if not route.logged:
        task = route.scene(time).task
        states = [state]
        for k in range(round(FUTURE_STEPS * STEP_SECONDS / DT)):
            states.append(step(task, states[-1], route.begin + time + k * DT))
        return waypoints(states, 0)
    stride, now = round(STEP_SECONDS / DT), round(time / DT)
    later = [min(now + stride * (k + 1), len(route.reference) - 1) for k in range(FUTURE_STEPS)]
    offset = np.array([[route.reference[k].x - state.x, route.reference[k].y - state.y]
                       for k in later])  # fmt: skip
    c, s = math.cos(state.yaw), math.sin(state.yaw)
    return offset @ np.array([[c, -s], [s, c]])


def state_rows(states: Sequence[EgoState]) -> np.ndarray:
    """`[n, 7]` x, y, yaw, speed, s, acceleration and yaw rate."""
    return np.array([(s.x, s.y, s.yaw, s.speed, s.s, s.acceleration, s.yaw_rate) for s in states])


def displaced(state: EgoState, lateral: float, turn: float) -> EgoState:
    """The car moved `lateral` metres to its left and turned by `turn` radians.

    With `expert_waypoints` and `camera.Studio` this gives pictures and plans of states that the
    world's own driver never gets into.
    """
    return replace(
        state,
        x=state.x - lateral * math.sin(state.yaw),
        y=state.y + lateral * math.cos(state.yaw),
        yaw=state.yaw + turn,
    )
