"""SIMPLER's visual-matching evaluations (2405.05941) as data: which scene each trial begins in.

They are the grids of the scripts that the published results were made with: every task on four
recolourings of the Google robot, at 25 places of the can, 60 arrangements of three objects, or
before 9 photographed cabinets; and 24 arrangements of each task of the WidowX.
"""

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Any

GOOGLE_ROBOT, WIDOWX = "google_robot", "widowx"
_RECOLOURINGS = (  # of the robot; the first is as it is
    None,
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
_CABINETS = {  # photograph to the robot's place in metres and its heading in radians
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}
_CAN_X, _CAN_Y = (-0.35, -0.12), (-0.02, 0.42)  # metres
_CAN_PLACES = 5  # along each
_ARRANGEMENTS, _BRIDGE_ARRANGEMENTS = 60, 24


@dataclass(frozen=True)
class Robot:
    """A simulated robot.

    Attributes:
        camera: Whose picture a policy sees.
        hz: Actions a second.
        physics_hz: Steps of the physics a second.
        control: Name of the controller.
        dataset: Name of its real robot's data among a checkpoint's statistics.
    """

    camera: str
    hz: int
    physics_hz: int
    control: str
    dataset: str


ROBOTS = {
    GOOGLE_ROBOT: Robot(
        "overhead_camera",
        3,
        513,
        "arm_pd_ee_delta_pose_align_interpolate_by_planner_gripper_pd_joint_target_delta_pos"
        "_interpolate_by_planner",
        "fractal20220817_data",
    ),
    WIDOWX: Robot(
        "3rd_view_camera",
        5,
        500,
        "arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
        "bridge_orig",
    ),
}


@dataclass(frozen=True)
class Scene:
    """What the simulator is made with, and begun with.

    Attributes:
        environment: Name among the simulator's.
        overlay: Photograph behind what is simulated, a file of the simulator's assets.
        settings: The rest that it is made with.
        reset: What it is begun with.
    """

    environment: str
    overlay: str
    settings: dict[str, Any] = field(default_factory=dict)
    reset: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SimplerSuite:
    """Tasks of one robot.

    Attributes:
        robot: Of `ROBOTS`.
        max_steps: Actions of every episode: success is what holds after the last.
        tasks: What a person calls each to its scenes, one for each trial. Trials of one recolouring
            or photograph are next to each other, since another means another simulator.
    """

    robot: str
    max_steps: int
    tasks: dict[str, tuple[Scene, ...]]

    @property
    def trials(self) -> int:
        """Of each task."""
        return min(len(scenes) for scenes in self.tasks.values())


def _start(x: float, y: float, heading: float, **objects: Any) -> dict[str, Any]:
    """The robot faces its table, turned by a heading; quaternions begin with the real part."""
    turned = [-math.sin(heading / 2), 0.0, 0.0, math.cos(heading / 2)]
    robot = {"init_xy": [x, y], "init_rot_quat": turned}
    return {"robot_init_options": robot, "obj_init_options": objects}


def _table(environment: str, overlay: str, settings: dict, resets: list[dict]) -> tuple[Scene, ...]:
    scene = {"robot": "google_robot_static", "scene_name": "google_pick_coke_can_1_v4"}
    return tuple(
        Scene(environment, overlay, {**scene, **settings, "urdf_version": colour}, reset)
        for colour, reset in product(_RECOLOURINGS, resets)
    )


def _pick_can(**lies: bool) -> tuple[Scene, ...]:
    places = [
        [low + (high - low) * step / (_CAN_PLACES - 1) for step in range(_CAN_PLACES)]
        for low, high in (_CAN_X, _CAN_Y)
    ]
    resets = [_start(0.35, 0.20, 0.0, init_xy=[x, y]) for x, y in product(*places)]
    overlay = "google_coke_can_real_eval_1.png"
    return _table("GraspSingleOpenedCokeCanInScene-v0", overlay, lies, resets)


def _move_near() -> tuple[Scene, ...]:
    resets = [_start(0.35, 0.21, -0.09, episode_id=number) for number in range(_ARRANGEMENTS)]
    overlay = "google_move_near_real_eval_1.png"
    return _table("MoveNearGoogleBakedTexInScene-v0", overlay, {}, resets)


def _drawer(environment: str) -> tuple[Scene, ...]:
    settings = {
        "robot": "google_robot_static",
        "scene_name": "dummy_drawer",
        "station_name": "mk_station_recolor",
        "light_mode": "simple",
        "disable_bad_material": True,
        "shader_dir": "rt",  # ray tracing: shadows tell how far away a handle is
    }
    return tuple(
        Scene(
            environment,
            f"open_drawer_{cabinet}.png",
            {**settings, "urdf_version": colour},
            _start(*_CABINETS[cabinet], init_xy=[0.0, 0.0]),
        )
        for colour, cabinet in product(_RECOLOURINGS, _CABINETS)
    )


def _bridge(environment: str, sink: bool = False) -> tuple[Scene, ...]:
    robot, scene, overlay, place = (
        ("widowx_sink_camera_setup", "bridge_table_1_v2", "bridge_sink.png", (0.127, 0.06))
        if sink
        else ("widowx", "bridge_table_1_v1", "bridge_real_eval_1.png", (0.147, 0.028))
    )
    settings = {"robot": robot, "scene_name": scene}
    return tuple(
        Scene(environment, overlay, settings, _start(*place, 0.0, episode_id=number))
        for number in range(_BRIDGE_ARRANGEMENTS)
    )


SUITES = {
    "simpler_pick_coke_can": SimplerSuite(
        GOOGLE_ROBOT,
        80,
        {
            "pick coke can that lies across": _pick_can(lr_switch=True),
            "pick coke can that lies along": _pick_can(laid_vertically=True),
            "pick coke can that stands": _pick_can(upright=True),
        },
    ),
    "simpler_move_near": SimplerSuite(
        GOOGLE_ROBOT, 80, {"move one object near another": _move_near()}
    ),
    "simpler_drawer": SimplerSuite(
        GOOGLE_ROBOT,
        113,
        {
            f"{verb.lower()} {which.lower()} drawer": _drawer(
                f"{verb}{which}DrawerCustomInScene-v0"
            )
            for verb, which in product(("Open", "Close"), ("Top", "Middle", "Bottom"))
        },
    ),
    "simpler_bridge": SimplerSuite(
        WIDOWX,
        60,
        {
            "put the spoon on the towel": _bridge("PutSpoonOnTableClothInScene-v0"),
            "put carrot on plate": _bridge("PutCarrotOnPlateInScene-v0"),
            "stack the green block on the yellow block": _bridge(
                "StackGreenCubeOnYellowCubeBakedTexInScene-v0"
            ),
        },
    ),
    "simpler_bridge_sink": SimplerSuite(
        WIDOWX,
        120,
        {"put eggplant into yellow basket": _bridge("PutEggplantInBasketScene-v0", sink=True)},
    ),
}
