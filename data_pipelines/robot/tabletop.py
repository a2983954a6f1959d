"""The tabletop environment: a two-finger gripper among coloured things, in MuJoCo.

Things are held by friction alone. An action lasts 0.2 s: (dx, dy, dz) in units of 5 cm and dyaw in
units of 0.4 rad move the place that the gripper is driven to, roll and pitch are ignored, and the
sign of the last number closes or opens the fingers.
"""

from dataclasses import dataclass, fields

import numpy as np

from data_pipelines.robot.policies import GRIPPER, Observation
from data_pipelines.robot.rendering import load_mujoco
from data_pipelines.robot.scene import (
    FINGER_TRAVEL,
    REACH,
    TIMESTEP,
    TRAY_INSIDE,
    TRAY_RIM,
    draw_scene,
    half_width,
    rest_height,
    scene_xml,
)
from data_pipelines.robot.tasks import TASKS, THINGS
from fastdrive_jax.errors import UserError

VIEWS = ("front", "wrist")
SECONDS = 0.2  # of an action
STEP = 0.05  # metres of an action's 1
TURN = 0.4  # radians of an action's 1
LIFTED = 0.05  # metres above where it lay
SEGMENTS = ("background", "gripper", "tray", *(thing.name for thing in THINGS))
_LEAD = 0.05  # the driven place is never farther ahead of the gripper than this


@dataclass(frozen=True)
class TabletopState:
    """What the expert knows, and what success is judged from.

    Attributes:
        gripper: x, y, z and yaw of the fingertips.
        opening: Between the fingers.
        target: x, y, z and yaw of the object.
        width: Of the object between closed fingers.
        rest: Height of the object when it lies on the table.
        square: Whether the object must be gripped along its sides.
        tray: x and y.
        place: Whether the object belongs in the tray.
    """

    gripper: tuple[float, float, float, float]
    opening: float
    target: tuple[float, float, float, float]
    width: float
    rest: float
    square: bool
    tray: tuple[float, float]
    place: bool

    def pack(self) -> np.ndarray:
        """As one float32 vector."""
        values = [np.atleast_1d(getattr(self, field.name)) for field in fields(self)]
        return np.concatenate(values).astype(np.float32)

    @classmethod
    def unpack(cls, state: np.ndarray) -> "TabletopState":
        """Of what `pack` gave."""
        v = [float(number) for number in state]
        return cls(
            tuple(v[:4]),
            v[4],
            tuple(v[5:9]),
            v[9],
            v[10],
            v[11] > 0.5,
            tuple(v[12:14]),
            v[14] > 0.5,
        )


