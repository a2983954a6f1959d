"""What pruners read of a plain vision transformer: the attention that patches get, and keys.

Both are of one block, which sows its queries and keys. Where there is a class token its row says
what patches matter, as methods were published; elsewhere the mean over all rows does.
"""

from collections.abc import Mapping

import jax.numpy as jnp

from fastdrive_jax.models.attention_rows import attention_received, attention_rows
from fastdrive_jax.models.qwen2_5_vl.vision_evidence import VisionEvidence
from fastdrive_jax.models.vit_config import ViTConfig


def vit_evidence(intermediates: Mapping, config: ViTConfig) -> VisionEvidence:
    """Evidence of the last block that was built, float32; a picture's patches share at most 1.

    Args:
        intermediates: Of a `ViT`.
        config: Of it.
    """
    last = max(intermediates, key=lambda name: int(name.removeprefix("blocks_")))
    query, key = (intermediates[last]["attn"][name][-1] for name in ("query", "key"))
    if config.class_token:
        received = attention_rows(query[:, :1], key)[:, :, 0].mean(axis=1)
    else:
        received = attention_received(query, key)
    keys = jnp.mean(key.astype(jnp.float32), axis=2)
    return VisionEvidence(received[:, config.prefix :], keys[:, config.prefix :])
