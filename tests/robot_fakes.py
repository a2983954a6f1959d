"""A robot without a simulator, which spawned processes can import, and policies for it."""

import os
from dataclasses import dataclass

import numpy as np

from data_pipelines.robot.environment import Suite
from data_pipelines.robot.policies import Acted, Observation, RobotPolicy
from fastdrive_jax.errors import UserError

INSTRUCTIONS = ("count to 3", "count to 5", "count to 7", "count for ever")
MAX_STEPS = 9
DIES, FAILS, COMPLAINS = 13, 14, 15  # trials


@dataclass
class Counter:
    """Adds up the first number of each action; the task is done at 3, 5 or 7."""

    def reset(self, task: int, trial: int) -> Observation:
        self._task, self._trial, self._steps, self._sum = task, trial, 0, 0.0
        return self._seen()

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        if self._steps == 1:
            if self._trial == DIES:
                os._exit(3)
            if self._trial == FAILS:
                raise ZeroDivisionError("the arm fell off")
            if self._trial == COMPLAINS:
                raise UserError("Oil the arm.")
        self._steps += 1
        self._sum += float(action[0])
        goal = (3, 5, 7, np.inf)[self._task]
        return self._seen(), self._sum >= goal

    def close(self) -> None:
        pass

    def _seen(self) -> Observation:
        images = np.full((2, 16, 16, 3), self._steps, np.uint8)
        proprio = np.zeros(8, np.float32)
        proprio[:3] = self._task, self._trial, self._sum
        return Observation(images, proprio, INSTRUCTIONS[self._task], self._steps)


def counting_suite() -> Suite:
    return Suite("counting", INSTRUCTIONS, MAX_STEPS, None, 4, 5.0, Counter)


def remembering_policy(chunk: int = 1, log: list | None = None) -> RobotPolicy:
    """Each episode's memory counts its decisions, which the kept tokens tell.

    It also knows whose it is, and refuses to be another's.
    """
    import jax.numpy as jnp  # not with the module, which processes without JAX import

    def start(batch: int):
        return {"count": jnp.zeros(batch, int), "whose": jnp.full((batch, 2), -1.0)}

    def act(observations, memory, first) -> Acted:
        count = jnp.where(first, 0, memory["count"]) + 1
        whose = jnp.array([o.proprio[:2] for o in observations])
        same = (memory["whose"] == whose).all(1)
        assert (first | same).all(), "an episode was given the memory of another"
        assert not (first & same).any(), "an episode that goes on was said to begin"
        if log is not None:
            log.append(len(observations))
        actions = np.zeros((len(observations), chunk, 7), np.float32)
        actions[:, :, 0] = 1
        kept = np.stack([np.array(count)] * 4, 1)
        spent = {"prefill": 0.5, "decode": np.asarray(count, float)}  # of the batch, of each sample
        return Acted(actions, kept, {"count": count, "whose": whose}, spent)

    return RobotPolicy(start, act, grid=(2, 2))
