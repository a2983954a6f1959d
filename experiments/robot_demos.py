"""Record demonstrations of the tabletop's scripted expert.

    fastdrive robot demos --out demos --episodes 200 --workers 2

Shards, manifest and the actions' ranges; goes on where it was stopped. 200 episodes of each of the
6 tasks are about 25,000 steps and 230 MB. With a policy, it and the expert move by turns while the
expert says what should have been done (DAgger): what a second training learns from.

    fastdrive robot demos --out corrections --policy runs/robot_policy/policy.safetensors
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.robot.demonstrations import record_demonstrations
from data_pipelines.robot.environment import TABLETOP, make_suite
from data_pipelines.robot.episodes import Episodes
from data_pipelines.robot.policies import RobotPolicy
from data_pipelines.robot.recording import DemoConfig
from experiments.drives import UNPRUNED
from experiments.robot_policies import OPENVLA, check_no_run, robot_policy
from fastdrive_jax.errors import UserError


@dataclass(frozen=True)
class RobotDemosArgs:
    """Record demonstrations of the tabletop's scripted expert.

    Attributes:
        out: New folder for the shards.
        episodes: Training episodes of each task.
        val_episodes: Validation episodes of each task.
        image_size: Height and width of the images.
        noise: Upper bound of an episode's probability of straying at a step, that is of acting
            randomly for one to four steps; the recorded actions are the expert's.
        policy: File from `fastdrive robot train`; this policy acts in some episodes.
        policy_share: Probability that an episode is one of those.
        seed: Seed of scenes and noise.
        workers: Simulation processes.
        quiet: No progress bar.
    """

    out: Path
    episodes: int = 50
    val_episodes: int = 5
    image_size: tuple[int, int] = DemoConfig.image_size
    noise: float = DemoConfig.noise
    policy: Path | None = None
    policy_share: float = 0.5
    seed: int = 0
    workers: int = 1
    quiet: bool = False


@dataclass(frozen=True)
class FilePolicy:
    """Makes the policy of a file.

    Attributes:
        path: The file.
        digest: SHA-256 of its bytes.
    """

    path: Path
    digest: str

    def __call__(self) -> RobotPolicy:
        """The policy with all its tokens."""
        return robot_policy(OPENVLA, make_suite(TABLETOP), UNPRUNED, 1.0, 0, self.path)


def file_policy(path: Path) -> FilePolicy:
    """What makes the policy of a file.

    Raises:
        UserError: The file cannot be read, or is the folder of a training.
    """
    check_no_run(path)
    try:
        return FilePolicy(path.absolute(), hashlib.sha256(path.read_bytes()).hexdigest())
    except OSError as error:
        raise UserError(f"The policy {path} can't be read ({error.strerror}).") from error


def robot_demos(args: RobotDemosArgs) -> Episodes:
    """Records; see `RobotDemosArgs`."""
    names = ("episodes", "val_episodes", "image_size", "noise", "seed")
    given = {name: getattr(args, name) for name in names}
    made = None if args.policy is None else file_policy(args.policy)
    if made:
        made()  # what is wrong with it is said before anything is written
        given |= {"policy": made.digest, "policy_share": args.policy_share}
    config = DemoConfig(**given)
    episodes = record_demonstrations(args.out, config, args.workers, not args.quiet, made)
    for split, notes in episodes.episodes.items():
        done = sum(note.success for note in notes)
        print(f"{split}: {len(notes)} episodes, {done} succeeded, {episodes.steps(split)} steps")
    return episodes
