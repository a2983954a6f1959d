"""The commands about robots: demonstrations, training, and policies in simulation."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from experiments.robot_demos import RobotDemosArgs, robot_demos
from experiments.robot_eval import RobotEvalArgs, robot_eval
from experiments.robot_train import RobotTrainConfig, robot_train


@dataclass(frozen=True)
class RobotArgs:
    """Robots: record demonstrations, train, and run policies in simulation (extra `robot`).

    Attributes:
        command: What to do.
    """

    command: Annotated[
        Annotated[RobotDemosArgs, tyro.conf.subcommand("demos", prefix_name=False)]
        | Annotated[RobotTrainConfig, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[RobotEvalArgs, tyro.conf.subcommand("eval", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]


def robot(args: RobotArgs) -> None:
    """Calls the command that was asked for."""
    run = {RobotDemosArgs: robot_demos, RobotTrainConfig: robot_train, RobotEvalArgs: robot_eval}
    run[type(args.command)](args.command)
