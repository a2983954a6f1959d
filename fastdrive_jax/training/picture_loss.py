"""ReconPruner's loss from pictures: a frozen encoder in front of `recon_loss`.

Mixed precision: parameters and optimizer state are float32, layers compute in `dtype`, pictures and
losses are compared in float32.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Visual tokens by the vision encoder of a Qwen2.5-VL.

    Args:
        params: Of the encoder, in `dtype`.
        images: Of whole tokens.
        config: Sizes.
        dtype: Of the arithmetic.
    """
    return VisionEncoder(config, dtype).apply({"params": params}, images)


def picture_loss(
    params: Any,
    batch: dict[str, Array],
    key: jax.Array,
    frozen: dict[str, Any],
    *,
    config: ReconConfig,
    encode: Callable[[Any, Array], Array] | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`recon_loss` on the tokens that a batch has, or on the frozen encoder's.

    Args:
        params: Of `init_params`, float32.
        batch: image uint8 [B, H, W, 3]; mask uint8 {0, 1} [B, H, W]; camera int32 [B] if
            `config.needs_prior`; tokens [B, N, D], unless they are made here.
        key: Draws budgets.
        frozen: "encoder", what `encode` takes first, if it is needed, and "prior" if
            `config.needs_prior`.
        config: Of the training.
        encode: Tokens from the frozen encoder's parameters and pictures.
        dtype: Of the arithmetic.
    """
    return recon_loss(
        cast_floats(params, dtype),
        with_tokens(batch, frozen, encode),
        key,
        frozen.get("prior"),
        config=config,
    )


def with_tokens(
    batch: dict[str, Array],
    frozen: dict[str, Any],
    encode: Callable[[Any, Array], Array] | None,
) -> dict[str, Array]:
    """The batch with its tokens; see `picture_loss`."""
    if "tokens" in batch:
        return batch
    if encode is None:
        raise ValueError("the batch has no tokens and there is no encoder to make them")
    tokens = constrain(encode(frozen["encoder"], batch["image"]), "batch", "token", "embed")
    return {**batch, "tokens": jax.lax.stop_gradient(tokens)}


def cast_floats(tree: Any, dtype: jnp.dtype) -> Any:
    """The tree with its floating-point leaves in `dtype`."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
