"""A driving VLA and a pruner small enough to compile in seconds."""

import jax
import numpy as np

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


def random_vla(config: DrivingConfig, seed: int = 0) -> dict:
    """Random params of a VLA; no program is compiled for them, nor for those of `small_params`."""
    images = np.zeros((1, len(config.cameras), *config.image_size, 3), np.uint8)
    ids = np.zeros((1, config.vocabulary.plan_length), np.int32)
    shapes = jax.eval_shape(DrivingVLA(config).init, jax.random.key(0), images, ids[:, :3], ids)
    return _drawn(shapes["params"], seed)


def small_params(config: DrivingConfig, seed: int = 0) -> dict:
    """Random {"vla": ..., "pruner": ...}."""
    tokens = np.zeros((1, 4, config.text.hidden_size), np.float32)
    shapes = jax.eval_shape(ReconPruner(PRUNER).init, jax.random.key(0), tokens)
    return {"vla": random_vla(config, seed), "pruner": _drawn(shapes["params"], seed)}


def _drawn(shapes: dict, seed: int) -> dict:
    """As an initialisation draws them: normal by the number of inputs, and no biases."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(leaf.shape, float(name == "scale"), np.float32)
        inputs = leaf.shape[-1 if name == "embedding" else 0]
        return (rng.normal(size=leaf.shape) / np.sqrt(inputs)).astype(np.float32)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))
