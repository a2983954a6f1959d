"""A VLA with a pruning method as a policy of the robot environments."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from data_pipelines.robot.policies import Acted, Observation, RobotPolicy, digest
from data_pipelines.robot.workers import POLICY
from fastdrive_jax.inference.action_decoding import Moment, action_decoding
from fastdrive_jax.inference.pruned import reset_state
from fastdrive_jax.inference.robot import RobotVLA, answer, read_moment, see, start_state
from fastdrive_jax.models.prompts import Prompts
from fastdrive_jax.parallel.mesh import replicated_sharding
from fastdrive_jax.pruning.mistakes import check_kept


@dataclass(frozen=True)
class Body:
    """What stands between a model and a robot.

    Attributes:
        prompts: Instructions to ids, of one length.
        prompt_tokens: That length.
        to_robot: What the model answers [B, T, A] and the states that the robots were in [B, P] to
            actions as the environment takes them [B, T, 7].
        from_robot: States [B, P] as the model is shown them; None for a model that sees none.
        picture: A camera's picture to what the model is shown.
        views: Which of the observation's pictures, in the model's order.
        executed: Actions of a chunk before the next decision; None takes all.
    """

    prompts: Prompts
    prompt_tokens: int
    to_robot: Callable[[jax.Array, np.ndarray], np.ndarray]
    from_robot: Callable[[np.ndarray], jax.Array | np.ndarray] | None = None
    picture: Callable[[np.ndarray], np.ndarray] = field(default=np.asarray)
    views: tuple[int, ...] = (0,)
    executed: int | None = None


@dataclass(frozen=True)
class CheckpointOptions:
    """What a published checkpoint's folder does not tell.

    Attributes:
        replan_steps: Actions of a chunk of pi0 that are executed before the next decision.
        asset_id: Which of the folder's statistics: an OpenVLA's key of a data set, or openpi's
            asset id; None takes those of the suite, or the only ones.
    """

    replan_steps: int = 5  # openpi's on LIBERO
    asset_id: str | None = None


AS_PUBLISHED = CheckpointOptions()


def vla_policy(vla: RobotVLA, params: dict, body: Body, seed: int = 0) -> RobotPolicy:
    """The policy; what a temporal method remembers goes from decision to decision.

    While a temporal method warms up in an episode nothing is pruned of that sample, but the method
    watches, as published: a second set of programs, which run only in such moments. A batch may
    need both; each sample is then told the seconds of its own.

    Args:
        vla: Model and method.
        params: {"vla": ..., "pruner": ...}.
        body: Of the robot.
        seed: Of methods that draw, and of flow matching's noise.
    """
    temporal = vla.pruner.temporal
    warmup = 0 if temporal is None or vla.keep_ratio == 1 else temporal.warmup
    root = jax.random.key(seed)
    pruned, whole = (_stages(one, params) for one in (vla, replace(vla, keep_ratio=1.0)))
    place, calls = _placement(params), itertools.count()

    def decide(observations: Sequence[Observation], memory, first) -> Acted:
        begin, first = time.perf_counter(), np.asarray(first)
        moment = moment_of(observations, vla, body, root)
        key = root
        if "key" in vla.pruner.needs:
            steps = np.array([one.step for one in observations], np.uint32)
            key = _own_keys(root, digests(observations), steps)
        decisions = np.where(first, 0, memory["decisions"])
        warm = decisions < warmup
        # A state that lay elsewhere at first would have the programs compiled again.
        state = jax.device_put(memory["state"], place)
        # The first call is not timed, so all is compiled in it, with what chooses between the two.
        both = next(calls) == 0 and warmup > 0
        used = [
            run(moment, state, first, key)
            for run, samples in ((whole, warm), (pruned, ~warm))
            if both or samples.any()
        ]
        # A method within the model keeps the same state at every ratio; before it, it has none.
        actions, state = _by_sample(warm, [(acted.actions, acted.state) for acted, _ in used])
        rows = np.asarray(used[-1][0].keep_indices)
        kept = [None if all_kept else row for all_kept, row in zip(warm, rows, strict=True)]
        after = {"state": state, "decisions": decisions + 1}
        felt = np.stack([one.proprio for one in observations])
        finished = body.to_robot(actions, felt)[:, : body.executed]
        seconds = _by_sample(warm, [spent for _, spent in used])
        # A sample does not need the other's programs, though it waited for them here.
        others = _by_sample(warm, [sum(spent.values()) for _, spent in used[::-1]])
        total = time.perf_counter() - begin
        seconds[POLICY] = total - others if len(used) > 1 else total
        check_kept(rows, vla.model.config.visual_tokens, vla.pruner.name, vla.keep_ratio)
        return Acted(finished, kept, after, seconds)

    def start(batch: int):
        state = start_state(vla, batch, body.prompt_tokens, vla.model.dtype)
        return {"state": state, "decisions": np.zeros(batch, np.int32)}

    return RobotPolicy(start, decide, vla.model.config.token_grid, body.views)


def _stages(vla, params):
    """Vision, prefill and decoding as programs of their own, so that each can be timed."""

    def run(moment, state, first, key):
        clock = _Clock()
        inputs = clock.time("vision", _ENCODE, vla, params, moment, state, first)
        seen = clock.time("prefill", _READ, vla, params, inputs, moment, key)
        return clock.time("decode", _ACT, vla, params, inputs, moment, seen, key), clock.seconds

    return run


def _placement(params) -> jax.sharding.Sharding | None:
    """Where parameters are, for what each of their devices has a copy of; None without any."""
    for leaf in jax.tree.leaves(params):
        place = leaf.sharding
        return replicated_sharding(place.mesh) if isinstance(place, NamedSharding) else place
    return None


def _by_sample(warm, trees):
    """Of two trees each sample's own, or the only one."""

    def choose(whole, pruned):
        rows = warm.reshape(-1, *[1] * (np.ndim(whole) - 1))
        return (jnp if isinstance(whole, jax.Array) else np).where(rows, whole, pruned)

    return trees[0] if len(trees) == 1 else jax.tree.map(choose, *trees)


