"""The driving policy: pictures in, pruned tokens, a trajectory out. One pure function."""

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from fastdrive_jax.inference.generate import generate
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA, visual_positions
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, keep_indices, pruner_scores
from fastdrive_jax.pruning.select import gather_position_ids, gather_tokens, top_k


@dataclass(frozen=True)
class DrivingPolicy:
    """What is compiled once: the model, the method and the number of kept tokens.

    Attributes:
        model: The VLA.
        pruner: Method of choosing tokens; one that needs no more than the picture and, where it
            draws, a key.
        keep_ratio: In (0, 1], of all cameras' tokens together.
    """

    model: DrivingVLA
    pruner: Pruner
    keep_ratio: float


class Plan(flax.struct.PyTreeNode):
    """What the policy answers.

    Attributes:
        waypoints: [B, T, 2] metres, x forward, y left, every half second.
        keep_indices: [B, K] tokens that the decoder saw, in raster order, camera after camera.
    """

    waypoints: Float[Array, "B T 2"]
    keep_indices: Int[Array, "B K"]


def choose_tokens(
    policy: DrivingPolicy,
    pruner_params: dict | None,
    tokens: Float[Array, "B N D"],
    key: jax.Array | None = None,
) -> Int[Array, "B K"]:
    """Kept tokens of a sample, of a budget that its pictures share.

    Scores are made of each picture by itself; a method that chooses tokens together sees all.
    """
    config = policy.model.config
    batch, count, dim = tokens.shape
    cameras = len(config.cameras)
    rows, columns = config.token_grid
    place = jnp.indices((rows, columns)).reshape(2, -1)
    ids = jnp.concatenate([jnp.zeros((1, rows * columns), place.dtype), place])
    if policy.pruner.choose is not None:
        camera = jnp.broadcast_to(jnp.arange(cameras), (batch, cameras))
        whole = PrunerInputs(tokens=tokens, camera=camera, grid=config.token_grid)
        return keep_indices(policy.pruner, pruner_params, whole, policy.keep_ratio, key)
    inputs = PrunerInputs(
        tokens=tokens.reshape(batch * cameras, rows * columns, dim),
        position_ids=jnp.broadcast_to(ids[:, None], (3, batch * cameras, rows * columns)),
        camera=jnp.tile(jnp.arange(cameras), batch)[:, None],
        grid=config.token_grid,
    )
    scores = pruner_scores(policy.pruner, pruner_params, inputs, key).reshape(batch, count)
    return top_k(scores, policy.pruner.budget(count, policy.keep_ratio))


def plan(
    policy: DrivingPolicy,
    params: dict,
    images: Shaped[Array, "B C H W 3"],
    speed: Float[Array, " B"],
    command: Int[Array, " B"],
    key: jax.Array | None = None,
) -> Plan:
    """Plans from pictures; `jax.jit(plan, static_argnums=0)` compiles once.

    Args:
        policy: Static.
        params: {"vla": ..., "pruner": ...}.
        images: uint8 pictures of the model's cameras.
        speed: Metres per second.
        command: 0 left, 1 straight, 2 right.
        key: For methods that draw.
    """
    model = policy.model
    variables = {"params": params["vla"]}
    tokens = model.apply(variables, images, method="encode")
    kept = choose_tokens(policy, params["pruner"], tokens, key)
    where = gather_position_ids(visual_positions(model.config, len(images)), kept)
    prompt = model.config.vocabulary.prompt(speed, command)
    return Plan(generate(model, variables, gather_tokens(tokens, kept), where, prompt), kept)
