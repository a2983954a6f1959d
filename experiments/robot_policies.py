"""What moves a robot, by its name."""

import difflib
import zlib
from pathlib import Path

from data_pipelines.robot.environment import TABLETOP, Suite
from data_pipelines.robot.expert import expert_policy
from data_pipelines.robot.policies import RobotPolicy, random_policy
from data_pipelines.robot.simpler_protocol import SUITES as SIMPLER_SUITES
from experiments.drives import UNPRUNED, check_labels
from experiments.folder_digest import checkpoint_folder_digest
from experiments.robot_openvla import openvla_parts
from experiments.robot_pi0 import pi0_parts
from experiments.robot_vla import AS_PUBLISHED, CheckpointOptions, vla_policy
from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.robot import RobotVLA
from fastdrive_jax.models.openvla.policy_file import POLICY_FILE, bundled_policy
from fastdrive_jax.own_files import own_function
from fastdrive_jax.pruning import builds_on_recon, make_pruner
from fastdrive_jax.pruning.budgets import per_camera

EXPERT, RANDOM, OPENVLA, PI0 = "expert", "random", "openvla", "pi0"
CONTROLS = (EXPERT, RANDOM)  # they look at no visual tokens, so nothing of them is pruned
POLICIES = (*CONTROLS, OPENVLA, PI0)


def robot_policy(
    name: str,
    suite: Suite,
    method: str | None,
    ratio: float | None,
    seed: int,
    weights: Path | None = None,
    per_view: bool = False,
    options: CheckpointOptions = AS_PUBLISHED,
) -> RobotPolicy:
    """A policy with a pruning method.

    Args:
        name: Of `POLICIES`, or "FILE.py:FUNCTION", a function of your own that takes `suite`,
            `method`, `ratio` and `seed` by name and returns a `RobotPolicy`.
        suite: Where it acts.
        method: How tokens are chosen; "unpruned" keeps all; None for controls.
        ratio: Kept tokens; None for controls.
        seed: Of what draws.
        weights: Of "openvla" and "pi0": the folder of a published checkpoint; of "openvla" also a
            policy file of `fastdrive robot train`, and at the tabletop None takes the packaged
            policy.
        per_view: Whether each of their views has a budget of its own.
        options: What the folder of a checkpoint does not tell.

    Raises:
        UserError: There is no such policy, or it does not belong to this suite.
    """
    check_policy(name, suite.name, weights)
    if name == EXPERT:
        return expert_policy()
    if name == RANDOM:
        return random_policy(seed)
    if name in (OPENVLA, PI0):
        if name == PI0:
            model, params, body = pi0_parts(weights, options)
        else:
            model, params, body = openvla_parts(
                suite.name, weights or bundled_policy(), options.asset_id
            )
        # A method within the model cuts nothing at a ratio of 1.
        pruner = make_pruner("fastv" if method == UNPRUNED else method)
        if per_view and method != UNPRUNED:
            pruner = per_camera(pruner, model.config.views)
        return vla_policy(
            RobotVLA(model, pruner, ratio), {"vla": params, "pruner": None}, body, seed
        )
    make = own_function(name, "robot policy")
    return make(suite=suite, method=method, ratio=ratio, seed=seed)


def check_methods(methods: tuple[str, ...]) -> None:
    """Refuses methods that robots have nothing for.

    Raises:
        UserError: There is no such method, two have one name, or one needs training or masks.
    """
    check_labels(methods)
    for name in methods:
        if builds_on_recon(name) or {"foreground", "weights"} & set(make_pruner(name).needs):
            raise UserError(
                f"The method {name} needs a training or masks, which robots have not; choose one "
                "that is training-free."
            )
        if name == "prior":
            raise UserError("The method prior needs the mean training mask, which robots lack.")


def check_policy(name: str, suite: str, weights: Path | None = None) -> None:
    """Refuses a policy that there is not, or not for a suite.

    Raises:
        UserError: See `robot_policy`.
    """
    if name == EXPERT and suite != TABLETOP:
        raise UserError(f"The expert knows the suite {TABLETOP} only; leave it out for {suite}.")
    if name == OPENVLA:
        weights = weights or bundled_policy()
        if not weights.exists():
            raise UserError(f"There is no policy file or checkpoint folder {weights}.")
        check_no_run(weights)
        if weights.is_file() and suite != TABLETOP:
            raise UserError(
                f"A small policy knows the suite {TABLETOP} only; for {suite} give the folder of a "
                "checkpoint as --weights."
            )
    if name == PI0:
        if suite in (TABLETOP, *SIMPLER_SUITES):
            raise UserError(f"pi0 knows LIBERO's suites; leave it out for {suite}.")
        if weights is None or not weights.is_dir():
            there = "none was given" if weights is None else f"{weights} is none"
            raise UserError(f"pi0 needs the folder of a checkpoint as --weights; {there}.")
    if name not in POLICIES and ".py:" not in name:
        close = difflib.get_close_matches(name, POLICIES, n=1)
        known = f"choose from {', '.join(POLICIES)}, or name FILE.py:FUNCTION of your own."
        hint = f"did you mean {close[0]!r}?" if close else known
        raise UserError(f"There is no robot policy {name!r}: {hint}")


def check_no_run(weights: Path) -> None:
    """Refuses the folder of a training in the place of the file that it wrote.

    Raises:
        UserError: It is one; the sentence names the file.
    """
    path = weights / POLICY_FILE
    if path.is_file():
        raise UserError(f"{weights} is the folder of a training; give the policy in it, {path}.")
    if (weights / "train" / "checkpoints").is_dir():
        raise UserError(
            f"{weights} is the folder of a training that has not ended; run it to its end for "
            f"{path}."
        )


def file_name(
    name: str, weights: Path | None = None, options: CheckpointOptions = AS_PUBLISHED
) -> str:
    """A policy's name in files: that of a function of one's own changes with its file.

    So does that of a policy file with its weights, and a checkpoint's with what its folder holds
    and with the options.
    """
    if name in (OPENVLA, PI0):
        weights = weights or bundled_policy()
        if weights.is_file():
            held = weights.read_bytes()
        else:
            held = f"{checkpoint_folder_digest(weights)} {options}".encode()
        return f"{name}-{zlib.crc32(held):08x}"
    if ".py:" not in name:
        return name
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"There is no file {file} to take the robot policy {function!r} from.")
    return f"{function}-{zlib.crc32(Path(file).read_bytes()):08x}"
