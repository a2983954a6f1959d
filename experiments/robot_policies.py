"""What moves a robot, by its name."""

import difflib
import zlib
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from data_pipelines.robot.environment import TABLETOP, Suite
from data_pipelines.robot.expert import expert_policy
from data_pipelines.robot.libero import openvla_gripper
from data_pipelines.robot.policies import PROPRIO_SIZE, RobotPolicy, random_policy
from data_pipelines.robot.tabletop import VIEWS
from experiments.drives import UNPRUNED
from experiments.robot_vla import Body, vla_policy
from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.robot import RobotVLA
from fastdrive_jax.models.openvla.actions import read_statistics
from fastdrive_jax.models.openvla.checkpoint import load
from fastdrive_jax.models.openvla.images import policy_picture
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.policy_file import bundled_policy, load_policy
from fastdrive_jax.models.openvla.prompt import read_prompts
from fastdrive_jax.own_files import own_function
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.pruning import builds_on_recon, make_pruner
from fastdrive_jax.pruning.budgets import per_camera

EXPERT, RANDOM, OPENVLA = "expert", "random", "openvla"
CONTROLS = (EXPERT, RANDOM)  # they look at no visual tokens, so nothing of them is pruned
POLICIES = (*CONTROLS, OPENVLA)
_PROMPT_TOKENS = 64  # of a checkpoint's prompts, which LIBERO's instructions stay well below


def robot_policy(
    name: str,
    suite: Suite,
    method: str | None,
    ratio: float | None,
    seed: int,
    weights: Path | None = None,
    per_view: bool = False,
) -> RobotPolicy:
    """A policy with a pruning method.

    Args:
        name: Of `POLICIES`, or "FILE.py:FUNCTION", a function of your own that takes `suite`,
            `method`, `ratio` and `seed` by name and returns a `RobotPolicy`.
        suite: Where it acts.
        method: How tokens are chosen; "unpruned" keeps all; None for controls.
        ratio: Kept tokens; None for controls.
        seed: Of what draws.
        weights: Of "openvla": a policy file of `fastdrive robot train`, or the folder of a
            published checkpoint; at the tabletop None takes the packaged policy.
        per_view: Whether each view of "openvla" has a budget of its own.

    Raises:
        UserError: There is no such policy, or it does not belong to this suite.
    """
    check_policy(name, suite.name, weights)
    if name == EXPERT:
        return expert_policy()
    if name == RANDOM:
        return random_policy(seed)
    if name == OPENVLA:
        model, params, body = openvla_parts(suite.name, weights or bundled_policy())
        # A method within the model cuts nothing at a ratio of 1.
        pruner = make_pruner("fastv" if method == UNPRUNED else method)
        if per_view and method != UNPRUNED:
            pruner = per_camera(pruner, model.config.views)
        return vla_policy(
            RobotVLA(model, pruner, ratio), {"vla": params, "pruner": None}, body, seed
        )
    make = own_function(name, "robot policy")
    return make(suite=suite, method=method, ratio=ratio, seed=seed)


def openvla_parts(suite: str, weights: Path) -> tuple[OpenVLA, dict, Body]:
    """Model, parameters, and what stands between it and the robot of a suite."""
    if weights.is_file():
        model, params, spec = load_policy(weights)
        views = tuple(VIEWS.index(view) for view in spec.views)
        body = Body(spec.prompts, spec.prompts.length, spec.statistics, views=views)
        return model, params, body
    config, params = load(weights, make_mesh(), jnp.bfloat16)
    if config.proprio_dim not in (0, PROPRIO_SIZE):
        raise UserError(
            f"{weights} takes {config.proprio_dim} numbers of the robot's state; {suite} has "
            f"{PROPRIO_SIZE}."
        )
    body = Body(
        read_prompts(weights, config, length=_PROMPT_TOKENS),
        _PROMPT_TOKENS,
        read_statistics(weights, statistics_key(weights, suite)),
        # The suite has turned its pictures already.
        partial(policy_picture, size=config.image_size, turn=False),
        tuple(range(config.views)),
        openvla_gripper,
    )
    return OpenVLA(config, jnp.bfloat16), params, body


def statistics_key(checkpoint_dir: Path, suite: str) -> str:
    """The suite's name among a checkpoint's statistics, where it may end in "_no_noops"."""
    cleaned = f"{suite}_no_noops"
    try:
        read_statistics(checkpoint_dir, cleaned)
    except UserError:
        return suite  # what is read by that name names what there is
    return cleaned


def check_methods(methods: tuple[str, ...]) -> None:
    """Refuses methods that robots have nothing for.

    Raises:
        UserError: There is no such method, or it needs training or masks.
    """
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
        if weights.is_file() and suite != TABLETOP:
            raise UserError(
                f"A small policy knows the suite {TABLETOP} only; for {suite} give the folder of a "
                "checkpoint as --weights."
            )
    if name not in POLICIES and ".py:" not in name:
        close = difflib.get_close_matches(name, POLICIES, n=1)
        known = f"choose from {', '.join(POLICIES)}, or name FILE.py:FUNCTION of your own."
        hint = f"did you mean {close[0]!r}?" if close else known
        raise UserError(f"There is no robot policy {name!r}: {hint}")


def file_name(name: str, weights: Path | None = None) -> str:
    """A policy's name in files: that of a function of one's own changes with its file.

    So does that of a policy file with its weights, and a checkpoint's with its folder's name.
    """
    if name == OPENVLA:
        weights = weights or bundled_policy()
        sum_of = weights.read_bytes() if weights.is_file() else str(weights.resolve()).encode()
        return f"{name}-{zlib.crc32(sum_of):08x}"
    if ".py:" not in name:
        return name
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"There is no file {file} to take the robot policy {function!r} from.")
    return f"{function}-{zlib.crc32(Path(file).read_bytes()):08x}"
