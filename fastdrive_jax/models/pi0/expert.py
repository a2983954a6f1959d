"""pi0's action expert: a smaller decoder that reads the prefix's keys and values layer by layer.

Its tokens are the robot's state and a chunk of noisy actions. The state sees the prefix and itself,
actions see everything. Nothing sees the state change between flow steps, so it is read once, as one
more token behind each layer's prefix; a step then computes the rows of the actions alone.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastdrive_jax.models.decoder import Decoder, LayerCache
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.live import Segment

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the embedded time, which runs from 0 to 1


def time_embedding(time: Float[Array, " B"], size: int) -> Float[Array, "B D"]:
    """Sines, then cosines, of the flow time at `size` / 2 periods in geometric progression."""
    fraction = np.linspace(0, 1, size // 2)
    periods = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fraction
    angles = time[:, None] * jnp.asarray(2 * np.pi / periods, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ActionExpert(nn.Module):
    """State, noisy actions and flow time to a velocity.

    Projections into and out of the decoder compute in float32 whatever its type, as actions are.

    Attributes:
        config: Of its decoder, as deep as the prefix's and with the same heads.
        action_dim: A, of state and actions.
        horizon: H, actions of a chunk.
        dtype: Type that the decoder computes in; give parameters of the same.
    """

    config: DecoderConfig
    action_dim: int
    horizon: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Names follow the published checkpoint's."""
        width = self.config.hidden_size
        self.model = Decoder(self.config, causal=False)
        self.state_proj = nn.Dense(width)
        self.action_in_proj = nn.Dense(width)
        self.action_time_mlp_in = nn.Dense(width)
        self.action_time_mlp_out = nn.Dense(width)
        self.action_out_proj = nn.Dense(self.action_dim)

    @property
    def room(self) -> int:
        """Slots behind the prefix in each layer's cache: the state's and the actions'."""
        return 1 + self.horizon

    def read_state(
        self, state: Float[Array, "B A"], segments: tuple[Segment, ...]
    ) -> tuple[Segment, ...]:
        """The prefix with the state's token behind each sample's last.

        Args:
            state: Of the robot, normalised and padded to A.
            segments: Of the prefix, whose caches have `room`.
        """
        x = self.state_proj(state.astype(jnp.float32)).astype(self.dtype)[:, None]
        read = []
        for segment in segments:
            where = jnp.broadcast_to(segment.next_position[:, None], (3, len(x), 1))
            x, caches = self.model.span(x, where, segment.layers, segment.caches)
            after = segment.next_position + 1
            read.append(segment.replace(caches=caches, next_position=after))
        return tuple(read)

    def velocity(
        self,
        noisy: Float[Array, "B H A"],
        time: Float[Array, " B"],
        segments: tuple[Segment, ...],
    ) -> tuple[Float[Array, "B H A"], tuple[LayerCache, ...]]:
        """Where the actions came from minus where they should go, and each layer's cache with them.

        Args:
            noisy: Actions at that time, float32.
            time: 1 is noise, 0 the actions.
            segments: Of `read_state`.

        Raises:
            ValueError: The actions have another shape.
        """
        if noisy.shape[1:] != (self.horizon, self.action_dim):
            # More actions than there is room for would be written nowhere, and silently.
            raise ValueError(
                f"actions must be [B, {self.horizon}, {self.action_dim}], not {noisy.shape}"
            )
        x = self.embed_actions(noisy, time).astype(self.dtype)
        ahead, filled = jnp.arange(self.horizon), []
        for segment in segments:
            where = segment.next_position[:, None] + ahead
            where = jnp.broadcast_to(where, (3, *where.shape))
            length = segment.caches[0].length
            x, caches = self.model.span(
                x,
                where,
                segment.layers,
                segment.caches,
                places=length[:, None] + ahead,
                lengths=length + self.horizon,
            )
            filled += [cache.replace(length=length + self.horizon) for cache in caches]
        return self.action_out_proj(self.model.norm(x).astype(jnp.float32)), tuple(filled)

    def embed_actions(
        self, noisy: Float[Array, "B H A"], time: Float[Array, " B"]
    ) -> Float[Array, "B H D"]:
        """Tokens of noisy actions, each mixed with the flow time."""
        actions = self.action_in_proj(noisy)
        moment = time_embedding(time, actions.shape[-1])
        moment = jnp.broadcast_to(moment[:, None], actions.shape)
        mixed = self.action_time_mlp_in(jnp.concatenate([actions, moment], axis=-1))
        return self.action_time_mlp_out(jax.nn.silu(mixed))
