"""What may move a robot: a policy as two functions, and the two controls."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ACTION_SIZE = 7  # dx, dy, dz, droll, dpitch, dyaw, gripper; each in [-1, 1]
PROPRIO_SIZE = 8  # gripper's position, axis times angle, places of the two fingers
GRIPPER = 6  # index in an action: -1 opens, 1 closes


@dataclass(frozen=True)
class Observation:
    """What a robot sees and feels at a moment.

    Attributes:
        images: uint8 `[V, H, W, 3]`, third person first, then the wrist.
        proprio: float32 `[P]`.
        instruction: What to do.
        step: Actions executed in this episode.
        state: float32 `[S]` of the simulation, for the control that knows it; else None.
    """

    images: np.ndarray
    proprio: np.ndarray
    instruction: str
    step: int
    state: np.ndarray | None = None


@dataclass(frozen=True)
class Acted:
    """What a policy did with a batch.

    Attributes:
        actions: float32 `[B, chunk, 7]` to execute one after another, as the environment takes
            them.
        kept: int `[B, K]` visual tokens, None in the place of a sample that keeps all; or None.
        memory: Of the next call.
        seconds: Stage ("vision", "prefill", "decode") to wall seconds, of the whole batch or `[B]`
            of what each sample had to wait for; with "policy" the whole of the call, which is
            measured where this does not tell it.
    """

    actions: np.ndarray
    kept: Sequence[np.ndarray | None] | None = None
    memory: Any = None
    seconds: dict[str, float | np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class RobotPolicy:
    """What moves robots.

    Attributes:
        start: Batch size to the memory of the first call, a pytree of leaves `[B, ...]`.
        act: (observations, memory, first) to `Acted`; first `[B]` marks samples whose episode
            begins, whose memory is of another one.
        grid: Rows and columns of the visual tokens of each view, to draw which are kept.
        views: Which of the observation's pictures it looks at, in the order of its tokens; None
            takes all as they come.
    """

    start: Callable[[int], Any]
    act: Callable[[Sequence[Observation], Any, np.ndarray], Acted]
    grid: tuple[int, int] | None = None
    views: tuple[int, ...] | None = None


def random_policy(seed: int = 0, chunk: int = 1) -> RobotPolicy:
    """Uniform actions, drawn by what is seen: the same whatever else is in the batch."""

    def act(observations, memory, first) -> Acted:
        del first
        actions = [_drawn(seed, chunk, observation) for observation in observations]
        return Acted(np.stack(actions), memory=memory)

    return RobotPolicy(lambda batch: None, act)


def digest(observation: Observation) -> int:
    """Tells what is seen and felt apart, in 32 bits."""
    return zlib.crc32(observation.proprio.tobytes() + observation.images.tobytes())


def _drawn(seed: int, chunk: int, observation: Observation) -> np.ndarray:
    rng = np.random.default_rng([seed, digest(observation), observation.step])
    return rng.uniform(-1, 1, (chunk, ACTION_SIZE)).astype(np.float32)
