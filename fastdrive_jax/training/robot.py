"""What the tiny robot VLA learns from: the expert's action, and beside it what it sees.

A published OpenVLA starts from pretrained encoders and a pretrained language model. The tiny one
starts from nothing, so heads teach what pretraining would have: linear ones what kinds of things
are in each visual token and where it is (its place must be in values, not only in attention), and
one points, from the last word of the prompt, at the tokens of what that asks for. All are thrown
away.
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
        target: The kind that the instruction asks for.
        kind_weight: Of the loss of the head that names kinds.
        place_weight: Of the loss of the head that tells view, row and column.
        point_weight: Of the loss of the head that points.
        point_layer: Decoder layer whose output that head reads.
        blur: Deviation in bins of the target around the true action: neighbouring bins are nearly
            right.
        keep_choices: Each step draws one of these shares of the visual tokens (a share named
            twice, twice as often) and keeps as many at random, see `token_dropping`.
    """

    kinds: int = 5
    target: int = 1
    kind_weight: float = 1.0
    place_weight: float = 1.0
    point_weight: float = 1.0
    point_layer: int = 2
    blur: float = 4.0
    keep_choices: tuple[float, ...] = (1.0, 1.0, 1.0, 0.5, 0.25, 0.125)


def init_robot(model: OpenVLA, loss: RobotLossConfig, key: jax.Array) -> dict:
    """Parameters {"vla", "kind_head", "place_head", "point_head"}."""
    vla_key, kind_key, place_key, point_key = jax.random.split(key, 4)
    tokens = jnp.zeros((1, 1, model.config.text.hidden_size))
    return {
        "vla": model.init(vla_key, **example_inputs(model.config))["params"],
        "kind_head": nn.Dense(loss.kinds).init(kind_key, tokens)["params"],
        "place_head": nn.Dense(3).init(place_key, tokens)["params"],
        "point_head": nn.Dense(tokens.shape[-1]).init(point_key, tokens)["params"],
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


def token_places(config: OpenVLAConfig) -> Float[Array, "N 3"]:
    """View, row and column of each visual token, each from -1 to 1."""
    sizes = config.views, *config.token_grid
    place = jnp.indices(sizes).reshape(3, -1).T
    return 2 * place / jnp.maximum(jnp.asarray(sizes) - 1, 1) - 1


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


def point_loss(
    params: dict,
    hidden: Float[Array, "B n D"],
    place: Int[Array, " B"],
    area: Float[Array, "B K"],
) -> Float[Array, ""]:
    """Cross-entropy of where the token at a place points, of samples that show the target.

    Args:
        params: Of the head that points.
        hidden: Hidden states; visual tokens stand from 1 on.
        place: Of the prompt's last token.
        area: Of the target within each visual token.
    """
    last = jnp.take_along_axis(hidden, place[:, None, None], axis=1)
    query = nn.Dense(hidden.shape[-1]).apply({"params": params}, last)
    scores = jnp.einsum("bod,bkd->bk", query, hidden[:, 1 : 1 + area.shape[1]])
    total = area.sum(axis=1, keepdims=True)
    share = area / jnp.maximum(total, 1e-6)
    scores = scores * hidden.shape[-1] ** -0.5
    losses = optax.losses.softmax_cross_entropy(scores, share)
    seen = (total[:, 0] > 0).astype(losses.dtype)
    return (losses * seen).sum() / jnp.maximum(seen.sum(), 1)


def robot_loss(
    model: OpenVLA,
    loss: RobotLossConfig,
    bounds: Bounds,
    params: dict,
    batch: dict,
    key: jax.Array,
) -> tuple[Float[Array, ""], dict]:
    """Cross-entropy of the action's tokens, plus the losses of the two heads.

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
        options = {"kept": kept, "method": "action_logits", "mutable": ["intermediates"]}
        logits, sown = model.apply(variables, *given, **options)
        hidden = sown["intermediates"]["language_model"][f"hidden_{loss.point_layer}"][0]
        place = batch["lengths"] + kept.shape[1] - 1
        area = jnp.take_along_axis(content[..., loss.target], kept, axis=1)
        pointed = point_loss(params["point_head"], hidden, place, area)
        return optax.losses.softmax_cross_entropy(logits, targets).mean(), pointed

    action_loss, pointed = on_some_tokens(on_kept, tokens, order, loss.keep_choices, choice_key)
    seen = nn.Dense(loss.kinds).apply({"params": params["kind_head"]}, tokens)
    kind_loss = optax.losses.softmax_cross_entropy(seen, content).mean()
    found = nn.Dense(3).apply({"params": params["place_head"]}, tokens)
    place_loss = jnp.square(found - token_places(config)).mean()
    total = action_loss + loss.kind_weight * kind_loss + loss.point_weight * pointed
    metrics = {"action_loss": action_loss, "kind_loss": kind_loss, "point_loss": pointed}
    return total + loss.place_weight * place_loss, metrics | {"place_loss": place_loss}
