"""OpenVLAs small enough to compile in seconds, and random inputs for them."""

from dataclasses import replace

import jax
import numpy as np

from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.openvla.config import OpenVLAConfig
from fastdrive_jax.models.openvla.weights import abstract_params
from fastdrive_jax.models.vit_config import ViTConfig

DINO = ViTConfig(
    depth=3,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    patch_size=8,
    image_size=24,
    registers=2,
)
SIGLIP = replace(
    DINO,
    depth=2,
    hidden_size=24,
    intermediate_size=48,
    class_token=False,
    registers=0,
    layer_scale=False,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
TOKENS = OpenVLAConfig(
    (DINO, SIGLIP),
    DecoderConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        vocab_size=352,
        rope_theta=10_000.0,
        mrope_section=(4, 0, 0),
        tie_word_embeddings=False,
        attention_bias=False,
    ),
    action_dim=3,
)
SLOTS = replace(TOKENS, views=2, head="regression", chunk=2, proprio_dim=4)


def random_params(config: OpenVLAConfig, seed: int = 0) -> dict:
    """Parameters of which none is 0 or 1."""
    rng = np.random.default_rng(seed)
    shapes = abstract_params(config)
    return jax.device_put(
        jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    )


def random_inputs(config: OpenVLAConfig, lengths: tuple[int, ...], seed: int = 0) -> dict:
    """Arguments of `OpenVLA.__call__` for prompts of these lengths."""
    rng = np.random.default_rng(seed)
    batch, edge = len(lengths), config.image_size
    last = config.action_vocab_size
    ids = rng.integers(3, last - config.bins, (batch, max(lengths)))
    ids[:, 0] = config.bos_id
    inputs = {
        "images": rng.integers(0, 256, (batch, config.views, edge, edge, 3), np.uint8),
        "ids": ids.astype(np.int32),
        "lengths": np.array(lengths, np.int32),
        "actions": rng.integers(last - config.bins, last, (batch, config.action_tokens)),
    }
    if config.proprio_dim:
        inputs["proprio"] = rng.uniform(-1, 1, (batch, config.proprio_dim)).astype(np.float32)
    return inputs
