"""A VLA with a pruning method as a policy of the robot environments: three programs a decision."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.robot.policies import Acted, Observation, RobotPolicy
from fastdrive_jax.inference.pruned import reset_state
from fastdrive_jax.inference.robot import (
    Moment,
    RobotVLA,
    answer,
    read_moment,
    see,
    start_state,
)
from fastdrive_jax.models.openvla.actions import (
    ActionStatistics,
    normalise_proprio,
    unnormalise,
)
from fastdrive_jax.models.openvla.prompt import Prompts


@dataclass(frozen=True)
class Body:
    """What stands between a model and a robot.

    Attributes:
        prompts: Instructions to ids, of one length.
        prompt_tokens: That length.
        statistics: What actions and states were scaled by.
        picture: A camera's picture to what the model is shown.
        views: Which of the observation's pictures, in the model's order.
        finish: Actions in the robot's units to what the environment takes.
    """

    prompts: Prompts
    prompt_tokens: int
    statistics: ActionStatistics
    picture: Callable[[np.ndarray], np.ndarray] = field(default=np.asarray)
    views: tuple[int, ...] = (0,)
    finish: Callable[[np.ndarray], np.ndarray] = field(default=np.asarray)


def vla_policy(vla: RobotVLA, params: dict, body: Body, seed: int = 0) -> RobotPolicy:
    """The policy; what a temporal method remembers goes from decision to decision.

    Vision, prefill and decoding are programs of their own, so that each can be timed.

    Args:
        vla: Model and method.
        params: {"vla": ..., "pruner": ...}.
        body: Of the robot.
        seed: Of methods that draw, and of flow matching's noise.
    """
    encode = jax.jit(partial(_encode, vla))
    read = jax.jit(partial(read_moment, vla))
    act = jax.jit(partial(answer, vla))
    root = jax.random.key(seed)

    def decide(observations: Sequence[Observation], memory, first) -> Acted:
        moment = moment_of(observations, vla, body)
        key = jax.random.fold_in(root, observations[0].step)
        clock = _Clock()
        inputs = clock.time("vision", encode, params, moment, memory, np.asarray(first))
        seen = clock.time("prefill", read, params, inputs, moment, key)
        acted = clock.time("decode", act, params, inputs, moment, seen, key)
        size = len(body.statistics.action.low)
        actions = unnormalise(acted.actions[..., :size], body.statistics.action)
        return Acted(
            body.finish(np.asarray(actions)), np.asarray(acted.keep_indices), acted.state,
            clock.seconds,
        )  # fmt: skip

    def start(batch: int):
        return start_state(vla, batch, body.prompt_tokens)

    return RobotPolicy(start, decide, vla.model.config.token_grid)


def moment_of(observations: Sequence[Observation], vla: RobotVLA, body: Body) -> Moment:
    """A batch of observations as the model takes them."""
    ids, lengths = body.prompts.encode([one.instruction for one in observations])
    images = [[body.picture(one.images[view]) for view in body.views] for one in observations]
    proprio = None
    if body.statistics.proprio is not None and getattr(vla.model.config, "proprio_dim", 1):
        felt = np.stack([one.proprio for one in observations])
        proprio = normalise_proprio(jnp.asarray(felt), body.statistics.proprio)
    return Moment(np.asarray(images, np.uint8), ids, lengths, proprio)


def _encode(vla, params, moment, memory, first):
    inputs = see(vla, params, moment.images)
    if memory is not None:
        start = start_state(vla, *moment.ids.shape, inputs.tokens.dtype)
        memory = reset_state(memory, start, first)
    return inputs.replace(state=memory)


class _Clock:
    """Seconds of the stages of a decision, each waited for."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def time(self, stage, run, *given):
        begin = time.perf_counter()
        out = jax.block_until_ready(run(*given))
        self.seconds[stage] = time.perf_counter() - begin
        return out
