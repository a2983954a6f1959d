"""Heads that teach a robot VLA to see, where a published one starts from pretrained weights.

Two linear ones read every visual token: what kinds of things are in it, and where: its own place in
the pictures (which must be in values, not only in attention) and each kind's within it. Two read
the last word of the prompt: one points at the tokens of what that asks for, one tells where the
things that matter are in each picture. All are thrown away after training.
"""

from dataclasses import dataclass

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.openvla.config import OpenVLAConfig


@dataclass(frozen=True)
class HeadConfig:
    """What the heads tell, and the weights of their losses.

    Attributes:
        kinds: c, kinds of things in the pictures of what each pixel shows; what an instruction
            asks for is told from all else, so each object is a kind of its own.
        located: Kinds that the last head finds beside what the instruction asks for.
        kind_weight: Of the head that names kinds.
        place_weight: Of the head that tells places.
        point_weight: Of the head that points.
        point_layer: Decoder layer whose output it reads.
        locate_weight: Of the head that finds things.
        locate_layer: Decoder layer whose output it reads; behind the one that points, since what
            has been found must still be fetched.
    """

    kinds: int = 18
    located: tuple[int, ...] = (1, 2)
    kind_weight: float = 8.0
    place_weight: float = 1.0
    point_weight: float = 1.0
    point_layer: int = 1
    locate_weight: float = 4.0
    locate_layer: int = 3


class Labels(flax.struct.PyTreeNode):
    """What the pictures show.

    Attributes:
        area: Of each kind within each token, in [0, 1].
        centre: Row and column of each kind's pixels within each token, from -1 to 1.
    """

    area: Float[Array, "B N c"]
    centre: Float[Array, "B N c 2"]


def read_labels(segments: Int[Array, "B V H W"], kinds: int, grid: tuple[int, int]) -> Labels:
    """Labels of the visual tokens, of what each pixel shows."""
    batch, views, height, width = segments.shape
    rows, columns = grid
    tall, wide = height // rows, width // columns
    x = segments.reshape(batch, views, rows, tall, columns, wide)
    x = x.transpose(0, 1, 2, 4, 3, 5).reshape(batch, -1, tall * wide)
    down, right = jnp.meshgrid(_from_minus_one(tall), _from_minus_one(wide), indexing="ij")
    moments = jnp.stack([jnp.ones_like(down), down, right], axis=-1).reshape(-1, 3) / (tall * wide)
    # A kind at a time: pictures of all of them would be the most memory of a step.
    found = jax.lax.map(lambda kind: (x == kind).astype(moments.dtype) @ moments, jnp.arange(kinds))
    area, centre = jnp.split(jnp.moveaxis(found, 0, 2), [1], axis=-1)
    return Labels(area[..., 0], centre / jnp.maximum(area, 1e-6))


def token_places(config: OpenVLAConfig) -> Float[Array, "N 3"]:
    """View, row and column of each visual token's centre, each from -1 to 1."""
    axes = (jnp.linspace(-1, 1, config.views), *map(_from_minus_one, config.token_grid))
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def view_centres(labels: Labels, config: OpenVLAConfig) -> Float[Array, "B V c 2"]:
    """Row and column of each kind's pixels in each picture, from -1 to 1; 0 without any."""
    grid = jnp.asarray(config.token_grid)
    centre = token_places(config)[:, None, 1:] + labels.centre / grid
    area = labels.area
    area, centre = (x.reshape(len(x), config.views, -1, *x.shape[2:]) for x in (area, centre))
    total = jnp.maximum(area.sum(axis=2), 1e-6)
    return (area[..., None] * centre).sum(axis=2) / total[..., None]


def init_heads(config: OpenVLAConfig, heads: HeadConfig, key: jax.Array) -> dict:
    """Parameters {"kind", "place", "point", "locate"}.

    Raises:
        UserError: The decoder lacks a layer that a head reads.
    """
    layers = heads.point_layer, heads.locate_layer
    if not 0 <= min(layers) <= max(layers) < config.text.num_layers:
        raise UserError(
            f"point_layer={layers[0]} and locate_layer={layers[1]} must be layers of the decoder, "
            f"0 to {config.text.num_layers - 1}."
        )
    size = config.text.hidden_size
    outputs = {
        "kind": heads.kinds,
        "place": 3 + 2 * heads.kinds,
        "point": size,
        "locate": 2 * config.views * (1 + len(heads.located)),
    }
    keys = jax.random.split(key, len(outputs))
    return {
        name: nn.Dense(features).init(own, jnp.zeros((1, size)))["params"]
        for own, (name, features) in zip(keys, outputs.items(), strict=True)
    }


