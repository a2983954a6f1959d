"""Random weights and a picture to time a model with."""

from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np


def random_params(shapes: Any, dtype: jnp.dtype, seed: int = 0) -> Any:
    """Weights of unit gain for a tree of shapes, drawn where JAX computes."""
    places, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(places))  # fast on all devices

    def draw(path, leaf, key):
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.full(leaf.shape, float(name == "scale"), dtype)
        gain = leaf.shape[0] ** -0.5 if name == "kernel" else 1.0
        return gain * jax.random.normal(key, leaf.shape, dtype)

    found = [draw(path, leaf, key) for (path, leaf), key in zip(places, keys, strict=True)]
    return jax.tree.unflatten(tree, found)


def drawn_jpeg(size: tuple[int, int] = (900, 1600)) -> bytes:
    """A smooth picture with some noise, which a JPEG codes about as it codes a photograph."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (18, 32, 3), np.uint8)
    picture = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC).astype(np.int16)
    picture += rng.normal(0, 6, picture.shape).astype(np.int16)
    return cv2.imencode(".jpg", picture.clip(0, 255).astype(np.uint8))[1].tobytes()
