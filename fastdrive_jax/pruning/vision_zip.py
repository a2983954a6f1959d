"""VisionZip (arXiv 2412.04467): dominant tokens as they are, and the others merged into a few.

Of K tokens, `C = int(10 K / 64)` are contextual and K - C dominant. Dominant ones get most
attention in the vision encoder. Of the rest, in raster order, every s-th of n is a target,
`s = max(1, n // C)`, C of them from the first; each other token joins the target that its key has
the largest cosine to. A contextual token stands at its target's place.

Published for CLIP, whose dominant tokens are by the class token's attention, and 54 dominant (the
class token one of them) and 10 contextual tokens of 64; also 191 and 30. Qwen's encoder has no
class token: attention is what each token gets from all others, keys are those of the same block,
mean over heads (`PrunerInputs.vision_received`, `vision_keys`). The release merges ahead of the
projector; here tokens are merged as they enter the language model.

The released code makes a contextual token of target + mean of those that joined it, twice as long
as any token that the language model knows. The default here is the mean of them all, target
included, which keeps its scale and counts each token once. `as_published` takes over the sum, and
gives positions out anew. The release puts contextual tokens behind dominant ones; an interface that
leaves tokens in raster order does not.

Cosines are of the rest to C targets; no array of pairs is held.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, real_tokens
from fastdrive_jax.pruning.max_min import unit_tokens
from fastdrive_jax.pruning.select import real_first

_EXACT = jax.lax.Precision.HIGHEST  # at the default, GPUs round products to TF32


def vision_zip(contextual_ratio: float = 10 / 64, as_published: bool = False) -> Pruner:
    """VisionZip as a method.

    Args:
        contextual_ratio: Share of the K tokens that others are merged into, in 0..1.
        as_published: Target and mean are added, and positions given out anew.

    Raises:
        ValueError: The ratio is outside 0..1.
    """
    if not 0 <= contextual_ratio <= 1:
        raise ValueError(f"contextual_ratio={contextual_ratio} must be in 0..1")

    def merge(params, inputs: PrunerInputs, key, k: int) -> tuple[Array, Array]:
        run = partial(_merge, k=k, contextual=int(k * contextual_ratio), add=as_published)
        valid = real_tokens(inputs)
        return jax.vmap(run)(inputs.tokens, inputs.vision_received, inputs.vision_keys, valid)

    needs = frozenset({"tokens", "vision_received", "vision_keys"})
    return Pruner(name="visionzip", merge=merge, needs=needs, renumber=as_published)


def _merge(
    tokens: Float[Array, "N D"],
    received: Float[Array, " N"],
    keys: Float[Array, "N d"],
    valid: Bool[Array, " N"],
    k: int,
    contextual: int,
    add: bool,
) -> tuple[Int[Array, " K"], Float[Array, "K D"]]:
    falling = real_first(received, valid)
    dominant, rest = falling[: k - contextual], jnp.sort(falling[k - contextual :])
    if not contextual:
        return dominant, tokens[dominant]
    real = valid[rest]  # the first of them, since padding comes last
    step = jnp.maximum(1, jnp.sum(real) // contextual)
    places = step * jnp.arange(contextual)
    units = unit_tokens(keys[rest], real)
    joined = jnp.argmax(jnp.dot(units, units[places].T, precision=_EXACT), axis=-1)
    joins = real.at[places].set(False)[:, None] & (joined[:, None] == jnp.arange(contextual))
    values = jnp.where(real[:, None], tokens[rest].astype(jnp.float32), 0)
    total = jnp.dot(joins.T.astype(jnp.float32), values, precision=_EXACT)
    count = jnp.sum(joins, axis=0)[:, None]
    target = values[places]
    merged = target + total / jnp.maximum(count, 1) if add else (target + total) / (1 + count)
    indices = jnp.concatenate([dominant, rest[places]])
    return indices, jnp.concatenate([tokens[dominant].astype(jnp.float32), merged])
