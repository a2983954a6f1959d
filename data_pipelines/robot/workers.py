"""Episodes in parallel: W processes simulate, one policy acts for those that wait, in batches.

A batch has one size always: the first that wait, filled up with the first of them, so that a
policy is compiled once. While it acts, the other workers simulate; with twice as many workers as
samples in a batch both are busy.
"""

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import jax
import numpy as np

from data_pipelines.robot.environment import Suite
from data_pipelines.robot.policies import ACTION_SIZE, Observation, RobotPolicy
from data_pipelines.robot.worker import Ended, Failed, Job, Waiting, work
from fastdrive_jax.errors import UserError

ENVIRONMENT, POLICY = "environment", "policy"  # stages beside those that a policy tells


@dataclass(frozen=True)
class Film:
    """What an episode looked like.

    Attributes:
        frames: uint8 `[steps + 1, V, H, W, 3]`.
        decisions: Steps at which the policy acted.
        kept: `[K]` tokens of each decision; None where a policy keeps all.
    """

    frames: np.ndarray
    decisions: tuple[int, ...]
    kept: tuple[np.ndarray | None, ...]


@dataclass(frozen=True)
class Episode:
    """A finished episode.

    Attributes:
        task: Number in the suite.
        trial: Which initial state.
        success: Whether the task was done.
        steps: Actions executed.
        decisions: Calls of the policy.
        seconds: Stage to wall seconds, summed over the decisions: those that the policy tells,
            `POLICY`, the whole of its calls, and `ENVIRONMENT`. A robot waits for its whole batch,
            so a batch's seconds count for each robot in it, unless the policy tells them apart.
        film: If one was asked for.
    """

    task: int
    trial: int
    success: bool
    steps: int
    decisions: int
    seconds: dict[str, float]
    film: Film | None = None


@dataclass
class _Running:
    """An episode on its way, in a slot."""

    job: Job
    begun: bool = False
    decisions: list[int] = field(default_factory=list)
    kept: list[np.ndarray | None] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, seconds: dict[str, float]) -> None:
        """Adds to the stages."""
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def end(self, ended: Ended) -> Episode:
        """The episode, now that it is over."""
        self.spend({ENVIRONMENT: ended.seconds})
        film = None
        if ended.frames is not None:
            film = Film(ended.frames, tuple(self.decisions), tuple(self.kept))
        return Episode(
            self.job.task, self.job.trial, ended.success, ended.steps, len(self.decisions),
            self.seconds, film,
        )  # fmt: skip


def run_episodes(
    suite: Suite, jobs: Sequence[Job], policy: RobotPolicy, workers: int, batch: int
) -> Iterator[Episode]:
    """Runs episodes and gives each as soon as it is over.

    Args:
        suite: Their tasks.
        jobs: Best sorted by task: LIBERO opens another simulation for each.
        policy: What acts.
        workers: Processes, one environment each.
        batch: Samples of one call of the policy, at most as many as workers.

    Raises:
        UserError: A worker has died or failed, or the policy gave no actions; the sentence names
            task, trial and seed.
    """
    if not 1 <= batch <= workers:
        raise UserError(f"batch={batch} must be at least 1 and at most workers={workers}.")
    queue = deque(jobs)
    memory = policy.start(workers)  # of as many slots however few jobs there are: one compilation
    with _Team(suite, min(workers, len(queue))) as team:
        for slot in range(team.size):
            team.begin(slot, queue.popleft())
        while team.running:
            waiting = team.waiting
            if len(waiting) < min(batch, len(team.running)):
                for slot, ended in team.receive():
                    yield team.running.pop(slot).end(ended)
                    if queue:
                        team.begin(slot, queue.popleft())
                continue
            slots = sorted(waiting)[:batch]
            memory = _act(team, policy, memory, slots, workers, batch)


