"""A pruned Qwen2.5-VL of random weights, with pictures and prompts for it."""

import jax
import numpy as np
from tiny_checkpoint import CONFIG, random_params

from fastdrive_jax.inference.pruned_qwen import PrunedQwen
from fastdrive_jax.inference.sampling import SamplingConfig
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

IMAGE = CONFIG.image_token_id
PRUNER = ReconPrunerConfig(layer=CONFIG.text)
ASKED = PrunedQwen(CONFIG, PRUNER, 0.4, 2, (56, 112), 12, SamplingConfig(5), "float32")
PROMPTS = ([40, IMAGE, IMAGE, 41, 42], [50, IMAGE, 51, 52, IMAGE, 53, 54, 55, 56])


init = jax.jit(ReconPruner(PRUNER).init)


def pruned_params() -> dict:
    """Random {"vla": ..., "pruner": ...}."""
    tokens = np.zeros((1, 4, CONFIG.text.hidden_size), np.float32)
    pruner = init(jax.random.key(0), tokens)["params"]
    return {"vla": random_params(), "pruner": pruner}


def pictures(samples: int, seed: int = 0) -> np.ndarray:
    """Random [samples, 2, 56, 112, 3]."""
    shape = (samples, ASKED.pictures, *ASKED.image_size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
