"""From scores to kept tokens: static-shape top-k, and gathers that keep raster order and ids."""

from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from fastdrive_jax.errors import UserError


def num_keep(n: int, keep_ratio: float) -> int:
    """K = floor(N * keep_ratio), as published for FastDriveVLA; at least 1.

    The ratio counts as the decimal number that it is written as, so that 0.29 of 100 tokens are 29
    although the nearest binary number is a little smaller.

    Args:
        n: N, visual tokens.
        keep_ratio: In (0, 1].

    Raises:
        UserError: The ratio is outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise UserError(f"keep_ratio={keep_ratio} must be above 0 and at most 1.")
    if n < 1:
        raise ValueError(f"there must be a token to keep, not {n}")
    return max(1, int(n * Fraction(repr(float(keep_ratio)))))


def round_keep(n: int, keep_ratio: float) -> int:
    """K = round(N * keep_ratio), at least 1, of methods whose released code rounds."""
    num_keep(n, keep_ratio)  # refuses what it refuses
    return max(1, round(n * keep_ratio))


def falling_keep(n: int, keep_ratio: float, cuts: int) -> tuple[int, ...]:
    """K of each cut where all keep the same share of what they find, and the last leaves N r.

    At r = 0.125 three cuts leave N/2, N/4 and N/8.
    """
    # Roots come out a little too small: 0.343 ** (2 / 3) is 0.49 but for its last digits. The last
    # share is the ratio itself, so that K is that of methods with a single cut.
    roots = (round(keep_ratio ** (cut / cuts), 12) for cut in range(1, cuts))
    return tuple(num_keep(n, share) for share in (*roots, keep_ratio))


def top_k(
    scores: Float[Array, "B N"], k: int, valid: Bool[Array, "B N"] | None = None
) -> Int[Array, "B K"]:
    """Indices of the K best tokens of each row, in raster order.

    Ties go to the lower index. Padding is never kept before a real token, whatever that scores.
    What is no number counts as the lowest score, whatever its sign bit.

    Args:
        scores: [B, N], higher is kept.
        k: K, static.
        valid: [B, N], False for padding; None means all are real.

    Returns:
        keep_indices int32 [B, K], ascending.

    Raises:
        ValueError: K is not in 1..N.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be in 1..{scores.shape[-1]}, got {k}")
    scores = scores.astype(jnp.float32)
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    if valid is not None:
        # A real -inf must still beat padding.
        scores = jnp.where(valid, jnp.maximum(scores, lowest), -jnp.inf)
    _, indices = jax.lax.top_k(scores, k)
    return jnp.sort(indices, axis=-1)


def real_first(values: Float[Array, " N"], valid: Bool[Array, " N"]) -> Int[Array, " N"]:
    """Tokens by falling value, of equals the first; NaN comes last, and padding behind it."""
    falling = -values.astype(jnp.float32)
    falling = jnp.where(jnp.isnan(falling), jnp.finfo(jnp.float32).max, falling)
    return jnp.argsort(jnp.where(valid, falling, jnp.inf))


def gather_tokens(
    tokens: Num[Array, "B N D"], keep_indices: Int[Array, "B K"]
) -> Num[Array, "B K D"]:
    """Kept tokens [B, K, D] of tokens [B, N, D]."""
    return jnp.take_along_axis(tokens, keep_indices[..., None], axis=1)


def gather_position_ids(
    position_ids: Int[Array, "3 B N"], keep_indices: Int[Array, "B K"]
) -> Int[Array, "3 B K"]:
    """M-RoPE ids of the kept tokens: each keeps its own (paper, section 3.4)."""
    return jnp.take_along_axis(position_ids, keep_indices[None], axis=2)
