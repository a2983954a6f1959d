"""pi0 with a method that prunes the prefix: reads a prompt, acts by flow matching, and its loss."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.inference import segments
from fastdrive_jax.inference.segments import Prefilled
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.live import Live
from fastdrive_jax.models.pi0.expert import ActionExpert
from fastdrive_jax.models.pi0.flow import euler, matching_loss
from fastdrive_jax.models.pi0.model import Pi0, action_expert
from fastdrive_jax.pruning.interface import PrunerInputs


class Sampled(flax.struct.PyTreeNode):
    """Actions of a frame.

    Attributes:
        actions: A chunk, normalised as the model's data are [B, H, A].
        attention: What each visual token got from the actions, mean over heads, actions, flow steps
            and the observed layers, 0 for a pruned one [B, N]; None if none was observed.
    """

    actions: Float[Array, "B H A"]
    attention: Float[Array, "B N"] | None


def live_prompt(
    model: Pi0,
    params: dict,
    tokens: Float[Array, "B N D"],
    ids: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    views: Bool[Array, "B V"] | None = None,
) -> tuple[Decoder, dict, Live, Int[Array, " B"], int]:
    """What `segments.prefill` and `reuse.prefill` take first, with room for state and actions.

    Args:
        model: pi0.
        params: Its parameters.
        tokens: Visual tokens, of `Pi0.encode`.
        ids: See `Pi0.prompt`.
        lengths: See `Pi0.prompt`.
        views: See `Pi0.prompt`.
    """
    live = model.apply({"params": params}, tokens, ids, lengths, views, method="prompt")
    decoder, room = Decoder(model.config.prefix, causal=False), action_expert(model.config).room
    return decoder, params["language_model"], live, live.length, room


def pruner_inputs(
    model: Pi0, tokens: Float[Array, "B N D"], views: Bool[Array, "B V"] | None = None
) -> PrunerInputs:
    """What methods may know of the pictures from the model's layout; see `live_prompt`."""
    config, batch = model.config, len(tokens)
    rows, columns = config.token_grid
    return PrunerInputs(
        tokens,
        camera=jnp.broadcast_to(jnp.arange(config.views), (batch, config.views)),
        count=None if views is None else rows * columns * views.sum(axis=1),
        grid=config.token_grid,
    )


def read_prompt(
    model: Pi0,
    params: dict,
    tokens: Float[Array, "B N D"],
    ids: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    views: Bool[Array, "B V"] | None = None,
    **method: Any,
) -> Prefilled:
    """Pictures and prompt through the prefix's decoder; arguments as of `live_prompt`.

    Args:
        model: pi0.
        params: Its parameters.
        tokens: Visual tokens.
        ids: Prompts.
        lengths: Real ids of each.
        views: Which views a sample has.
        method: What prunes, from `pruner` on; see `segments.prefill`. Its `inputs` are those of
            `pruner_inputs` unless given.
    """
    prompt = live_prompt(model, params, tokens, ids, lengths, views)
    return segments.prefill(*prompt, **{"inputs": pruner_inputs(model, tokens, views)} | method)


def sample_actions(
    expert: ActionExpert,
    params: dict,
    prefilled: Prefilled,
    state: Float[Array, "B A"],
    noise: Float[Array, "B H A"],
    steps: int,
    observe: Sequence[int] = (),
    total: int = 0,
) -> Sampled:
    """A chunk of actions, in one scan over the flow steps.

    Args:
        expert: The action expert.
        params: Its parameters.
        prefilled: The prompt, pruned or not, of any decoder without a causal mask that is as deep
            as the expert and has the same heads; its caches have the expert's `room`.
        state: Of the robot, normalised and padded to A.
        noise: Standard normal, float32.
        steps: Flow steps; static.
        observe: Layers whose attention to visual tokens is wanted.
        total: N, visual tokens before all cuts; needed with `observe`.
    """
    prefix = expert.apply({"params": params}, state, prefilled.segments, method="read_state")

    def velocity(x, time):
        moment = jnp.broadcast_to(time, len(x))
        (found, caches), sown = expert.apply(
            {"params": params}, x, moment, prefix, method="velocity", mutable=["intermediates"]
        )
        if not observe:
            return found, None
        sown = sown["intermediates"]["model"]
        rows = []
        for segment in prefix:
            filled = caches[slice(*segment.layers)]
            rows += segments.observed_rows(sown, segment, filled, observe, total)
        return found, sum(rows) / len(observe)

    return Sampled(*euler(velocity, noise.astype(jnp.float32), steps))


def flow_loss(
    model: Pi0, params: dict, batch: dict, key: jax.Array, **method: Any
) -> tuple[Float[Array, ""], dict]:
    """What pi0 learns from, prefix and expert together: `functools.partial(flow_loss, model)`.

    Args:
        model: pi0.
        params: Its parameters.
        batch: images [B, V, H, W, 3], ids [B, L], lengths [B], state [B, A], actions [B, H, A];
            views [B, V], if samples lack some.
        key: Draws noise and flow times.
        method: Prunes while training, see `read_prompt`.
    """
    tokens = model.apply({"params": params}, batch["images"], method="encode")
    views = batch.get("views")
    prefilled = read_prompt(model, params, tokens, batch["ids"], batch["lengths"], views, **method)
    expert = action_expert(model.config, model.dtype)

    def apply(*inputs, method):
        return expert.apply({"params": params["expert"]}, *inputs, method=method)

    prefix = apply(batch["state"], prefilled.segments, method="read_state")

    def velocity(noisy, time):
        return apply(noisy, time, prefix, method="velocity")[0]

    return matching_loss(velocity, batch["actions"], key), {}
