"""Behaviour cloning of the tiny robot VLA: cross-entropy of the expert's action as tokens.

Beside it the heads of `robot_heads` teach what pretraining would have.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fastdrive_jax.models.openvla.actions import Bounds, bin_centres, encode_actions, normalise
from fastdrive_jax.models.openvla.config import OpenVLAConfig
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.policy_file import example_inputs
from fastdrive_jax.training.robot_heads import (
    HeadConfig,
    init_heads,
    prompt_losses,
    read_labels,
    token_losses,
)
from fastdrive_jax.training.token_dropping import draw_order, on_some_tokens


@dataclass(frozen=True)
class RobotLossConfig:
    """The parts of the loss.

    Attributes:
        heads: What teaches to see.
        blur: Deviation in bins of the target around the true action: neighbouring bins are nearly
            right.
        keep_choices: Each step draws one of these shares of the visual tokens (a share named
            twice, twice as often) and keeps as many at random, see `token_dropping`.
    """

    heads: HeadConfig = field(default_factory=HeadConfig)
    blur: float = 4.0
    keep_choices: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 0.5, 0.25, 0.125)


def init_robot(model: OpenVLA, loss: RobotLossConfig, key: jax.Array) -> dict:
    """Parameters {"vla", "heads"}."""
    vla_key, head_key = jax.random.split(key)
    return {
        "vla": model.init(vla_key, **example_inputs(model.config))["params"],
        "heads": init_heads(model.config, loss.heads, head_key),
    }


def action_targets(
    config: OpenVLAConfig, actions: Float[Array, "B M"], blur: float
) -> Float[Array, "B M V"]:
    """Target distributions over token ids: normalised Gaussians around the true actions.

    Ids that no action has get nothing, and so does the first bin's twin above it (see `actions`).
    """
    centres = jnp.asarray(bin_centres(config.bins))
    width = blur * 2 / (config.bins - 1)
    away = (centres - actions[..., None]) / max(width, 1e-6)
    share = jax.nn.softmax(-0.5 * away**2, axis=-1)
    # Bin 0 is the last id but one of those in use.
    ids = config.action_vocab_size - 1 - jnp.arange(config.bins - 1)
    empty = jnp.zeros((*actions.shape, config.text.vocab_size))
    return empty.at[..., ids].set(share)


def fed_ids(config: OpenVLAConfig, actions: Float[Array, "B M"]) -> Int[Array, "B M"]:
    """Token ids of actions as decoding feeds them back.

    An end of exactly 1 has an id of its own in the published encoder, which no target names, so a
    policy that was taught with it would be told something else when it decodes.
    """
    return jnp.maximum(encode_actions(actions, config), config.action_vocab_size - config.bins + 1)


def robot_loss(
    model: OpenVLA,
    loss: RobotLossConfig,
    bounds: Bounds,
    params: dict,
    batch: dict,
    key: jax.Array,
) -> tuple[Float[Array, ""], dict]:
    """Cross-entropy of the action's tokens, plus the losses of the heads.

    Args:
        model: The VLA, which decodes tokens.
        loss: Its parts.
        bounds: What scales actions.
        params: From `init_robot`.
        batch: image [B, V, H, W, 3], segments [B, V, H, W], ids [B, L], lengths [B], target [B],
            the segment that the prompt asks for, and action [B, T, A] of the robot's units.
        key: Draws the kept tokens.
    """
    config, heads = model.config, loss.heads
    choice_key, order_key = jax.random.split(key)
    variables = {"params": params["vla"]}
    tokens = model.apply(variables, batch["image"], method="encode")
    labels = read_labels(batch["segments"], heads.kinds, config.token_grid)
    order = draw_order(order_key, labels.area, config.views, config.token_grid)
    actions = normalise(batch["action"], bounds).reshape(len(tokens), -1)
    targets = action_targets(config, actions, loss.blur)

    def on_kept(tokens, kept):
        given = tokens, batch["ids"], batch["lengths"], fed_ids(config, actions)
        options = {"kept": kept, "method": "action_logits", "mutable": ["intermediates"]}
        logits, sown = model.apply(variables, *given, **options)
        layers = sown["intermediates"]["language_model"]
        hidden = {k: layers[f"hidden_{k}"][0] for k in (heads.point_layer, heads.locate_layer)}
        place = batch["lengths"] + kept.shape[1] - 1
        given = params["heads"], config, heads, hidden, place, labels, batch["target"], kept
        action_loss = optax.losses.softmax_cross_entropy(logits, targets).mean()
        return {"action_loss": action_loss} | prompt_losses(*given)

    parts = on_some_tokens(on_kept, tokens, order, loss.keep_choices, choice_key)
    parts |= token_losses(params["heads"], config, tokens, labels)
    weights = {
        "action_loss": 1.0,
        "kind_loss": heads.kind_weight,
        "place_loss": heads.place_weight,
        "point_loss": heads.point_weight,
        "locate_loss": heads.locate_weight,
    }
    return sum(weights[name] * part for name, part in parts.items()), parts
