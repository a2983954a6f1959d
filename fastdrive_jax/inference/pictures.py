"""Pictures to what a method may look at: visual tokens, and what the encoder says of them."""

import math
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.models.qwen2_5_vl.patches import patch_grid, patch_rows
from fastdrive_jax.models.qwen2_5_vl.vision_evidence import vision_evidence
from fastdrive_jax.pruning.interface import VISION, Need, PrunerInputs


def driving_inputs(config: DrivingConfig, tokens: Float[Array, "B N D"]) -> PrunerInputs:
    """What follows from the model's layout alone; position ids count within a picture."""
    return layout_inputs(tokens, config.token_grid)


def layout_inputs(tokens: Float[Array, "B N D"], grid: tuple[int, int]) -> PrunerInputs:
    """The same of any model whose tokens fill a grid in each picture.

    Args:
        tokens: Visual tokens, picture after picture.
        grid: Token rows and columns of a picture.
    """
    batch, each = len(tokens), grid[0] * grid[1]
    pictures = tokens.shape[1] // each
    place = jnp.indices(grid).reshape(2, -1)
    ids = jnp.concatenate([jnp.zeros((1, each), place.dtype), place])
    ids = jnp.tile(ids, pictures)[:, None]
    return PrunerInputs(
        tokens=tokens,
        position_ids=jnp.broadcast_to(ids, (3, batch, ids.shape[2])),
        camera=jnp.broadcast_to(jnp.arange(pictures), (batch, pictures)),
        grid=grid,
    )


class Encoded(flax.struct.PyTreeNode):
    """What the vision encoder gives.

    Attributes:
        tokens: Visual tokens [B, N, D].
        vision: Queries and keys that methods read, see `vision_evidence`; None unless asked for.
    """

    tokens: Float[Array, "B N D"]
    vision: Any = None


def encode_pictures(
    model: DrivingVLA,
    params: dict,
    images: Shaped[Array, "B C H W 3"],
    needs: frozenset[Need] = frozenset(),
) -> Encoded:
    """The vision encoder's part of `picture_inputs`."""
    if not needs & VISION:
        return Encoded(model.apply(params, images, method="encode"))
    tokens, kept = model.apply(params, images, method="encode", mutable=["intermediates"])
    last = [f"blocks_{number}" for number in sorted(model.config.vision.fullatt_block_indexes)[-1:]]
    return Encoded(tokens, {block: kept["intermediates"]["visual"][block] for block in last})


def encoded_inputs(
    model: DrivingVLA,
    encoded: Encoded,
    images: Shaped[Array, "B C H W 3"],
    needs: frozenset[Need] = frozenset(),
) -> PrunerInputs:
    """The rest of `picture_inputs`: what a method computes of the pictures itself."""
    config = model.config
    batch, cameras = images.shape[:2]
    inputs = driving_inputs(config, encoded.tokens)
    if needs & VISION:
        grid = patch_grid(*config.image_size, config.vision)
        found = vision_evidence(encoded.vision, config.vision, grid)
        inputs = inputs.replace(
            # A sample's tokens share 1, whatever the number of its cameras.
            vision_received=found.received.reshape(batch, -1) / cameras,
            vision_keys=found.keys.reshape(batch, -1, found.keys.shape[-1]),
        )
    if "pixels" in needs:
        inputs = inputs.replace(pixels=token_pixels(images, config.vision.token_pixels))
    return inputs


def picture_inputs(
    model: DrivingVLA,
    params: dict,
    images: Shaped[Array, "B C H W 3"],
    needs: frozenset[Need] = frozenset(),
) -> PrunerInputs:
    """Visual tokens of uint8 pictures, and what else a method needs of the pictures.

    Args:
        model: The VLA.
        params: {"params": ...} of it.
        images: Of the model's cameras.
        needs: Of the method.
    """
    return encoded_inputs(model, encode_pictures(model, params, images, needs), images, needs)


def token_pixels(images: Shaped[Array, "B C H W 3"], edge: int) -> Shaped[Array, "B N P"]:
    """Each token's square of the picture, 0 for black [B, N, 3 * edge * edge]."""
    flat = images.reshape(-1, *images.shape[2:])
    squares = patch_rows(flat, edge, 1).astype(jnp.float32)
    return squares.reshape(len(images), -1, squares.shape[-1])


def patch_pixels(rows: Shaped[Array, "M P pixels"], merge: int) -> Float[Array, "M n values"]:
    """The same of pictures that are patch rows already, as `Batch.rows`; n = P / merge^2.

    Args:
        rows: Of `patch_rows`.
        merge: Patches merged along each axis.
    """
    edge = math.isqrt(rows.shape[-1] // 3)
    blocks = rows.reshape(len(rows), -1, merge, merge, 3, edge, edge)
    squares = blocks.transpose(0, 1, 4, 2, 5, 3, 6).astype(jnp.float32)
    return squares.reshape(*blocks.shape[:2], -1)
