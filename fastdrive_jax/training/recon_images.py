"""What a ReconPruner in training keeps and its decoder paints, as one picture."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from fastdrive_jax.pruning.recon_pruner import ReconPruner
from fastdrive_jax.training.reconstruction import (
    TOKEN,
    ReconConfig,
    grid_position_ids,
    masked_targets,
    reconstruct,
    shrink,
    training_mask,
)

DIMMED = 0.25  # brightness of tokens that are not kept
GAP = 2  # white pixels between pictures


def recon_sheet(
    params: Any, batch: dict[str, Array], key: jax.Array, config: ReconConfig, rows: int = 4
) -> UInt8[Array, "height width 3"]:
    """For each of the first pictures a row, at the resolution of the targets.

    From left to right: the picture, what is kept of it, the foreground to paint and as painted, the
    background to paint and as painted.

    Args:
        params: Of `init_params`.
        batch: image uint8 [B, H, W, 3], mask uint8 [B, H, W], tokens [B, N, D].
        key: Draws budgets, as in training.
        config: Of the training.
        rows: Pictures, at most B.
    """
    image, mask, tokens = (batch[name] for name in ("image", "mask", "tokens"))
    grid = image.shape[1] // TOKEN, image.shape[2] // TOKEN
    tokens = tokens.astype(params["pruner"]["query"].dtype)
    scores = ReconPruner(config.pruner).apply(
        {"params": params["pruner"]}, tokens, grid_position_ids(len(tokens), grid)
    )
    keep = training_mask(scores.astype(jnp.float32), key, config)
    targets = masked_targets(image, mask, config)
    painted = reconstruct(params, tokens, keep, grid, config)
    edge = config.target_pixels
    light = jnp.where(keep > 0.5, 1.0, DIMMED).reshape(-1, *grid)
    light = jnp.repeat(jnp.repeat(light, edge, axis=1), edge, axis=2)[..., None]
    whole = shrink(image.astype(jnp.float32) / 255, config)
    columns = (whole, whole * light, targets[0], painted[0], targets[1], painted[1])
    framed = [  # cut here and not before: a batch is laid out over devices, a few pictures are not
        jnp.pad(
            x[:rows].astype(jnp.float32), ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=1
        )
        for x in columns
    ]
    sheet = jnp.concatenate(framed, axis=2)
    sheet = sheet.reshape(-1, *sheet.shape[2:])
    return jnp.round(255 * jnp.clip(sheet, 0, 1)).astype(jnp.uint8)
