"""A tabletop scene: where things lie, and the MJCF text that MuJoCo builds it from.

Metres; z is up from the table's top. The robot is a two-finger gripper that slides along x, y and z
and turns about z. Its weight and that of its fingers is compensated, as a robot's controller does.
"""

from dataclasses import dataclass

import numpy as np

from data_pipelines.robot.tasks import COLOURS, DISTRACTORS, TASKS, THINGS, Thing

TIMESTEP = 0.005
REACH = np.array([[-0.20, -0.22, 0.014], [0.20, 0.22, 0.28]])  # where the fingertips may be
FINGER_TRAVEL = 0.04  # of each finger
TRAY_INSIDE = 0.055  # half its width
TRAY_RIM = 0.022
_ROOM = np.array([0.15, 0.17])  # things lie within +- this
_APART = 0.085  # centres of things
_TURN = 0.35  # radians; less than an eighth of a turn from the gripper's, so a cube has one nearest
_TRAY_APART = 0.115
# A thing is some 8 pixels wide in the front picture, so shapes differ in size and height too.
_HEIGHT = {"cube": 0.020, "ball": 0.017, "cylinder": 0.034}  # of the centre above the table
_HALF_WIDTH = {"cube": 0.020, "ball": 0.017, "cylinder": 0.017}
_SIZE = {"cube": "0.02 0.02 0.02", "ball": "0.017", "cylinder": "0.017 0.034"}
_TYPE = {"cube": "box", "ball": "sphere", "cylinder": "cylinder"}


@dataclass(frozen=True)
class Placed:
    """A thing and where it lies.

    Attributes:
        thing: What.
        x: Of its centre.
        y: Of its centre.
        yaw: Its turn.
    """

    thing: Thing
    x: float
    y: float
    yaw: float


@dataclass(frozen=True)
class Scene:
    """An initial state.

    Attributes:
        task: Number in `TASKS`.
        things: The target, then the distractors.
        tray: x and y of its centre.
        gripper: x, y, z and yaw of the fingertips.
        wood: Red, green and blue of the table.
        light: x and y of the lamp.
    """

    task: int
    things: tuple[Placed, ...]
    tray: tuple[float, float]
    gripper: tuple[float, float, float, float]
    wood: tuple[float, float, float]
    light: tuple[float, float]


def rest_height(thing: Thing) -> float:
    """Height of its centre when it lies on the table."""
    return _HEIGHT[thing.shape]


def half_width(thing: Thing) -> float:
    """Half of what the fingers close to."""
    return _HALF_WIDTH[thing.shape]


def draw_scene(task: int, seed: int, trial: int) -> Scene:
    """The initial state of a trial: equal numbers give equal scenes."""
    rng = np.random.default_rng([seed, task, trial])
    target = TASKS[task].target
    others = [thing for thing in THINGS if thing != target]
    count = int(rng.integers(DISTRACTORS[0], DISTRACTORS[1] + 1))
    chosen = [others[k] for k in rng.choice(len(others), count, replace=False)]
    places = _places(rng, 1 + count)
    turns = rng.uniform(-_TURN, _TURN, 1 + count)
    things = tuple(
        Placed(thing, float(x), float(y), float(yaw))
        for thing, (x, y), yaw in zip([target, *chosen], places[1:], turns, strict=True)
    )
    gripper = rng.uniform([-0.12, -0.14, 0.15, -0.4], [0.12, 0.14, 0.22, 0.4])
    wood = np.array([0.62, 0.50, 0.38]) * rng.uniform(0.85, 1.15) + rng.uniform(-0.03, 0.03, 3)
    light = rng.uniform(-0.4, 0.4, 2)
    return Scene(
        task,
        things,
        tuple(places[0].tolist()),
        tuple(gripper.tolist()),
        tuple(wood.tolist()),
        tuple(light.tolist()),
    )


def _places(rng: np.random.Generator, count: int) -> np.ndarray:
    """The tray's place and those of `count` things, apart from each other."""
    while True:  # a crowded table is cleared and laid again
        places = [rng.uniform(-_ROOM + 0.02, _ROOM - 0.02)]
        for _ in range(200):
            place = rng.uniform(-_ROOM, _ROOM)
            gaps = np.linalg.norm(np.array(places) - place, axis=1)
            if gaps[0] > _TRAY_APART and (gaps[1:] > _APART).all():
                places.append(place)
            if len(places) == 1 + count:
                return np.array(places)


