"""The order of tokens between rounds that compare one half of them to the other.

ToMe and VisPruner split the living tokens by their place: a, the even ones, and b, the odd ones.
Each a is matched to the b that it is most similar to, and the best matched leave. The rest goes
into the next round as the a's that stay, by falling similarity, and then the b's in their order:
the halves are new in every round.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NO_MATCH = -2.0  # below every cosine


def next_order(
    best: Float[Array, " a"], length: int, live: Int[Array, ""], leave: Int[Array, ""]
) -> tuple[Int[Array, " T"], Bool[Array, " T"]]:
    """Places of the tokens as the next round takes them, those that leave and the dead last.

    Args:
        best: Largest cosine of the tokens at even places to those at odd ones; ties go to the lower
            place.
        length: T, static.
        live: How many places, from the first, hold a token.
        leave: How many of the even ones leave.

    Returns:
        The order, and True for places whose token leaves.
    """
    place = jnp.arange(length)
    rank = jnp.full(length, 3.0).at[::2].set(-best)  # every cosine ranks between -2 and 2
    order = jnp.argsort(jnp.where(place < live, rank, 4.0))
    leaving = jnp.zeros(length, bool).at[order].set(place < leave)
    return jnp.roll(order, -leave), leaving
