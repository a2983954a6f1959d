"""ReconPruner's loss from pictures: a frozen Qwen2.5-VL encoder in front of `recon_loss`.

Mixed precision: parameters and optimizer state are float32, layers compute in `dtype`, pictures and
losses are compared in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.vision import VisionEncoder
from fastdrive_jax.parallel.rules import constrain
from fastdrive_jax.training.reconstruction import ReconConfig, recon_loss


def encode_pictures(
    params: Any, images: UInt8[Array, "B H W 3"], config: VisionConfig, dtype: jnp.dtype
) -> Float[Array, "B N D"]:
    """Visual tokens by the frozen encoder; no gradient leads into it.

    Args:
        params: Of the encoder, in `dtype`.
        images: Of whole tokens.
        config: Sizes.
        dtype: Of the arithmetic.
    """
    tokens = VisionEncoder(config, dtype).apply({"params": params}, images)
    return jax.lax.stop_gradient(constrain(tokens, "batch", "token", "embed"))


def picture_loss(
    params: Any,
    batch: dict[str, Array],
    key: jax.Array,
    frozen: dict[str, Any],
    *,
    config: ReconConfig,
    encoder: VisionConfig,
    dtype: jnp.dtype = jnp.bfloat16,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`recon_loss` on the encoder's tokens.

    Args:
        params: Of `init_params`, float32.
        batch: image uint8 [B, H, W, 3]; mask uint8 {0, 1} [B, H, W]; camera int32 [B] if
            `config.needs_prior`.
        key: Draws budgets.
        frozen: "encoder", its params in `dtype`, and "prior" if `config.needs_prior`.
        config: Of the training.
        encoder: Sizes of the encoder.
        dtype: Of the arithmetic.
    """
    tokens = encode_pictures(frozen["encoder"], batch["image"], encoder, dtype)
    return recon_loss(
        cast_floats(params, dtype),
        {**batch, "tokens": tokens},
        key,
        frozen.get("prior"),
        config=config,
    )


def cast_floats(tree: Any, dtype: jnp.dtype) -> Any:
    """The tree with its floating-point leaves in `dtype`."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