def token_losses(
    params: dict,
    config: OpenVLAConfig,
    tokens: Float[Array, "B N D"],
    labels: Labels,
) -> dict[str, Float[Array, ""]]:
    """Losses {"kind_loss", "place_loss"} of the heads that read visual tokens."""
    named = _linear(params["kind"], tokens)
    found = _linear(params["place"], tokens)
    inside = found[..., 3:].reshape(labels.centre.shape) - labels.centre
    places = jnp.square(found[..., :3] - token_places(config)).mean()
    centres = _weighted_mean(jnp.square(inside).mean(axis=-1), labels.area)
    return {
        "kind_loss": optax.losses.softmax_cross_entropy(named, labels.area).mean(),
        "place_loss": places + centres,
    }


def prompt_losses(
    params: dict,
    config: OpenVLAConfig,
    heads: HeadConfig,
    hidden: dict[int, Float[Array, "B n D"]],
    place: Int[Array, " B"],
    labels: Labels,
    target: Int[Array, " B"],
    kept: Int[Array, "B K"],
) -> dict[str, Float[Array, ""]]:
    """Losses {"point_loss", "locate_loss"} of the heads that read the prompt's last token.

    Args:
        params: From `init_heads`.
        config: Of the VLA.
        heads: What they tell.
        hidden: Outputs of decoder layers; visual tokens stand from 1 on.
        place: Of the prompt's last token.
        labels: Of all visual tokens.
        target: The kind that each instruction asks for.
        kept: Which of them the decoder was given. Where things are is asked of what is left.
    """

    def last(layer):
        return jnp.take_along_axis(hidden[layer], place[:, None, None], axis=1)[:, 0]

    query = _linear(params["point"], last(heads.point_layer))
    keys = hidden[heads.point_layer][:, 1 : 1 + kept.shape[1]]
    scores = jnp.einsum("bd,bkd->bk", query, keys) * keys.shape[-1] ** -0.5
    others = jnp.broadcast_to(jnp.asarray(heads.located, int), (len(kept), len(heads.located)))
    located = jnp.concatenate([target[:, None], others], axis=1)
    areas = jnp.take_along_axis(labels.area, located[:, None], axis=2)
    area = jnp.take_along_axis(areas[..., 0], kept, axis=1)
    total = area.sum(axis=1, keepdims=True)
    losses = optax.losses.softmax_cross_entropy(scores, area / jnp.maximum(total, 1e-6))
    left = jnp.zeros(labels.area.shape[:2]).at[jnp.arange(len(kept))[:, None], kept].set(1)
    area = areas.reshape(len(kept), config.views, -1, located.shape[1])
    shown = (left.reshape(*area.shape[:3], 1) * area).sum(axis=2)
    share = shown / jnp.maximum(area.sum(axis=2), 1e-6)
    true = jnp.take_along_axis(view_centres(labels, config), located[:, None, :, None], axis=2)
    found = _linear(params["locate"], last(heads.locate_layer)).reshape(true.shape)
    away = jnp.square(found - true).mean(axis=-1)
    return {
        "point_loss": _weighted_mean(losses, total[:, 0] > 0),
        "locate_loss": _weighted_mean(away, share),
    }


def _linear(params: dict, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    return x @ params["kernel"] + params["bias"]


def _weighted_mean(x: Array, weight: Array) -> Float[Array, ""]:
    weight = weight.astype(x.dtype)
    return (x * weight).sum() / jnp.maximum(weight.sum(), 1e-6)


def _from_minus_one(count: int) -> Float[Array, " n"]:
    """Centres of `count` equal parts of [-1, 1]."""
    return (2 * jnp.arange(count) + 1) / count - 1
