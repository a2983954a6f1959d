"""Training on some of the visual tokens, so that a small VLA can read any number of them.

A published VLA comes from a model that was trained on pictures of every size. One that knows one
token count only takes any other for noise.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastdrive_jax.pruning.select import gather_tokens, num_keep, top_k

Loss = TypeVar("Loss")


def on_some_tokens(
    loss: Callable[[Float[Array, "B K D"], Int[Array, "B K"]], Loss],
    tokens: Float[Array, "B N D"],
    order: Float[Array, "B N"],
    keep_choices: Sequence[float],
    key: jax.Array,
) -> Loss:
    """A loss on the tokens that come first in an order; how many is drawn for the whole batch.

    The encoder learns from whole pictures alone: if it knew that tokens go missing, it would hide
    copies of what it sees in their neighbours, as no pretrained encoder does.

    Args:
        loss: (kept tokens, which they are) to anything.
        tokens: Visual tokens, all of them. They get a gradient only where all are kept.
        order: Scores, of `draw_order`; the highest are kept.
        keep_choices: Shares of the tokens, one of which is drawn; one named twice, twice as often.
        key: Draws the share.
    """
    count = tokens.shape[1]

    def with_kept(k):
        def run(tokens):
            if k < count:
                tokens = jax.lax.stop_gradient(tokens)
            kept = top_k(order, k)
            return loss(gather_tokens(tokens, kept), kept)

        return run

    shares = sorted(set(keep_choices))
    drawn = jax.random.randint(key, (), 0, len(keep_choices))
    choice = jnp.asarray([shares.index(share) for share in keep_choices])[drawn]
    return jax.lax.switch(choice, [with_kept(num_keep(count, s)) for s in shares], tokens)


def draw_order(
    key: jax.Array, content: Float[Array, "B N c"], cameras: int, grid: tuple[int, int]
) -> Float[Array, "B N"]:
    """Random scores of tokens: scattered, in patches and by kind, a new mixture each sample.

    A pruner keeps neighbours together and leaves whole areas and kinds of things out. A model that
    only ever missed scattered tokens takes an empty area for something it has not seen. Every kind
    is as likely to be left out as to be kept.

    Args:
        key: Draws all of it.
        content: Area of each class within each token, in [0, 1].
        cameras: Pictures of a sample, whose tokens follow each other.
        grid: Token rows and columns of one picture.
    """
    rows, columns = grid
    batch, _, classes = content.shape
    white_key, coarse_key, plane_key, kind_key, weight_key = jax.random.split(key, 5)
    white = jax.random.normal(white_key, (batch, cameras, rows, columns))
    coarse = jax.random.normal(coarse_key, (batch, cameras, 3, 4))
    patches = jax.image.resize(coarse, white.shape, "cubic")
    slope = jax.random.normal(plane_key, (2, batch, cameras, 1, 1))
    y, x = jnp.linspace(-1.5, 1.5, rows)[:, None], jnp.linspace(-1.5, 1.5, columns)
    taste = jax.random.normal(kind_key, (batch, classes))
    kind = jnp.einsum("bnc,bc->bn", content, taste).reshape(white.shape)
    weight = jax.random.uniform(weight_key, (4, batch, 1, 1, 1))
    order = weight[0] * white + weight[1] * patches
    order = order + weight[2] * (slope[0] * y + slope[1] * x) + 2 * weight[3] * kind
    return order.reshape(batch, -1)
