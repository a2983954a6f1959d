"""A published pi0 as a policy of LIBERO, as openpi runs it there."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from data_pipelines.robot.policies import ACTION_SIZE, GRIPPER, PROPRIO_SIZE
from experiments.robot_vla import AS_PUBLISHED, Body, CheckpointOptions
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.pi0.checkpoint import load, read_checkpoint
from fastdrive_jax.models.pi0.config import PI0, Pi0Config
from fastdrive_jax.models.pi0.images import resize_with_pad
from fastdrive_jax.models.pi0.model import Pi0
from fastdrive_jax.models.pi0.prompt import read_prompts
from fastdrive_jax.models.pi0.scaling import RobotStatistics, scale, unscale
from fastdrive_jax.models.pi0.statistics import read_statistics
from fastdrive_jax.parallel.mesh import make_mesh

THIRD_PERSON, WRIST = 0, 1  # of an observation's pictures
_WRIST_NAMES = ("wrist", "hand", "image2")  # "image2" is the wrist's of lerobot's LIBERO
_PADDING = 1e-3  # what statistics of padding may differ from 0 by


def pi0_parts(
    weights: Path,
    options: CheckpointOptions = AS_PUBLISHED,
    published: Pi0Config = PI0,
    dtype: jnp.dtype = jnp.bfloat16,
) -> tuple[Pi0, dict, Body]:
    """Model, parameters, and what stands between it and LIBERO's robot.

    Views that LIBERO lacks are left out: openpi masks them, so nothing sees them either way.

    Args:
        weights: A checkpoint's folder.
        options: What it does not tell.
        published: See `read_checkpoint`.
        dtype: Of parameters and decoders.

    Raises:
        UserError: A file is missing or of another model, or its numbers are not LIBERO's.
    """
    told = read_checkpoint(weights, published)
    views = views_of(told.cameras)
    config = replace(told.config, views=len(views))
    if config.action_dim < PROPRIO_SIZE:
        raise UserError(
            f"{weights} takes {config.action_dim} numbers of the robot's state; LIBERO has "
            f"{PROPRIO_SIZE}."
        )
    if options.replan_steps > config.horizon:
        raise UserError(
            f"replan_steps={options.replan_steps} must be at most {config.horizon}, the actions of "
            f"a chunk of {weights}."
        )
    prompts = read_prompts(weights, config, told.prompt_tokens)
    statistics = libero_statistics(read_statistics(weights, options.asset_id), weights)
    relative = told.relative
    if relative is None:
        relative = relative_to_state(statistics, weights)
    elif len(relative) != ACTION_SIZE:
        raise UserError(
            f"{weights} gives actions of {len(relative)} numbers; LIBERO's have {ACTION_SIZE}."
        )
    params = load(weights, config, make_mesh(), dtype)
    body = Body(
        prompts,
        prompts.length,
        partial(to_libero, statistics, relative),
        partial(from_libero, statistics),
        partial(resize_with_pad, size=config.image_size),
        views,
        options.replan_steps,
    )
    return Pi0(config, dtype), params, body


def to_libero(
    statistics: RobotStatistics, relative: tuple[bool, ...], actions: np.ndarray, states: np.ndarray
) -> np.ndarray:
    """What the model answers, as LIBERO takes it; its gripper is LIBERO's, -1 opens.

    Args:
        statistics: Of LIBERO's numbers.
        relative: Which numbers of an action have the state of the decision still to be added.
        actions: [B, T, A].
        states: [B, P].
    """
    own = unscale(actions[..., :ACTION_SIZE], statistics.action)
    return own + np.where(relative, states[:, None, :ACTION_SIZE], np.float32(0))


def from_libero(statistics: RobotStatistics, states: np.ndarray) -> np.ndarray:
    """States [B, P] as the model is shown them."""
    return scale(states, statistics.state)


def views_of(cameras: tuple[str, ...]) -> tuple[int, ...]:
    """Which of LIBERO's pictures stand for a checkpoint's cameras, by their names.

    A camera of a kind that was there already is one that LIBERO lacks.
    """
    wrist = (any(part in name for part in _WRIST_NAMES) for name in cameras)
    found = dict.fromkeys(WRIST if one else THIRD_PERSON for one in wrist)
    return tuple(found) or (THIRD_PERSON, WRIST)


def libero_statistics(statistics: RobotStatistics, weights: Path) -> RobotStatistics:
    """Those of LIBERO's numbers alone; older ones go on with padding.

    Raises:
        UserError: They are of another robot.
    """
    for what, scaling, count in (
        ("states", statistics.state, PROPRIO_SIZE),
        ("actions", statistics.action, ACTION_SIZE),
    ):
        there = len(scaling.offset)
        if there < count or max(map(abs, scaling.offset[count:]), default=0) > _PADDING:
            raise UserError(
                f"{weights} has statistics of {what} of {there} numbers; LIBERO's have {count}. "
                "Choose the asset id of LIBERO's."
            )
    return RobotStatistics(
        statistics.state.first(PROPRIO_SIZE), statistics.action.first(ACTION_SIZE)
    )


def relative_to_state(statistics: RobotStatistics, weights: Path) -> tuple[bool, ...]:
    """Whether a checkpoint's actions are LIBERO's less the state, all but the gripper's.

    openpi's own pi0 of LIBERO was trained so, and its folder does not say it; but LIBERO's actions
    lie in [-1, 1], and its hand is turned by nearly pi, so the centre of what was subtracted shows.

    Raises:
        UserError: The statistics are of neither.
    """
    centres, states = (
        np.array(one.offset[:GRIPPER]) for one in (statistics.action, statistics.state)
    )
    if (np.abs(centres) <= 1).all():
        return (False,) * ACTION_SIZE
    if (np.abs(centres + states) <= 1).all():
        return (*[True] * GRIPPER, False)
    raise UserError(
        f"{weights} has statistics of actions around {np.round(centres, 2).tolist()}; LIBERO's lie "
        "in [-1, 1]. Choose the asset id of LIBERO's."
    )
