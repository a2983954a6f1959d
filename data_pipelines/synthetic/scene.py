"""One frozen description of a scene: roads, actors, the driver's task, weather and calibration."""

from dataclasses import dataclass

import numpy as np

from data_pipelines.schema import STRAIGHT
from data_pipelines.synthetic.geometry import Path, Terrain, rotation_z
from data_pipelines.synthetic.mesh import Mesh
from data_pipelines.synthetic.planner import EgoState, Task
from data_pipelines.synthetic.roads import Road, Strip

WARM_UP = 0.5  # seconds driven before the first key frame, so that its acceleration is defined


@dataclass(frozen=True)
class Motion:
    """Constant-speed travel along a path.

    Attributes:
        path: The curve.
        s: Arc length at time 0.
        speed: m/s along the path, negative against it.
        lateral: Offset to the left of the path.
        follows_ego: `s` and `speed` are replaced by the ego's progress plus `s` (a car behind).
    """

    path: Path
    s: float
    speed: float
    lateral: float
    follows_ego: bool = False

    def pose(self, time, ego_s):
        """Position `[..., 2]` and heading `[...]` at times `[...]` and ego progress `[...]`."""
        s = self.s + (ego_s if self.follows_ego else self.speed * time)
        xy, heading = self.path.beside(s, self.lateral)
        return xy, heading + (np.pi if self.speed < 0 else 0.0)


@dataclass(frozen=True)
class Recording:
    """Travel as it was recorded, straight between the samples and held before and after them.

    Attributes:
        times: `[n]` seconds, rising.
        xy: `[n, 2]` positions.
        yaw: `[n]` headings without jumps of a whole turn.
        known: `[n]` whether the actor was there at each sample.
    """

    times: np.ndarray
    xy: np.ndarray
    yaw: np.ndarray
    known: np.ndarray

    def pose(self, time, ego_s):
        """Position `[..., 2]` and heading `[...]` at times `[...]`, whatever the ego car does."""
        del ego_s
        xy = [np.interp(time, self.times, self.xy[:, k]) for k in (0, 1)]
        return np.stack(xy, -1), np.interp(time, self.times, self.yaw)

    def present(self, time):
        """Whether the actor is there, bool `[...]`: known at the sample nearest in time."""
        middles = (self.times[1:] + self.times[:-1]) / 2
        return self.known[np.searchsorted(middles, time, side="right")]


@dataclass(frozen=True)
class Actor:
    """Anything that stands on the ground; those with a category are annotated with a box.

    Attributes:
        mesh: Its model.
        xy: Position `[2]` at time 0.
        yaw: Heading at time 0.
        category: nuScenes category name, or "" for scenery, signs and lights.
        attribute: nuScenes attribute name or "".
        size: (width, length, height) of the annotated box in metres.
        motion: How it moves; None stands still.
        critical_height: Height above ground that the driver must see, or None where the driver's
            plan does not depend on it.
        centre: Offset `[2]` in the actor's frame of the part that must be seen.
    """

    mesh: Mesh
    xy: tuple[float, float]
    yaw: float
    category: str = ""
    attribute: str = ""
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)
    motion: Motion | Recording | None = None
    critical_height: float | None = None
    centre: tuple[float, float] = (0.0, 0.0)

    def pose(self, time: float, ego_s: float) -> tuple[np.ndarray, float]:
        """Position `[2]` and heading at `time` seconds."""
        if self.motion is None:
            return np.asarray(self.xy), self.yaw
        xy, heading = self.motion.pose(time, ego_s)
        return xy, float(heading)

    def present(self, time: float) -> bool:
        """Whether it is there at `time` seconds; only recorded actors come and go."""
        return not isinstance(self.motion, Recording) or bool(self.motion.present(time))


@dataclass(frozen=True)
class Look:
    """Weather and light of a scene.

    Attributes:
        sun: Unit vector `[3]` towards the light.
        ambient: Brightness of faces turned away from the light, 0..1.
        exposure: Gain for the whole picture.
        tint: `[3]` gain per colour channel.
        sky: `[2, 3]` colours at the zenith and at the horizon.
        clouds: Opacity of clouds, 0..1.
        haze: Distance in metres over which colours fade by 63%.
        grass: Colour of the open ground.
        pavement: Colour of the pavement.
        asphalt: Colour of the road.
        noise: Sensor noise in grey levels.
        texture: Seed of texture offsets.
    """

    sun: np.ndarray
    ambient: float
    exposure: float
    tint: np.ndarray
    sky: np.ndarray
    clouds: float
    haze: float
    grass: tuple[float, float, float]
    pavement: tuple[float, float, float]
    asphalt: tuple[float, float, float]
    noise: float
    texture: int


@dataclass(frozen=True)
class Scene:
    """A whole scene in its own flat-origin frame.

    Attributes:
        name: "scene-0001"-like name, unique in the data set.
        scenario: Name of the situation, such as "red_light".
        main: The through road.
        branches: (arc length, side, road) of the side roads.
        strips: Ground polygons in painting order.
        terrain: Hills.
        task: What the driver obeys.
        command: Command before `command_end` metres of route; straight afterwards.
        command_end: Route arc length at which a turn is over.
        start: Ego state at time 0.
        actors: Everything that stands or moves.
        look: Weather.
        pitch: Camera pitch in radians by channel.
        sway: `[keyframes, 2]` pitch and roll of the body in radians.
        world_yaw: Rotation of the scene in the global frame.
        world_shift: Translation `[3]` of the scene in the global frame.
        location: Map name.
        split: "train" or "val".
    """

    name: str
    scenario: str
    main: Road
    branches: tuple[tuple[float, int, Road], ...]
    strips: tuple[Strip, ...]
    terrain: Terrain
    task: Task
    command: int
    command_end: float
    start: EgoState
    actors: tuple[Actor, ...]
    look: Look
    pitch: dict[str, float]
    sway: np.ndarray
    world_yaw: float
    world_shift: np.ndarray
    location: str
    split: str

    def command_at(self, state: EgoState) -> int:
        """Navigation command at an ego state."""
        return self.command if state.s < self.command_end else STRAIGHT

    def to_world(self, rotation: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global rotation and points of a local rotation `[3, 3]` and points `[..., 3]`."""
        turn = rotation_z(self.world_yaw)
        return turn @ rotation, points @ turn.T + self.world_shift
