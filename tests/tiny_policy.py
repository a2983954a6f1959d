"""A driving VLA and a pruner small enough to compile in seconds."""

import jax
import jax.numpy as jnp
import numpy as np
from small_openvla import random_params

from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

TEXT = DecoderConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=256,
    rope_theta=10_000.0,
    mrope_section=(2, 3, 3),
)
VISION = VisionConfig(
    depth=1,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=32,
    fullatt_block_indexes=(0,),
)
PRUNER = ReconPrunerConfig(layer=TEXT)


def small_config(cameras: tuple[str, ...] = ("CAM_FRONT",)) -> DrivingConfig:
    return DrivingConfig(vision=VISION, text=TEXT, image_size=(56, 140), cameras=cameras)


def random_vla(config: DrivingConfig) -> dict:
    """Random params of a VLA for whose initialisation no program is compiled."""
    images = np.zeros((1, len(config.cameras), *config.image_size, 3), np.uint8)
    ids = np.zeros((1, config.vocabulary.plan_length), np.int32)
    shapes = jax.eval_shape(DrivingVLA(config).init, jax.random.key(0), images, ids[:, :3], ids)
    return random_params(shapes["params"])


def small_params(config: DrivingConfig, seed: int = 0) -> dict:
    """Random {"vla": ..., "pruner": ...}."""
    images = jnp.zeros((1, len(config.cameras), *config.image_size, 3), jnp.uint8)
    prompt = jnp.zeros((1, 3), jnp.int32)
    ids = jnp.zeros((1, config.vocabulary.plan_length), jnp.int32)
    keys = jax.random.split(jax.random.key(seed))
    vla = jax.jit(DrivingVLA(config).init)(keys[0], images, prompt, ids)["params"]
    tokens = jnp.zeros((1, 4, config.text.hidden_size))
    pruner = jax.jit(ReconPruner(PRUNER).init)(keys[1], tokens)["params"]
    return {"vla": vla, "pruner": pruner}