class Tabletop:
    """The environment; close it, or use it as a context."""

    def __init__(
        self,
        image_size: tuple[int, int] = (96, 96),
        seed: int = 0,
        views: tuple[str, ...] = VIEWS,
    ):
        """Makes no simulation yet.

        Args:
            image_size: Height and width of the pictures.
            seed: Of the initial states.
            views: Which cameras, of `VIEWS`.

        Raises:
            UserError: MuJoCo or what it draws with is missing, or a size is too small.
        """
        if min(image_size) < 16:
            raise UserError(f"Pictures of {image_size} are too small; take at least 16 x 16.")
        self._mujoco = load_mujoco()
        self._size, self._seed, self._views = tuple(image_size), seed, tuple(views)
        self._renderer = None

    def __enter__(self) -> "Tabletop":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def reset(self, task: int, trial: int) -> Observation:
        """Begins an episode; see `Environment`."""
        if not 0 <= task < len(TASKS):
            raise UserError(f"There is no task {task}; the tabletop has 0 to {len(TASKS) - 1}.")
        self.close()  # before another: a context is freed through whichever is current
        mujoco, self._scene = self._mujoco, draw_scene(task, self._seed, trial)
        self._model = mujoco.MjModel.from_xml_string(scene_xml(self._scene, self._size))
        self._data = mujoco.MjData(self._model)
        self._renderer = mujoco.Renderer(self._model, *self._size)
        self._segment_of = self._segments()
        self._command = np.array(self._scene.gripper)
        self._data.qpos[:4] = self._command
        self._data.qpos[4:6] = FINGER_TRAVEL
        self._data.ctrl[:4] = self._command
        self._data.ctrl[4:6] = FINGER_TRAVEL
        self._steps = 0
        mujoco.mj_forward(self._model, self._data)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Executes an action; see `Environment`."""
        action = np.clip(np.asarray(action, np.float64), -1, 1)
        if action.shape != (GRIPPER + 1,) or not np.isfinite(action).all():
            raise ValueError(f"an action must be 7 finite numbers, got {action}")
        here, before = self._data.qpos[:4], self._command
        moved = before + action[[0, 1, 2, 5]] * [STEP, STEP, STEP, TURN]
        lead = np.array([_LEAD, _LEAD, _LEAD, TURN])
        moved = np.clip(moved, here - lead, here + lead)
        moved[:3] = np.clip(moved[:3], *REACH)
        moved[3] = np.clip(moved[3], -np.pi, np.pi)
        self._command = moved
        self._data.ctrl[4:6] = FINGER_TRAVEL if action[GRIPPER] <= 0 else 0.0
        count = round(SECONDS / TIMESTEP)
        for k in range(count):
            # There by the middle, so that the gripper stands when the next picture is taken.
            share = min(1.0, 2 * (k + 1) / count)
            self._data.ctrl[:4] = before + share * (moved - before)
            self._mujoco.mj_step(self._model, self._data)
        self._steps += 1
        return self._observe(), self.success()

    def success(self) -> bool:
        """Whether the object is lifted, or lies in the tray and the fingers have let it go."""
        state = self.state()
        if not state.place:
            return state.target[2] - state.rest >= LIFTED
        off = np.abs(np.subtract(state.target[:2], state.tray))
        inside = bool((off < TRAY_INSIDE).all()) and state.target[2] < state.rest + TRAY_RIM
        return inside and state.opening > state.width + 0.01

    def state(self) -> TabletopState:
        """What is where."""
        data, scene = self._data, self._scene
        target, thing = data.body("thing0"), scene.things[0].thing
        x_axis = target.xmat.reshape(3, 3)[:, 0]
        return TabletopState(
            gripper=tuple(data.qpos[:4].tolist()),
            opening=float(data.qpos[4] + data.qpos[5]),
            target=(*target.xpos.tolist(), float(np.arctan2(x_axis[1], x_axis[0]))),
            width=2 * half_width(thing),
            rest=rest_height(thing),
            square=thing.shape == "cube",
            tray=scene.tray,
            place=TASKS[scene.task].place,
        )

    def segmentation(self) -> np.ndarray:
        """What each pixel shows, uint8 `[V, H, W]`, numbers in `SEGMENTS`."""
        self._renderer.enable_segmentation_rendering()
        try:
            pictures = [self._picture(view) for view in self._views]
        finally:
            self._renderer.disable_segmentation_rendering()
        return np.stack([self._segment_of[picture[..., 0]] for picture in pictures])

    def close(self) -> None:
        """Frees the simulation; the next `reset` makes another."""
        if self._renderer is not None:
            self._renderer.render()  # makes its context the current one, which is what is freed
            self._renderer.close()
            self._renderer = None

    def _observe(self) -> Observation:
        state = self.state()
        fingers = self._data.qpos[4:6]
        proprio = [*state.gripper[:3], 0, 0, state.gripper[3], fingers[0], -fingers[1]]
        return Observation(
            images=np.stack([self._picture(view) for view in self._views]),
            proprio=np.array(proprio, np.float32),
            instruction=TASKS[self._scene.task].instruction,
            step=self._steps,
            state=state.pack(),
        )

    def _picture(self, view: str) -> np.ndarray:
        self._renderer.update_scene(self._data, view)
        return self._renderer.render()

    def _segments(self) -> np.ndarray:
        """Geom's number to segment; the last entry stands for none, -1."""
        model = self._model
        named = {"left": "gripper", "right": "gripper"}
        named |= {f"thing{k}": one.thing.name for k, one in enumerate(self._scene.things)}
        bodies = [model.body(model.geom(geom).bodyid[0]).name for geom in range(model.ngeom)]
        kinds = [named.get(body, body) for body in bodies]
        return np.array([SEGMENTS.index(k) if k in SEGMENTS else 0 for k in (*kinds, "")], np.uint8)


def target_segment(instruction: str) -> int:
    """Number in `SEGMENTS` of the object that a task's instruction asks for.

    Raises:
        UserError: No task has this instruction.
    """
    for task in TASKS:
        if task.instruction == instruction:
            return SEGMENTS.index(task.target.name)
    raise UserError(f"No task of the tabletop has the instruction {instruction!r}.")
