"""Record demonstrations of the tabletop's scripted expert.

    fastdrive robot demos --out demos --episodes 200 --workers 2

Shards, manifest and the actions' ranges; goes on where it was stopped. 200 episodes of each of the
6 tasks are about 18,000 steps and 200 MB.
"""

from dataclasses import dataclass
from pathlib import Path

from data_pipelines.robot.demonstrations import DemoConfig, record_demonstrations
from data_pipelines.robot.episodes import Episodes


@dataclass(frozen=True)
class RobotDemosArgs:
    """Record demonstrations of the tabletop's scripted expert.

    Attributes:
        out: New folder of the shards.
        episodes: Of each task, to learn from.
        val_episodes: Of each task, to validate on.
        image_size: Height and width of the pictures.
        noise: Share of the steps at which the robot does something random instead of what the
            expert wants, which is recorded.
        seed: Of scenes and noise.
        workers: Processes that simulate.
        quiet: No progress bar.
    """

    out: Path
    episodes: int = 50
    val_episodes: int = 5
    image_size: tuple[int, int] = DemoConfig.image_size
    noise: float = DemoConfig.noise
    seed: int = 0
    workers: int = 1
    quiet: bool = False


def robot_demos(args: RobotDemosArgs) -> Episodes:
    """Records; see `RobotDemosArgs`."""
    names = ("episodes", "val_episodes", "image_size", "noise", "seed")
    config = DemoConfig(**{name: getattr(args, name) for name in names})
    episodes = record_demonstrations(args.out, config, args.workers, progress=not args.quiet)
    for split, notes in episodes.episodes.items():
        done = sum(note.success for note in notes)
        print(f"{split}: {len(notes)} episodes, {done} succeeded, {episodes.steps(split)} steps")
    return episodes
