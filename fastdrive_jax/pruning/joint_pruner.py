"""JointPruner, of this library: foreground, what actions looked at, and no two tokens alike.

FastDriveVLA asks what of a picture is foreground, VLA-Pruner what the last actions looked at, the
diversity methods what a token adds to the others. Here one relevance joins the first two and weighs
the third, and all cameras compete for one budget. It stands before the language model, so that no
layer sees more than K tokens.

    f = rank in 0..1 of ReconPruner's score, of all tokens of the sample
    a = rank in 0..1 of the action attention of the frame in which a token was kept last, of all
        tokens that ever were
    r = f + w c (a - f),   c = g^(frames since it was last kept), 0 for one that never was

A token that was kept and not looked at falls behind, one that was not kept is judged by its looks;
with time what actions looked at is forgotten. Of the `candidates` K most relevant tokens the most
relevant is chosen first, then K - 1 times the one that is far from all chosen ones and relevant:

    argmax_j r_j^b min_{i chosen} (1 - cos(v_i, v_j))

The defaults were chosen on training scenes of the synthetic world (docs/compare_pruners.md).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.pruning.budgets import pictures_of, split_pictures
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, Seen, Temporal, real_tokens
from fastdrive_jax.pruning.max_min import farthest_first, pairwise_distances, unit_tokens
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig, recon_pruner
from fastdrive_jax.pruning.select import gather_tokens, top_k
from fastdrive_jax.pruning.vla_pruner import latter_half

State = dict[str, Array]


def joint_pruner(
    config: ReconPrunerConfig,
    action_weight: float = 0.8,
    forget: float = 0.8,
    sharpness: float = 0.25,
    candidates: float = 3.0,
) -> Pruner:
    """JointPruner as a method; its params are those of a trained ReconPruner.

    Args:
        config: Of that ReconPruner.
        action_weight: w, in 0..1; 0 looks at the picture alone.
        forget: g, in 0..1, a frame.
        sharpness: b, at least 0; at 0 relevance only picks the candidates.
        candidates: Of K, at least 1.

    Raises:
        ValueError: A setting is out of its range.
    """
    if not (0 <= action_weight <= 1 and 0 <= forget <= 1 and sharpness >= 0 and candidates >= 1):
        raise ValueError(
            f"action_weight={action_weight} and forget={forget} must be in 0..1, "
            f"sharpness={sharpness} at least 0, candidates={candidates} at least 1"
        )
    scorer = recon_pruner(config)

    def choose(params, inputs: PrunerInputs, key, k: int) -> Int[Array, "B K"]:
        valid = real_tokens(inputs)
        pictures = inputs.replace(state=None)
        if pictures_of(inputs) > 1:
            pictures = split_pictures(pictures.replace(count=None))
        scores = scorer.score(params, pictures, key).reshape(valid.shape)
        relevance = share_below(scores, valid)
        acted, trust = inputs.state["action"], inputs.state["trust"]
        if inputs.ids is not None:  # the state is of all tokens, the inputs may be of some
            acted, trust = (jnp.take_along_axis(x, inputs.ids, axis=1) for x in (acted, trust))
        action = share_below(acted, valid & (trust > 0))
        relevance += action_weight * trust * (action - relevance)
        some = min(round(candidates * k), valid.shape[1])
        best = top_k(relevance, some, valid)
        run = partial(_differing, sharpness=sharpness, k=k)
        return jax.vmap(run)(inputs.tokens, relevance, best, valid)

    def init(inputs: PrunerInputs) -> State:
        zeros = jnp.zeros(inputs.tokens.shape[:2])
        return {"action": zeros, "trust": zeros}

    def observe(state: State, seen: Seen) -> State:
        return {
            "action": jnp.where(seen.kept, seen.action, state["action"]),
            "trust": jnp.where(seen.kept, 1, forget * state["trust"]),
        }

    return Pruner(
        name="jointpruner",
        choose=choose,
        needs=scorer.needs | {"grid", "state"},
        temporal=Temporal(init, observe, latter_half),
    )


def share_below(values: Float[Array, "B N"], among: Bool[Array, "B N"]) -> Float[Array, "B N"]:
    """Rank of each value from 0, the lowest of those in question, to 1; 0 for all others.

    Of equal values the lower index ranks higher.
    """
    values = jnp.where(among, values.astype(jnp.float32), -jnp.inf)
    order = jnp.argsort(-values, axis=1)  # stable: highest first, then the lower index
    place = jnp.argsort(order, axis=1)
    count = jnp.sum(among, axis=1, keepdims=True)
    share = (count - 1 - place) / jnp.maximum(count - 1, 1)
    return jnp.where(among, share, 0)


def _differing(
    tokens: Float[Array, "N D"],
    relevance: Float[Array, " N"],
    best: Int[Array, " M"],
    valid: Bool[Array, " N"],
    sharpness: float,
    k: int,
) -> Int[Array, " K"]:
    real, own = valid[best], jnp.where(valid[best], relevance[best], -1)
    distances = pairwise_distances(unit_tokens(gather_tokens(tokens[None], best[None])[0], real))
    # Rounding may bring equal tokens below 0, where a weight would turn their order round.
    weighted = jnp.maximum(distances, 0) * jnp.maximum(own, 0) ** sharpness
    return best[farthest_first(weighted, jnp.argmax(own), k, real)]