def moment_of(
    observations: Sequence[Observation], vla: RobotVLA, body: Body, key: jax.Array
) -> Moment:
    """A batch of observations as the model takes them.

    Args:
        observations: Of the robots.
        vla: The model.
        body: Of the robots.
        key: Of flow matching's noise, which is drawn by what each robot sees: the same whatever
            else is in the batch.
    """
    ids, lengths = body.prompts.encode([one.instruction for one in observations])
    images = [[body.picture(one.images[view]) for view in body.views] for one in observations]
    proprio, noise, size = None, None, action_decoding(vla.model).noise
    if body.from_robot is not None and getattr(vla.model.config, "proprio_dim", 1):
        proprio = body.from_robot(np.stack([one.proprio for one in observations]))
    if size is not None:
        noise = _noise(key, digests(observations), size)
    return Moment(np.asarray(images, np.uint8), ids, lengths, proprio, noise)


def digests(observations: Sequence[Observation]) -> np.ndarray:
    """Tells apart what each robot sees and feels, uint32 [B]."""
    return np.array([digest(one) for one in observations], np.uint32)


@jax.jit
def _own_keys(key, seen, steps):
    """A key for each robot by what it sees: the same whatever else is in the batch."""
    return jax.vmap(lambda own, step: jax.random.fold_in(jax.random.fold_in(key, own), step))(
        seen, steps
    )


@partial(jax.jit, static_argnums=2)
def _noise(key, seen, shape):
    return jax.vmap(lambda own: jax.random.normal(jax.random.fold_in(key, own), shape))(seen)


def _encode(vla, params, moment, memory, first):
    inputs = see(vla, params, moment.images)
    if memory is not None:
        start = start_state(vla, *moment.ids.shape, inputs.tokens.dtype)
        memory = reset_state(memory, start, first)
    return inputs.replace(state=memory)


# For all policies: another seed or suite of the same model and method needs no other program.
_ENCODE, _READ, _ACT = (jax.jit(f, static_argnums=0) for f in (_encode, read_moment, answer))


class _Clock:
    """Seconds of the stages of a decision, each waited for."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def time(self, stage, run, *given):
        begin = time.perf_counter()
        out = jax.block_until_ready(run(*given))
        spent = time.perf_counter() - begin
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        return out
