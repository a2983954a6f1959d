"""What the tiny robot VLA learns from: the expert's action, and beside it what it sees.

A published OpenVLA starts from pretrained encoders and a pretrained language model. The tiny one
starts from nothing, so a linear head teaches what pretraining would have: what kinds of things are
in each visual token. It is thrown away.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fastdrive_jax.models.openvla.actions import Bounds, bin_centres, encode_actions, normalise
from fastdrive_jax.models.openvla.config import OpenVLAConfig
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.policy_file import example_inputs
from fastdrive_jax.training.token_dropping import draw_order, on_some_tokens


@dataclass(frozen=True)
class RobotLossConfig:
    """Weights of the parts.

    Attributes:
        kinds: Kinds of things in the pictures of what each pixel shows.
        kind_weight: Of the head's loss that names them.
        blur: Deviation in bins of the target around the true action: neighbouring bins are nearly
            right.
        keep_choices: Each step draws one of these shares of the visual tokens (a share named
            twice, twice as often) and keeps as many at random, see `token_dropping`.
    """

    kinds: int = 5
    kind_weight: float = 1.0
    blur: float = 2.0
    keep_choices: tuple[float, ...] = (1.0, 1.0, 0.5, 0.25, 0.125)


def init_robot(model: OpenVLA, loss: RobotLossConfig, key: jax.Array) -> dict:
    """Parameters {"vla", "kind_head"}."""
    vla_key, kind_key = jax.random.split(key)
    tokens = jnp.zeros((1, 1, model.config.text.hidden_size))
    return {
        "vla": model.init(vla_key, **example_inputs(model.config))["params"],
        "kind_head": nn.Dense(loss.kinds).init(kind_key, tokens)["params"],
    }


def kind_fractions(
    segments: Int[Array, "B V H W"], kinds: int, grid: tuple[int, int]
) -> Float[Array, "B N c"]:
    """Area of each kind within each token."""
    batch, views, height, width = segments.shape
    rows, columns = grid
    x = jax.nn.one_hot(segments, kinds)
    x = x.reshape(batch, views, rows, height // rows, columns, width // columns, kinds)
    return x.mean(axis=(3, 5)).reshape(batch, -1, kinds)


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


def robot_loss(
    model: OpenVLA,
    loss: RobotLossConfig,
    bounds: Bounds,
    params: dict,
    batch: dict,
    key: jax.Array,
) -> tuple[Float[Array, ""], dict]:
    """Cross-entropy of the action's tokens, plus that of the kinds in each visual token.

    Args:
        model: The VLA, which decodes tokens.
        loss: Weights.
        bounds: What scales actions.
        params: From `init_robot`.
        batch: image [B, V, H, W, 3], segments [B, V, H, W], ids [B, L], lengths [B] and action
            [B, T, A] of the robot's units.
        key: Draws the kept tokens.
    """
    config = model.config
    choice_key, order_key = jax.random.split(key)
    variables = {"params": params["vla"]}
    tokens = model.apply(variables, batch["image"], method="encode")
    content = kind_fractions(batch["segments"], loss.kinds, config.token_grid)
    order = draw_order(order_key, content, config.views, config.token_grid)
    actions = normalise(batch["action"], bounds).reshape(len(tokens), -1)
    targets = action_targets(config, actions, loss.blur)

    def on_kept(tokens, kept):
        given = tokens, batch["ids"], batch["lengths"], encode_actions(actions, config)
        return model.apply(variables, *given, kept=kept, method="action_logits")

    logits = on_some_tokens(on_kept, tokens, order, loss.keep_choices, choice_key)
    action_loss = optax.losses.softmax_cross_entropy(logits, targets).mean()
    seen = nn.Dense(loss.kinds).apply({"params": params["kind_head"]}, tokens)
    kind_loss = optax.losses.softmax_cross_entropy(seen, content).mean()
    metrics = {"action_loss": action_loss, "kind_loss": kind_loss}
    return action_loss + loss.kind_weight * kind_loss, metrics
