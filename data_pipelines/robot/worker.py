"""One process that holds one environment and executes chunks of actions in it.

It imports no JAX: what it needs of a policy is sent to it.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from data_pipelines.robot.environment import Environment
from data_pipelines.robot.policies import Observation
from fastdrive_jax.errors import UserError


@dataclass(frozen=True)
class Job:
    """An episode to run.

    Attributes:
        task: Number in the suite.
        trial: Which initial state.
        film: Also send back what the cameras saw.
    """

    task: int
    trial: int
    film: bool = False


@dataclass(frozen=True)
class Waiting:
    """The worker needs actions."""

    observation: Observation


@dataclass(frozen=True)
class Ended:
    """The episode is over.

    Attributes:
        success: Whether the task was done.
        steps: Actions executed.
        seconds: Wall seconds of the environment, without its reset.
        frames: uint8 `[steps + 1, V, H, W, 3]` if a film was asked for.
    """

    success: bool
    steps: int
    seconds: float
    frames: np.ndarray | None


@dataclass(frozen=True)
class Failed:
    """The worker could not go on; whether by a person's mistake, and what happened."""

    user: bool
    text: str


def work(connection: Connection, open_env: Callable[[], Environment], max_steps: int) -> None:
    """Runs the episodes that come over the connection, until None comes or its end is closed."""
    env = None
    try:
        env = open_env()
        while (job := connection.recv()) is not None:
            connection.send(_episode(env, job, max_steps, connection))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except UserError as error:
        connection.send(Failed(True, str(error)))
    except Exception:
        connection.send(Failed(False, traceback.format_exc()))
    finally:
        if env is not None:
            env.close()
        connection.close()


def _episode(env: Environment, job: Job, max_steps: int, connection: Connection) -> Ended:
    observation, done, spent = env.reset(job.task, job.trial), False, 0.0
    frames = [observation.images] if job.film else []
    while not done and observation.step < max_steps:
        connection.send(Waiting(observation))
        actions = connection.recv()
        begin = time.perf_counter()
        for action in actions:
            observation, done = env.step(action)
            if job.film:
                frames.append(observation.images)
            if done or observation.step == max_steps:
                break
        spent += time.perf_counter() - begin
    return Ended(done, observation.step, spent, np.stack(frames) if job.film else None)
