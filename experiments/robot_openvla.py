"""A small OpenVLA of one's own, or a published checkpoint's folder, as a robot's policy."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from data_pipelines.robot.libero import SUITES as LIBERO_SUITES
from data_pipelines.robot.libero import openvla_gripper
from data_pipelines.robot.policies import PROPRIO_SIZE
from data_pipelines.robot.simpler import openvla_action, openvla_picture
from data_pipelines.robot.simpler_protocol import ROBOTS
from data_pipelines.robot.simpler_protocol import SUITES as SIMPLER_SUITES
from data_pipelines.robot.tabletop import VIEWS
from experiments.robot_vla import Body
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.openvla.actions import (
    ActionStatistics,
    normalise_proprio,
    read_statistics,
    stored_statistics,
    unnormalise,
)
from fastdrive_jax.models.openvla.checkpoint import load
from fastdrive_jax.models.openvla.images import policy_picture
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.policy_file import load_policy
from fastdrive_jax.models.openvla.prompt import LlamaPrompts, WordPrompts, read_prompts
from fastdrive_jax.parallel.mesh import make_mesh

_SUITES = (*LIBERO_SUITES, *SIMPLER_SUITES)
_PROMPT_TOKENS = 64  # of a checkpoint's prompts, which LIBERO's instructions stay well below


def openvla_parts(
    suite: str, weights: Path, asset_id: str | None = None
) -> tuple[OpenVLA, dict, Body]:
    """Model, parameters, and what stands between it and the robot of a suite.

    Args:
        suite: Where it acts.
        weights: A policy file, or the folder of a published checkpoint.
        asset_id: See `statistics_key`.

    Raises:
        UserError: A file is missing or of another model, or its numbers are not the suite's.
    """
    if weights.is_file():
        model, params, spec = load_policy(weights)
        views = tuple(VIEWS.index(view) for view in spec.views)
        return model, params, openvla_body(spec.prompts, spec.statistics, views=views)
    config, params = load(weights, make_mesh(), jnp.bfloat16)
    if config.proprio_dim not in (0, PROPRIO_SIZE):
        raise UserError(
            f"{weights} takes {config.proprio_dim} numbers of the robot's state; {suite} has "
            f"{PROPRIO_SIZE}."
        )
    if suite in SIMPLER_SUITES and config.views > 1:
        raise UserError(f"{weights} takes {config.views} pictures; {suite} has one camera.")
    finish, picture = (
        (openvla_action, partial(openvla_picture, size=config.image_size))
        if suite in SIMPLER_SUITES
        # LIBERO has turned its pictures already.
        else (openvla_gripper, partial(policy_picture, size=config.image_size, turn=False))
    )
    body = openvla_body(
        read_prompts(weights, config, length=_PROMPT_TOKENS),
        read_statistics(weights, statistics_key(weights, suite, asset_id)),
        finish,
        picture=picture,
        views=tuple(range(config.views)),
    )
    return OpenVLA(config, jnp.bfloat16), params, body


def statistics_key(checkpoint_dir: Path, suite: str, asset_id: str | None = None) -> str:
    """Which data set's statistics scale the actions.

    As in the published evaluations, LIBERO's are under the suite's name or else that with
    "_no_noops" behind it, and SIMPLER's under the name of the real robot's data. A data set of
    one's own is taken if it is the only one, unless it is that of another suite.

    Args:
        checkpoint_dir: The checkpoint's folder.
        suite: Where it acts.
        asset_id: The key to take, whatever the suite is; None looks for it.

    Raises:
        UserError: There are statistics, but none for the suite.
    """
    if asset_id is not None:
        return asset_id  # what reads them names those that there are
    names = _suite_keys(suite)
    found, _ = stored_statistics(checkpoint_dir)
    if not isinstance(found, Mapping) or not found:
        return names[0]  # what reads them says that there are none
    if there := [name for name in names if name in found]:
        return there[0]
    (first, *others), known = found, {key for one in _SUITES for key in _suite_keys(one)}
    if others or first in known:
        raise UserError(
            f"{suite} takes the action statistics of {' or '.join(names)}, and {checkpoint_dir} "
            f"has those of {', '.join(sorted(found))}; choose among them with --asset-id."
        )
    print(
        f"Actions of {suite} are scaled by the statistics of {first}, the only ones in "
        f"{checkpoint_dir}.",
        file=sys.stderr,
    )
    return first


def _suite_keys(suite: str) -> tuple[str, ...]:
    if suite in SIMPLER_SUITES:
        return (ROBOTS[SIMPLER_SUITES[suite].robot].dataset,)
    return suite, f"{suite}_no_noops"


def openvla_body(
    prompts: LlamaPrompts | WordPrompts,
    statistics: ActionStatistics,
    finish: Callable[[np.ndarray], np.ndarray] = np.asarray,
    **parts: Any,
) -> Body:
    """What stands between an OpenVLA and a robot.

    Args:
        prompts: Of a fixed length.
        statistics: What actions and states were scaled by.
        finish: Actions in the robot's units to what the environment takes.
        parts: The rest of `Body`.
    """
    bounds, felt = statistics.action, statistics.proprio

    def to_robot(actions, states):
        del states
        return finish(np.asarray(unnormalise(actions[..., : len(bounds.low)], bounds)))

    def from_robot(states):
        return normalise_proprio(jnp.asarray(states), felt)

    shown = None if felt is None else from_robot
    return Body(prompts, prompts.length, to_robot, shown, **parts)