def scene_xml(scene: Scene, size: tuple[int, int]) -> str:
    """MJCF text of a scene for pictures of a size (height, width)."""
    return f"""<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual>
    <global offheight="{size[0]}" offwidth="{size[1]}"/>
    <quality shadowsize="0" offsamples="0"/>
    <map znear="0.02" zfar="4"/>
    <headlight ambient="0.35 0.35 0.35" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
  </visual>
  <statistic extent="1"/>
  <default>
    <geom friction="1 0.01 0.002" condim="4"/>
    <default class="finger">
      <geom friction="2 0.05 0.002" condim="6" rgba="0.2 0.2 0.2 1"/>
    </default>
    <default class="thing"><geom density="500" condim="6"/></default>
  </default>
  <asset>
    <texture type="skybox" builtin="flat" rgb1="0.45 0.5 0.55" width="8" height="48"/>
  </asset>
  <worldbody>
    <light pos="{_text(*scene.light, 1.2)}" castshadow="false" diffuse="0.5 0.5 0.5"/>
    <camera name="front" pos="0.56 0 0.46" xyaxes="0 1 0 -0.57 0 0.822" fovy="46"/>
    <geom name="table" type="box" size="0.5 0.5 0.02" pos="0 0 -0.02"
      rgba="{_text(*scene.wood, 1)}"/>
    <geom name="floor" type="plane" size="3 3 0.1" pos="0 0 -0.5" rgba="0.4 0.45 0.5 1"/>
{_tray(scene.tray)}
{_gripper()}
{"".join(_thing(k, placed) for k, placed in enumerate(scene.things))}
  </worldbody>
  <actuator>
    <position name="x" joint="x" kp="600" kv="45"/>
    <position name="y" joint="y" kp="600" kv="45"/>
    <position name="z" joint="z" kp="900" kv="55"/>
    <position name="yaw" joint="yaw" kp="4" kv="0.25"/>
    <position name="left" joint="left" kp="300" kv="12" forcerange="-6 6"/>
    <position name="right" joint="right" kp="300" kv="12" forcerange="-6 6"/>
  </actuator>
</mujoco>"""


def _text(*numbers: float) -> str:
    return " ".join(f"{number:.6g}" for number in numbers)


def _tray(place: tuple[float, float]) -> str:
    inside, thick, rim = TRAY_INSIDE, 0.004, TRAY_RIM / 2
    walls = "".join(
        f'<geom type="box" size="{_text(*size)}" pos="{_text(*pos)}" rgba="0.75 0.75 0.78 1"/>'
        for size, pos in (
            ((inside, inside, 0.002), (0, 0, 0.002)),
            ((thick, inside, rim), (inside, 0, rim)),
            ((thick, inside, rim), (-inside, 0, rim)),
            ((inside, thick, rim), (0, inside, rim)),
            ((inside, thick, rim), (0, -inside, rim)),
        )
    )
    return f'    <body name="tray" pos="{_text(*place, 0)}">{walls}</body>'


def _gripper() -> str:
    """The fingertips are the body's origin, so its joints read as their place."""
    finger = '<geom class="finger" type="box" size="0.005 0.012 0.035" pos="{} 0 0.023"/>'
    slide = '<joint name="{}" type="slide" axis="{} 0 0" range="0 0.04" damping="1"/>'
    low, high = REACH
    return f"""    <body name="gripper" gravcomp="1">
      <joint name="x" type="slide" axis="1 0 0" range="{_text(low[0], high[0])}"/>
      <joint name="y" type="slide" axis="0 1 0" range="{_text(low[1], high[1])}"/>
      <joint name="z" type="slide" axis="0 0 1" range="0 0.4"/>
      <joint name="yaw" type="hinge" axis="0 0 1" range="-3.2 3.2"/>
      <geom type="box" size="0.055 0.02 0.014" pos="0 0 0.072" mass="0.6" rgba="0.85 0.85 0.87 1"/>
      <geom type="cylinder" size="0.018 0.1" pos="0 0 0.18" mass="0.1" rgba="0.85 0.85 0.87 1"/>
      <camera name="wrist" pos="0 -0.065 0.075" xyaxes="1 0 0 0 0.766 0.643" fovy="80"/>
      <body name="left" gravcomp="1">{slide.format("left", 1)}{finger.format(0.005)}</body>
      <body name="right" gravcomp="1">{slide.format("right", -1)}{finger.format(-0.005)}</body>
    </body>"""


def _thing(number: int, placed: Placed) -> str:
    thing = placed.thing
    half = placed.yaw / 2
    return f"""    <body name="thing{number}" pos="{_text(placed.x, placed.y, rest_height(thing))}"
      quat="{_text(np.cos(half), 0, 0, np.sin(half))}">
      <joint name="thing{number}" type="free" damping="0.0005"/>
      <geom class="thing" type="{_TYPE[thing.shape]}" size="{_SIZE[thing.shape]}"
        rgba="{_text(*COLOURS[thing.colour], 1)}"/>
    </body>
"""