def _act(
    team: "_Team", policy: RobotPolicy, memory: Any, slots: list[int], workers: int, batch: int
) -> Any:
    """Has the policy act for some slots; returns the memory of all."""
    rows = np.array(slots + slots[:1] * (batch - len(slots)))
    observations = [team.waiting[slot] for slot in rows.tolist()]
    first = np.array([not team.running[slot].begun for slot in rows.tolist()])
    given = observations, _take(memory, rows), first
    if not team.warm:  # the first call compiles; it is made again, so that this is not timed
        policy.act(*given)
        team.warm = True
    begin = time.perf_counter()
    acted = policy.act(*given)
    actions = np.asarray(acted.actions, np.float32)
    kept = [None] * batch if acted.kept is None else acted.kept
    spent = {POLICY: time.perf_counter() - begin, **acted.seconds}
    spent = {stage: np.broadcast_to(value, (batch,)).tolist() for stage, value in spent.items()}
    if actions.ndim != 3 or actions.shape[::2] != (batch, ACTION_SIZE) or not actions.shape[1]:
        raise UserError(
            f"The policy gave actions {list(actions.shape)} for {team.where(slots[0])}; they must "
            f"be [{batch}, chunk, {ACTION_SIZE}]."
        )
    for row, slot in enumerate(slots):
        if not np.isfinite(actions[row]).all():
            raise UserError(
                f"The policy gave actions that are not finite for {team.where(slot)}; look for "
                "numbers that are not finite in its weights and statistics."
            )
        running = team.running[slot]
        running.begun = True
        running.decisions.append(team.waiting[slot].step)
        running.kept.append(None if kept[row] is None else np.asarray(kept[row]))
        running.spend({stage: values[row] for stage, values in spent.items()})
        team.send(slot, actions[row])
    # Rows that only fill the batch go nowhere.
    return _put(memory, np.where(np.arange(batch) < len(slots), rows, workers), acted.memory)


@jax.jit
def _take(memory: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], memory)


@jax.jit
def _put(memory: Any, rows: jax.Array, new: Any) -> Any:
    return jax.tree.map(lambda leaf, value: leaf.at[rows].set(value, mode="drop"), memory, new)


class _Team:
    """The processes, by slot; a context that ends them.

    Attributes:
        running: Slot to its episode.
        waiting: Slot to what it sees, of those that need actions.
        warm: Whether the policy has acted.
    """

    def __init__(self, suite: Suite, size: int):
        self.size, self.warm = size, False
        self.running: dict[int, _Running] = {}
        self.waiting: dict[int, Observation] = {}
        self._suite, self._processes, self._connections = suite, [], []

    def __enter__(self) -> "_Team":
        context = multiprocessing.get_context("spawn")
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._suite.open, self._suite.max_steps)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the connection
            self._processes.append(process)
            self._connections.append(ours)
        return self

    def __exit__(self, kind, *error) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            if kind is None:
                with contextlib.suppress(OSError):  # it has ended
                    connection.send(None)
            else:
                process.terminate()
            connection.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()

    def begin(self, slot: int, job: Job) -> None:
        """Gives a worker its next episode."""
        self.running[slot] = _Running(job)
        self._send(slot, job)

    def send(self, slot: int, actions: np.ndarray) -> None:
        """Gives a worker that waits its actions."""
        del self.waiting[slot]
        self._send(slot, actions)

    def receive(self) -> list[tuple[int, Ended]]:
        """Waits until some worker reports; gives those whose episode has ended."""
        there, ended = wait(self._connections), []
        for slot, connection in enumerate(self._connections):
            if connection not in there:
                continue
            try:
                message = connection.recv()
            except (EOFError, ConnectionError):
                raise self._died(slot) from None
            if isinstance(message, Waiting):
                self.waiting[slot] = message.observation
            elif isinstance(message, Ended):
                ended.append((slot, message))
            else:
                raise self._failed(slot, message)
        return ended

    def _send(self, slot: int, message: Any) -> None:
        try:
            self._connections[slot].send(message)
        except OSError:
            raise self._died(slot) from None

    def where(self, slot: int) -> str:
        """What a slot simulates, for errors."""
        if slot not in self.running:
            return f"{self._suite.name}, between two episodes"
        job, suite = self.running[slot].job, self._suite
        seed = "" if suite.seed is None else f", seed {suite.seed}"
        instruction = suite.instructions[job.task]
        return f"{suite.name}, task {job.task} ({instruction}), trial {job.trial}{seed}"

    def _died(self, slot: int) -> UserError:
        process = self._processes[slot]
        process.join(timeout=10)
        return UserError(
            f"The process that simulates {self.where(slot)} has died (exit code "
            f"{process.exitcode}), most likely for lack of memory; run the same command again with "
            "fewer workers, it goes on where it stopped."
        )

    def _failed(self, slot: int, failed: Failed) -> Exception:
        if failed.user:
            return UserError(failed.text)
        return RuntimeError(f"The simulation of {self.where(slot)} failed:\n{failed.text}")
