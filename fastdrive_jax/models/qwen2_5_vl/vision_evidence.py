"""What pruners read of the vision encoder: the attention that tokens receive, and their keys.

Both are of the last block that sees the whole picture. It sows its queries and keys, which are kept
if a caller asks for them:

    tokens, kept = model.apply(variables, images, method="encode", mutable=["intermediates"])
    evidence = vision_evidence(kept["intermediates"]["visual"], config.vision, grid)

Attention is that of patches, and a token is four of them: what it receives is their sum, so that
the tokens of a picture share 1. Queries and keys are turned by their place, as attention reads
them. The weights are made and added up in blocks of rows, `attention_received`; never P x P. All
rows of a picture of 1596 x 1596 would cost a fifth of the language model's prefill on a CPU, so
that of more than 1,024 patches an even share of the rows stands for all.
"""

import math
from collections.abc import Mapping

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastdrive_jax.models.attention_rows import attention_received
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.patches import ordered_layout

MOST_ROWS = 1024


class VisionEvidence(flax.struct.PyTreeNode):
    """Of each picture, tokens in raster order; cameras of a sample are for the caller to join.

    Attributes:
        received: `PrunerInputs.vision_received` [M, N].
        keys: `PrunerInputs.vision_keys` [M, N, d].
    """

    received: Float[Array, "M N"]
    keys: Float[Array, "M N d"]


def vision_evidence(
    intermediates: Mapping, config: VisionConfig, grid: tuple[int, int] | None = None
) -> VisionEvidence:
    """Evidence of pictures of one size, float32.

    Args:
        intermediates: Of the `VisionEncoder`.
        config: Of the encoder.
        grid: Patch rows and columns where the encoder took pictures, whose patches it orders by
            window; None where it took rows (`encode_rows`, `QwenVL`), which lie in merge blocks.

    Raises:
        ValueError: No block sees the whole picture.
    """
    if not config.fullatt_block_indexes:
        raise ValueError("no block of the encoder sees the whole picture")
    sown = intermediates[f"blocks_{max(config.fullatt_block_indexes)}"]["attn"]
    found = token_evidence(sown["query"][-1], sown["key"][-1], config.spatial_merge_size**2)
    if grid is None:
        return found
    _, _, places = ordered_layout(grid, config)
    return VisionEvidence(found.received[:, places], found.keys[:, places])


def token_evidence(
    query: Float[Array, "M P Q d"], key: Float[Array, "M P Q d"], block: int
) -> VisionEvidence:
    """Evidence of the tokens in the order of their patches, `block` of which make one."""
    pictures, patches, _, size = key.shape
    tokens = patches // block
    received = attention_received(query, key, every=math.ceil(patches / MOST_ROWS))
    keys = jnp.mean(key.astype(jnp.float32), axis=2)
    return VisionEvidence(
        received=received.reshape(pictures, tokens, block).sum(axis=2),
        keys=keys.reshape(pictures, tokens, block, size).mean(axis=2),
    )
