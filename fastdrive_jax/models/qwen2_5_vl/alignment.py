"""Hidden units of the vision encoder filled up to what matrix units take at full speed.

The published encoders have 3,420 hidden units in each block. Tensor cores load rows of 16 bytes, so
that such products run at about half their speed (measured on an H200, bfloat16). Units that are
always zero change no result: silu(0) * 0 = 0.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig

MULTIPLE = 128


def aligned_config(config: VisionConfig, multiple: int = MULTIPLE) -> VisionConfig:
    """The config with `intermediate_size` rounded up."""
    return replace(config, intermediate_size=-(-config.intermediate_size // multiple) * multiple)


def align_hidden(params: Any, config: VisionConfig, multiple: int = MULTIPLE) -> Any:
    """Parameters of the encoder of `aligned_config` that computes the same.

    Args:
        params: Of the vision encoder; whole or abstract under `jax.eval_shape`.
        config: Its sizes as published.
        multiple: What `intermediate_size` is rounded up to.
    """
    more = aligned_config(config, multiple).intermediate_size - config.intermediate_size

    def fill(path: tuple, leaf: jax.Array) -> jax.Array:
        layer = path[-2].key
        if layer in ("gate_proj", "up_proj"):
            return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, more)])
        if layer == "down_proj" and path[-1].key == "kernel":
            return jnp.pad(leaf, ((0, more), (0, 0)))
        return leaf

    return jax.tree_util.tree_map_with_path(fill, params) if more else params
