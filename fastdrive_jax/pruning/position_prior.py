"""Control: where foreground usually is, blind to the picture: the mean mask of the training set."""

import numpy as np
from jaxtyping import Float, Int

from fastdrive_jax.pruning.interface import Pruner, PrunerInputs


def mean_fractions(
    fractions: Float[np.ndarray, "M N"], camera: Int[np.ndarray, " M"] | None = None
) -> Float[np.ndarray, "cameras N"]:
    """Mean foreground share of each token place, for each camera by itself.

    Args:
        fractions: Foreground shares of the training pictures.
        camera: Camera index of each picture; None means one camera.

    Raises:
        ValueError: A camera below the highest index has no picture.
    """
    camera = np.zeros(len(fractions), np.int64) if camera is None else np.asarray(camera)
    counts = np.bincount(camera)
    if not counts.size or (counts == 0).any():
        raise ValueError(f"every camera needs a training picture, but the counts are {counts}")
    sums = np.zeros((len(counts), fractions.shape[1]))
    np.add.at(sums, camera, fractions)
    return (sums / counts[:, None]).astype(np.float32)


def position_prior() -> Pruner:
    """Its params are the means [cameras, n] of `mean_fractions`."""

    def score(params, inputs: PrunerInputs, key):
        return params[inputs.camera].reshape(inputs.tokens.shape[:2])

    return Pruner(name="prior", score=score, needs=frozenset({"tokens", "camera"}))
