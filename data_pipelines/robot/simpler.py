"""SIMPLER (2405.05941) in the protocol of its published results, as an environment.

Actions are those of the robots' own data: metres, roll, pitch and yaw in radians, and a gripper
from -1, open, to 1, closed, which becomes what the simulated robot takes. The Google robot's is
told changes: one of more than half of its way is carried on for 15 steps. An episode is never cut
short: it succeeded if the task is done after its last step.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_pipelines.geometry import rotation_matrix
from data_pipelines.robot import simpler_process
from data_pipelines.robot.policies import GRIPPER, Observation
from data_pipelines.robot.simpler_protocol import GOOGLE_ROBOT, ROBOTS, SUITES, Scene
from fastdrive_jax.errors import UserError

PYTHON = "SIMPLER_PYTHON"  # environment variable: the interpreter that SIMPLER is installed in
_STICKY_STEPS = 15
_STICKY_CHANGE = 0.5
_ERROR_LINES = 12


class Simpler:
    """The environment; it keeps the simulator that it was last asked for."""

    def __init__(self, suite: str):
        """Starts no simulator yet.

        Args:
            suite: One of `SUITES`.

        Raises:
            UserError: SIMPLER is missing.
        """
        if missing := absent():
            raise UserError(missing)
        self._suite = SUITES[suite]
        self._scenes = list(self._suite.tasks.values())
        self._robot = ROBOTS[self._suite.robot]
        self._process: _Process | None = None
        self._made: dict[str, Any] | None = None

    def reset(self, task: int, trial: int) -> Observation:
        """Begins an episode; see `Environment`."""
        if not 0 <= task < len(self._scenes) or not 0 <= trial < len(self._scenes[task]):
            raise UserError(
                f"There is no trial {trial} of task {task}; {len(self._scenes)} tasks have "
                f"{self._suite.trials} trials each."
            )
        scene = self._scenes[task][trial]
        wanted = self._request(scene)
        if self._process is None:
            self._process = _Process(os.environ[PYTHON])
        if wanted != self._made:
            self._process.ask(wanted)
            self._made = wanted
        self._steps, self._gripper = 0, Gripper()
        return self._observe(self._process.ask({"do": "reset", "options": scene.reset}))

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Executes an action; see `Environment`."""
        command, self._gripper = robot_command(self._suite.robot, action, self._gripper)
        answer = self._process.ask({"do": "step", "action": command.tolist()})
        self._steps += 1
        return self._observe(answer), answer["success"] and self._steps == self._suite.max_steps

    def close(self) -> None:
        """Ends the simulator."""
        if self._process is not None:
            self._process.close()
            self._process, self._made = None, None

    def _request(self, scene: Scene) -> dict[str, Any]:
        settings = {
            "control_mode": self._robot.control,
            "control_freq": self._robot.hz,
            "sim_freq": self._robot.physics_hz,
            "max_episode_steps": self._suite.max_steps,
            **scene.settings,
        }
        return {
            "do": "make",
            "environment": scene.environment,
            "overlay": scene.overlay,
            "camera": self._robot.camera,
            "settings": settings,
        }

    def _observe(self, answer: dict[str, Any]) -> Observation:
        turn = cv2.Rodrigues(rotation_matrix(answer["quaternion"]))[0][:, 0]
        proprio = np.concatenate([answer["place"], turn, answer["fingers"]]).astype(np.float32)
        return Observation(answer["image"][None], proprio, answer["instruction"], self._steps)


@dataclass(frozen=True)
class Gripper:
    """What the Google robot's gripper was told.

    Attributes:
        open: How far it was to be open, 0 to 1; None before the first action.
        change: That is carried on; 0 for none.
        repeats: Steps of that change so far.
    """

    open: float | None = None
    change: float = 0.0
    repeats: int = 0

    def follow(self, open: float) -> tuple[float, "Gripper"]:
        """The change that the robot is told when it is to be so far open; positive closes."""
        asked = 0.0 if self.open is None else self.open - open
        change, repeats = self.change, self.repeats
        if not change and abs(asked) > _STICKY_CHANGE:
            change = asked
        if not change:
            return asked, Gripper(open)
        repeats += 1
        over = repeats == _STICKY_STEPS
        return change, Gripper(open) if over else Gripper(open, change, repeats)


def robot_command(robot: str, action: np.ndarray, gripper: Gripper) -> tuple[np.ndarray, Gripper]:
    """What the simulated robot is told.

    Args:
        robot: Of `ROBOTS`.
        action: `[7]`, see the module.
        gripper: What the Google robot's was told before.

    Returns:
        Metres, axis times angle, and the gripper's command `[7]`, and what it was told.
    """
    action = np.asarray(action, np.float64)
    open = (1 - action[GRIPPER]) / 2
    if robot == GOOGLE_ROBOT:
        grip, gripper = gripper.follow(open)
    else:
        grip = 1.0 if open > 0.5 else -1.0
    turn = rotation_vector(*action[3:6])
    return np.concatenate([action[:3], turn, [grip]]), gripper


def rotation_vector(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Axis times angle `[3]` of turns about the fixed x, y and z axes, one after the other."""
    turns = [
        cv2.Rodrigues(np.eye(3)[axis] * angle)[0] for axis, angle in enumerate((roll, pitch, yaw))
    ]
    return cv2.Rodrigues(turns[2] @ turns[1] @ turns[0])[0][:, 0]


def openvla_action(actions: np.ndarray) -> np.ndarray:
    """Actions `[..., 7]` as OpenVLA gives them, whose gripper is 1 when it is open, 0 closed."""
    actions = np.array(actions, np.float32)
    actions[..., GRIPPER] = 1 - 2 * actions[..., GRIPPER]
    return actions


def openvla_picture(image: np.ndarray, size: int = 224) -> np.ndarray:
    """A camera's picture as OpenVLA is shown it in SIMPLER, uint8 `[size, size, 3]`."""
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def absent() -> str | None:
    """What SIMPLER lacks here, as a sentence; None where it lacks nothing."""
    python = os.environ.get(PYTHON)
    if not python:
        return (
            f"SIMPLER needs a Python of its own: set {PYTHON} to the interpreter that it is "
            "installed in, see docs/robot.md."
        )
    if not os.access(python, os.X_OK):
        return f"{PYTHON} names {python}, which is no program; see docs/robot.md."
    return None


class _Process:
    """The simulator in a process of its own; what it prints is kept for an error's text."""

    def __init__(self, python: str):
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [python, str(Path(simpler_process.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, with its "image" uint8 `[H, W, 3]` where there is one.

        Raises:
            UserError: The simulator has ended.
            RuntimeError: It failed.
        """
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            if "shape" in answer:
                image = self._process.stdout.read(int(np.prod(answer["shape"])))
                answer["image"] = np.frombuffer(image, np.uint8).reshape(answer["shape"])
        except (OSError, ValueError) as error:
            raise UserError(self._ended()) from error
        if "error" in answer:
            raise RuntimeError(f"SIMPLER's simulator failed:\n{answer['error']}")
        return answer

    def close(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._printed.close()

    def _ended(self) -> str:
        code = self._process.wait()
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").splitlines()
        last = "\n".join(lines[-_ERROR_LINES:])
        return (
            f"SIMPLER's process, {PYTHON}={self._process.args[0]}, has ended with exit code "
            f"{code}; it needs SIMPLER with NumPy 1, and a Vulkan driver. It printed at last:\n"
            f"{last}"
        )
