"""Control: tokens at random, drawn anew for each picture."""

from fastdrive_jax.pruning.draws import uniform
from fastdrive_jax.pruning.interface import Pruner


def random_tokens() -> Pruner:
    """Uniform scores from the key."""
    return Pruner(
        name="random",
        score=lambda params, inputs, key: uniform(key, inputs.tokens.shape[:2]),
        needs=frozenset({"tokens", "key"}),
    )
