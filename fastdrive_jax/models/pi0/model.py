"""pi0 as a whole: pictures, prompt, state and noisy actions in, a velocity out.

Sequence: the visual tokens of all views, then the prompt; all of these see each other. The state
and the actions stand behind the last real token, see `expert`.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.live import Live, Segment
from fastdrive_jax.models.pi0.config import Pi0Config
from fastdrive_jax.models.pi0.expert import ActionExpert
from fastdrive_jax.models.vit import ViT, normalise_pictures


class Pi0(nn.Module):
    """Vision encoder, projector, decoder of the prefix and action expert.

    Attributes:
        config: Sizes.
        dtype: Type that it computes in; give parameters of the same.
    """

    config: Pi0Config
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Names follow the published checkpoint's."""
        config = self.config
        self.vision_tower = ViT(config.vision)
        self.multi_modal_projector = nn.Dense(config.prefix.hidden_size)
        self.language_model = Decoder(config.prefix, causal=False)
        self.expert = action_expert(config, self.dtype)

    def encode(self, images: UInt8[Array, "B V H W 3"]) -> Float[Array, "B N D"]:
        """Visual tokens of RGB pictures, view after view, each in raster order.

        Raises:
            UserError: Their number or size is not the model's.
        """
        config, (batch, *pictures) = self.config, images.shape
        if pictures != [config.views, config.image_size, config.image_size, 3]:
            raise UserError(
                f"A sample must be {config.views} RGB pictures of {config.image_size} x "
                f"{config.image_size} pixels, not {' x '.join(map(str, pictures))}."
            )
        images = images.reshape(-1, *pictures[1:])
        pixels = normalise_pictures(images, config.vision).astype(self.dtype)
        tokens = self.multi_modal_projector(self.vision_tower(pixels))
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embeddings of a prompt, scaled as Gemma's are; visual tokens are not."""
        embeddings = self.language_model.embed(ids)
        scale = math.sqrt(self.config.prefix.hidden_size)
        return embeddings * jnp.asarray(scale, embeddings.dtype)

    def prompt(
        self,
        tokens: Float[Array, "B N D"],
        ids: Int[Array, "B L"],
        lengths: Int[Array, " B"],
        views: Bool[Array, "B V"] | None = None,
    ) -> Live:
        """Pictures and prompt before the first layer.

        What a sample lacks stands behind its last real token. So its visual tokens are numbered
        from those of the first view that it has, and whatever is said of each of them, to a pruner
        or by attention, is in that order too.

        Args:
            tokens: Of `encode`.
            ids: Prompts, padded on the right.
            lengths: Real ids of each.
            views: Which views a sample has; None means all.
        """
        (batch, total), length = tokens.shape[:2], ids.shape[1]
        count = jnp.full(batch, total)
        if views is not None:
            tokens = _present_first(tokens, views)
            count = total // views.shape[1] * views.sum(axis=1)
        real = jnp.concatenate(
            [jnp.arange(total) < count[:, None], jnp.arange(length) < lengths[:, None]], axis=1
        )
        order = jnp.argsort(~real, axis=1, stable=True)
        places = jnp.argsort(order, axis=1)  # where each of them stands now
        hidden = jnp.concatenate([tokens, self.embed(ids).astype(tokens.dtype)], axis=1)
        return Live(
            hidden=jnp.take_along_axis(hidden, order[..., None], axis=1),
            position_ids=jnp.broadcast_to(jnp.arange(total + length), (3, *real.shape)),
            visual=places[:, :total],
            ids=jnp.broadcast_to(jnp.arange(total), (batch, total)),
            text=places[:, total:],
            count=count,
            length=count + lengths,
            prompt=count + lengths,
        )

    def __call__(
        self,
        images: UInt8[Array, "B V H W 3"],
        ids: Int[Array, "B L"],
        lengths: Int[Array, " B"],
        state: Float[Array, "B A"],
        noisy: Float[Array, "B H A"],
        time: Float[Array, " B"],
    ) -> Float[Array, "B H A"]:
        """The velocity of noisy actions with all tokens kept; touches every parameter."""
        live = self.prompt(self.encode(images), ids, lengths)
        layers = 0, self.config.prefix.num_layers
        x, caches = self.language_model.span(
            live.hidden, live.position_ids, layers, room=self.expert.room, lengths=live.length
        )
        self.language_model.norm(x)  # leads nowhere in pi0, but its files have it
        caches = tuple(cache.replace(length=live.length) for cache in caches)
        prefix = Segment(caches, live.visual, live.ids, live.count, live.length, layers)
        return self.expert.velocity(noisy, time, self.expert.read_state(state, (prefix,)))[0]


def action_expert(config: Pi0Config, dtype: jnp.dtype = jnp.float32) -> ActionExpert:
    """The part of `Pi0` whose parameters are under "expert"."""
    return ActionExpert(config.expert, config.action_dim, config.horizon, dtype)


def _present_first(tokens, views):
    """Tokens with those of the views that a sample has in front, in their order."""
    batch, total, size = tokens.shape
    order = jnp.argsort(~views, axis=1, stable=True)
    by_view = tokens.reshape(batch, views.shape[1], -1, size)
    found = jnp.take_along_axis(by_view, order[..., None, None], axis=1)
    return found.reshape(batch, total, size)
