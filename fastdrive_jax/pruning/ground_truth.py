"""Upper control: the true foreground mask, which no method may see."""

from fastdrive_jax.pruning.interface import Pruner


def ground_truth() -> Pruner:
    """Tokens with most foreground area."""
    return Pruner(
        name="ground_truth",
        score=lambda params, inputs, key: inputs.foreground,
        needs=frozenset({"tokens", "foreground"}),
    )
