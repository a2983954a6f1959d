"""One demonstration: the expert says what to do at each step, and someone moves.

The expert itself does, straying now and then, or a trained policy: DAgger (Ross et al. 2011), by
which it learns to get out of where it gets itself into.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.robot.environment import TABLETOP_SIZE, TABLETOP_STEPS
from data_pipelines.robot.episodes import HORIZON, Step
from data_pipelines.robot.expert import expert_action
from data_pipelines.robot.policies import ACTION_SIZE, Observation, RobotPolicy
from data_pipelines.robot.tabletop import VIEWS, Tabletop, TabletopState
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.pictures import encode_jpeg

_JPEG_QUALITY = 95
_STRAY = (1, 4)  # fewest and most steps, here and below
_POLICY_TURN, _EXPERT_TURN = (4, 16), (1, 6)
_Move = Callable[
    [Observation, np.ndarray], np.ndarray
]  # what is seen, the expert's will: an action


@dataclass(frozen=True)
class DemoConfig:
    """What is recorded.

    Attributes:
        episodes: Of each task, to learn from.
        val_episodes: Of each task, to validate on.
        image_size: Height and width of the pictures.
        noise: Most of the chance that the robot strays at a step: for one to four steps it does
            something random instead of what the expert wants. Each episode draws its own, up to
            this. Recorded is what the expert wants, so that it shows how to recover.
        policy_share: Chance of an episode that a policy and the expert move by turns instead: it
            for 4 to 16 steps, the expert for 1 to 6, so that what comes later is also seen.
        policy: Digest of that policy.
        seed: Of scenes and noise.
        episodes_per_shard: At most.
    """

    episodes: int = 50
    val_episodes: int = 5
    image_size: tuple[int, int] = TABLETOP_SIZE
    noise: float = 0.3
    policy_share: float = 0.0
    policy: str = ""
    seed: int = 0
    episodes_per_shard: int = 30

    def __post_init__(self):
        check_least(self, episodes=1, val_episodes=1, episodes_per_shard=1)
        if not 0 <= self.noise < 1:
            raise UserError(f"noise={self.noise} must be at least 0 and below 1.")
        if not 0 <= self.policy_share <= 1:
            raise UserError(f"policy_share={self.policy_share} must be at least 0 and at most 1.")


def record_episode(
    env: Tabletop,
    task: int,
    trial: int,
    number: int,
    config: DemoConfig,
    policy: RobotPolicy | None = None,
) -> tuple[list[Step], bool]:
    """One episode labelled by the expert, and whether it succeeded."""
    rng = np.random.default_rng([config.seed, task, trial, 1])
    observation, done = env.reset(task, trial), False
    seen: list[tuple[Observation, np.ndarray]] = []
    actions, executed = [], []
    by_turns = policy is not None and rng.random() < config.policy_share
    move = _turns(policy, rng) if by_turns else _strays(config.noise, rng)
    while not done and len(seen) < TABLETOP_STEPS:
        seen.append((observation, env.segmentation()))
        actions.append(expert_action(TabletopState.unpack(observation.state)))
        executed.append(move(observation, actions[-1]))
        observation, done = env.step(executed[-1])
    ahead = np.stack(actions + actions[-1:] * (HORIZON - 1))
    steps = [
        Step(
            images=_by_view(encode_jpeg(image, _JPEG_QUALITY) for image in observed.images),
            segments=_by_view(_png(labels) for labels in segments),
            proprio=observed.proprio,
            action=actions[k],
            executed=executed[k],
            future=ahead[k : k + HORIZON],
            instruction=observed.instruction,
            task=task,
            episode=number,
            step=k,
        )
        for k, (observed, segments) in enumerate(seen)
    ]
    return steps, done


def _strays(noise: float, rng: np.random.Generator) -> _Move:
    """The expert's will, but for some steps now and then something random."""
    chance, left, stray = rng.uniform(0, noise), 0, None

    def move(observation: Observation, wanted: np.ndarray) -> np.ndarray:
        nonlocal left, stray
        del observation
        if not left and rng.random() < chance:
            left = int(rng.integers(_STRAY[0], _STRAY[1] + 1))
            stray = rng.uniform(-1, 1, ACTION_SIZE).astype(np.float32)
        taken = stray if left else wanted
        left -= left > 0
        return taken

    return move


def _turns(policy: RobotPolicy, rng: np.random.Generator) -> _Move:
    """A policy's will and the expert's, by turns."""
    memory, first, left, moves = policy.start(1), np.ones(1, bool), 0, False

    def move(observation: Observation, wanted: np.ndarray) -> np.ndarray:
        nonlocal memory, first, left, moves
        if not left:
            moves = not moves
            fewest, most = _POLICY_TURN if moves else _EXPERT_TURN
            left = int(rng.integers(fewest, most + 1))
        left -= 1
        if not moves:
            return wanted
        acted = policy.act([observation], memory, first)
        memory, first = acted.memory, np.zeros(1, bool)
        return np.asarray(acted.actions[0, 0], np.float32)

    return move


def _by_view(pictures: Iterator[bytes]) -> dict[str, bytes]:
    return dict(zip(VIEWS, pictures, strict=True))


def _png(labels: np.ndarray) -> bytes:
    return cv2.imencode(".png", labels)[1].tobytes()
