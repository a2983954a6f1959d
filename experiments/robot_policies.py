"""What moves a robot, by its name."""

import difflib
import zlib
from pathlib import Path

from data_pipelines.robot.environment import TABLETOP, Suite
from data_pipelines.robot.expert import expert_policy
from data_pipelines.robot.policies import RobotPolicy, random_policy
from fastdrive_jax.errors import UserError
from fastdrive_jax.own_files import own_function

EXPERT, RANDOM = "expert", "random"
CONTROLS = (EXPERT, RANDOM)  # they look at no visual tokens, so nothing of them is pruned


def robot_policy(
    name: str, suite: Suite, method: str | None, ratio: float | None, seed: int
) -> RobotPolicy:
    """A policy with a pruning method.

    Args:
        name: Of `CONTROLS`, or "FILE.py:FUNCTION", a function of your own that takes the
            arguments below by name and returns a `RobotPolicy`.
        suite: Where it acts.
        method: How tokens are chosen; "unpruned" keeps all; None for controls.
        ratio: Kept tokens; None for controls.
        seed: Of what draws.

    Raises:
        UserError: There is no such policy, or it does not belong to this suite.
    """
    check_policy(name, suite.name)
    if name == EXPERT:
        return expert_policy()
    if name == RANDOM:
        return random_policy(seed)
    make = own_function(name, "robot policy")
    return make(suite=suite, method=method, ratio=ratio, seed=seed)


def check_policy(name: str, suite: str) -> None:
    """Refuses a policy that there is not, or not for a suite.

    Raises:
        UserError: See `robot_policy`.
    """
    if name == EXPERT and suite != TABLETOP:
        raise UserError(f"The expert knows the suite {TABLETOP} only; leave it out for {suite}.")
    if name not in CONTROLS and ".py:" not in name:
        close = difflib.get_close_matches(name, CONTROLS, n=1)
        known = f"choose from {', '.join(CONTROLS)}, or name FILE.py:FUNCTION of your own."
        hint = f"did you mean {close[0]!r}?" if close else known
        raise UserError(f"There is no robot policy {name!r}: {hint}")


def file_name(name: str) -> str:
    """A policy's name in files: that of a function of one's own changes with its file."""
    if ".py:" not in name:
        return name
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"There is no file {file} to take the robot policy {function!r} from.")
    return f"{function}-{zlib.crc32(Path(file).read_bytes()):08x}"
