"""VisPruner (arXiv 2412.01818): the most attended tokens, and of the others the most diverse.

Of K tokens, `K_imp = int(K ratio)` are those that get most attention in the vision encoder. The
others, by falling attention, are thinned out to `K_div = K - K_imp` in rounds. With R left,
`p = min(8, R - K_div)` leave: every token at an even place is scored by its largest cosine to one
at an odd place, and the p most similar go; `halves.py` has the order of the next round. Published
defaults: a ratio of 0.5 (also 0.75), p at most 8.

Published for CLIP: attention is that of the class token, and cosines are of the encoder's features
ahead of the projector. Qwen's encoder has no class token. Its authors advise what each token gets
from all others, merged as its patches are: `PrunerInputs.vision_received`. Cosines here are of
`PrunerInputs.tokens`. The released code renumbers positions, which `as_published` takes over, and
fails where R is odd; here a token without a partner counts as an even one.

3,249 tokens to 812 take 305 rounds. Each would multiply one half of the tokens by the other, some
1e12 multiplications in all; instead the cosines of all pairs are made once, and a round is a masked
maximum over them. With M = N - K_imp: O(M^2 D) once, O(M^2) a round, M x M numbers held, 32 MB for
that example. A larger `per_round` has as many fewer rounds, and is no longer the published choice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.halves import NO_MATCH, next_order
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, real_tokens
from fastdrive_jax.pruning.max_min import pairwise_cosines, unit_tokens
from fastdrive_jax.pruning.select import real_first


def num_rounds(live: int, k: int, per_round: int) -> int:
    """Rounds that thin `live` tokens out to k."""
    rounds = 0
    while live > k:
        live -= min(live - k, per_round, (live + 1) // 2)
        rounds += 1
    return rounds


def vis_pruner(
    important_ratio: float = 0.5, per_round: int = 8, as_published: bool = False
) -> Pruner:
    """VisPruner as a method.

    Args:
        important_ratio: Share of the K tokens that are chosen by attention, in 0..1.
        per_round: Most tokens that leave in a round.
        as_published: Positions are given out anew.

    Raises:
        ValueError: The ratio is outside 0..1, or no token leaves in a round.
    """
    if not 0 <= important_ratio <= 1:
        raise ValueError(f"important_ratio={important_ratio} must be in 0..1")
    if per_round < 1:
        raise ValueError(f"per_round={per_round} must be at least 1")

    def choose(params, inputs: PrunerInputs, key, k: int) -> Int[Array, "B K"]:
        run = partial(_choose, k=k, important=int(k * important_ratio), per_round=per_round)
        return jax.vmap(run)(inputs.tokens, inputs.vision_received, real_tokens(inputs))

    needs = frozenset({"tokens", "vision_received"})
    return Pruner(name="vispruner", choose=choose, needs=needs, renumber=as_published)


def _choose(
    tokens: Float[Array, "N D"],
    received: Float[Array, " N"],
    valid: Bool[Array, " N"],
    k: int,
    important: int,
    per_round: int,
) -> Int[Array, " K"]:
    falling = real_first(received, valid)
    rest = falling[important:]
    cosines = pairwise_cosines(unit_tokens(tokens, valid)[rest])
    live = jnp.maximum(jnp.sum(valid) - important, 0)
    different = _thin_out(cosines, live, k - important, per_round)
    return jnp.concatenate([falling[:important], rest[different]])


def _thin_out(
    cosines: Float[Array, "M M"], live: Int[Array, ""], k: int, per_round: int
) -> Int[Array, " k"]:
    """The k of the first `live` tokens that the rounds leave, and padding where these are fewer."""
    length = len(cosines)
    place = jnp.arange(length)

    def thin(_, carry):
        order, live = carry
        leave = jnp.clip(live - k, 0, jnp.minimum(per_round, (live + 1) // 2))
        odd = jnp.zeros(length, bool).at[order].set((place % 2 == 1) & (place < live))
        best = jnp.max(cosines, axis=1, initial=NO_MATCH, where=odd)
        turn, _ = next_order(best[order[::2]], length, live, leave)
        return order[turn], live - leave

    # A sample with padding is done earlier; no token leaves it in the rounds that are left.
    rounds = num_rounds(length, k, per_round)
    return jax.lax.fori_loop(0, rounds, thin, (place, live))[0][:k]
