"""What every robot environment is to those who run it, and the suites of tasks by name."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from data_pipelines.robot import libero, simpler
from data_pipelines.robot.policies import Observation
from data_pipelines.robot.simpler_protocol import ROBOTS
from data_pipelines.robot.simpler_protocol import SUITES as SIMPLER_SUITES
from data_pipelines.robot.tabletop import SECONDS, Tabletop
from data_pipelines.robot.tasks import TASKS
from fastdrive_jax.errors import UserError

TABLETOP = "tabletop"
TABLETOP_SIZE = (96, 96)
TABLETOP_STEPS = 50  # the expert needs 18 at most, in 600 episodes
SUITES = (TABLETOP, *libero.SUITES, *SIMPLER_SUITES)


class Environment(Protocol):
    """One robot in one process; equal (task, trial) begin equally."""

    def reset(self, task: int, trial: int) -> Observation:
        """Begins an episode."""
        ...

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Executes an action `[7]`; also whether the task is done, which ends the episode."""
        ...

    def close(self) -> None:
        """Frees the simulator."""
        ...


@dataclass(frozen=True)
class Suite:
    """Tasks of one kind.

    Attributes:
        name: One of `SUITES`.
        instructions: Of each task.
        max_steps: Actions after which an episode has failed.
        trials: Initial states of a task; None where there is no end of them.
        seed: Of the initial states; None where they come with the suite.
        hz: Actions a second of the simulated robot.
        open: Makes an environment; can be pickled, so that other processes make theirs.
    """

    name: str
    instructions: tuple[str, ...]
    max_steps: int
    trials: int | None
    seed: int | None
    hz: float
    open: Callable[[], Environment]


def make_suite(
    name: str,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    simulator_seed: int = libero.OPENVLA_SEED,
) -> Suite:
    """A suite by its name.

    Args:
        name: One of `SUITES`.
        image_size: Height and width of the pictures; None takes the suite's usual one.
        seed: Of the tabletop's initial states; the others' come with them.
        simulator_seed: Of LIBERO's simulator.

    Raises:
        UserError: There is no such suite, it has no pictures of that size, or what it needs is not
            installed.
    """
    if name == TABLETOP:
        made = partial(Tabletop, image_size or TABLETOP_SIZE, seed)
        instructions = tuple(task.instruction for task in TASKS)
        return Suite(name, instructions, TABLETOP_STEPS, None, seed, 1 / SECONDS, made)
    if name in libero.SUITES:
        made = partial(libero.Libero, name, image_size or libero.IMAGE_SIZE, simulator_seed)
        steps, instructions = libero.SUITES[name], libero.libero_instructions(name)
        return Suite(name, instructions, steps, libero.TRIALS, None, libero.HZ, made)
    if name in SIMPLER_SUITES:
        return _simpler_suite(name, image_size)
    close = difflib.get_close_matches(name, SUITES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(SUITES)}."
    raise UserError(f"There is no suite {name!r}: {hint}")


def _simpler_suite(name: str, image_size: tuple[int, int] | None) -> Suite:
    if missing := simpler.absent():
        raise UserError(missing)
    if image_size is not None:
        raise UserError(f"image_size={image_size} must be left out: {name} has its own cameras.")
    suite = SIMPLER_SUITES[name]
    made = partial(simpler.Simpler, name)
    hz = float(ROBOTS[suite.robot].hz)
    return Suite(name, tuple(suite.tasks), suite.max_steps, suite.trials, None, hz, made)
