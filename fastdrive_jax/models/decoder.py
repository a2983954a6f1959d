"""The decoder of Qwen2.5-VL, Llama and Gemma: rotary positions, a gated MLP, a KV cache.

One layer serves them all: language models (causal or, where actions are decoded at once, not),
ReconPruner's PrunerLayer and the reconstruction decoder.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastdrive_jax.models.attention import attention
from fastdrive_jax.models.attention_rows import attend_rows
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.layers import RMSNorm, SwiGLU, rotate
from fastdrive_jax.parallel.rules import constrain

Angles = tuple[Float[Array, "B N d"], Float[Array, "B N d"]]


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer.

    Attributes:
        key: [B, S, G, d], S the layer's own static length.
        value: [B, S, G, d].
        length: How many of the S are filled, int32 [B]. What lies behind is never read, so a
            sample of a padded batch is cut to its own length by setting this.
    """

    key: Float[Array, "B S G d"]
    value: Float[Array, "B S G d"]
    length: Int[Array, " B"]

    def append(self, key: Float[Array, "B 1 G d"], value: Float[Array, "B 1 G d"]) -> "LayerCache":
        """The cache with one more token of each sample, written behind its last."""
        return LayerCache(
            key=_write(self.key, key, self.length),
            value=_write(self.value, value, self.length),
            length=self.length + 1,
        )

    def put(
        self,
        key: Float[Array, "B N G d"],
        value: Float[Array, "B N G d"],
        places: Int[Array, "B N"],
    ) -> "LayerCache":
        """The cache with some tokens written at their places, which lie before its end."""
        rows = jnp.arange(len(places))[:, None]
        return self.replace(
            key=self.key.at[rows, places].set(key.astype(self.key.dtype)),
            value=self.value.at[rows, places].set(value.astype(self.value.dtype)),
        )


def _write(slots, new, length):
    new = new.astype(slots.dtype)
    if len(length) == 1:  # the usual frame needs no scatter
        return jax.lax.dynamic_update_slice(slots, new, (0, length[0], 0, 0))
    return slots.at[jnp.arange(len(length)), length].set(new[:, 0])


def mrope_angles(config: DecoderConfig, position_ids: Int[Array, "3 B N"]) -> Angles:
    """Cosine and sine [B, N, d] of the multimodal rotary embedding (Qwen2-VL, section 2.1).

    Args:
        config: Gives d, theta and the sections.
        position_ids: Temporal, row and column position of each token; equal for text.
    """
    half = config.head_dim // 2
    inverse = config.rope_theta ** (-np.arange(half, dtype=np.float32) / half)
    axis = np.repeat(np.arange(3), config.mrope_section)  # which position turns channel pair i
    angles = jnp.moveaxis(position_ids, 0, -1)[..., axis].astype(jnp.float32) * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rows_see(
    causal: bool, places: Int[Array, "B R"], lengths: Int[Array, " B"]
) -> Int[Array, "B R"]:
    """How many tokens, from the first, those at some places see."""
    return places + 1 if causal else jnp.broadcast_to(lengths[:, None], places.shape)


class Attention(nn.Module):
    """Grouped-query attention.

    Attributes:
        config: Sizes.
        causal: Whether a token sees only those before it and itself.
    """

    config: DecoderConfig
    causal: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        angles: Angles | None,
        cache: LayerCache | None = None,
        room: int = 0,
        places: Int[Array, "B N"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B N D"], LayerCache | None]:
        """Attends over x [B, N, D] or, with a cache, over what it holds and the new tokens.

        Args:
            x: Normalised hidden states; N = 1 with a cache, unless places are given.
            angles: From `mrope_angles`; None leaves positions out.
            cache: Decodes: gets the new token behind each sample's last.
            room: Prefills, if above 0: the cache made of x has that many free slots.
            places: Where the tokens stand in the cache, whose length stays: each replaces what is
                there and sees all up to itself or, without a causal mask, all.
            lengths: Real tokens of each sample, which only a model that is not causal must be told.

        Returns:
            The output [B, N, D] and the filled cache, None if neither was asked for.
        """
        config = self.config
        batch, count, _ = x.shape

        def heads(name, number):
            bias = config.attention_bias
            y = nn.Dense(number * config.head_dim, use_bias=bias, name=name)(x)
            return y.reshape(batch, count, number, config.head_dim)

        query = heads("q_proj", config.num_heads)
        key = heads("k_proj", config.num_kv_heads)
        value = heads("v_proj", config.num_kv_heads)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        # What pruners score tokens by; kept only if a caller asks for it.
        self.sow("intermediates", "query", query)
        self.sow("intermediates", "key", key)
        if places is not None:
            cache = cache.put(key, value, places)
            seen = rows_see(self.causal, places, lengths)
            out = attend_rows(query, cache.key, cache.value, seen)
        elif cache is not None:
            if count != 1:
                raise ValueError(f"a cache takes one token at a time, not {count}")
            cache = cache.append(key, value)
            out = attention(query, cache.key, cache.value, lengths=cache.length)
        else:
            seen = None if self.causal else lengths
            out = attention(query, key, value, causal=self.causal, lengths=seen)
            if room:
                free = ((0, 0), (0, room), (0, 0), (0, 0))
                length = jnp.full(batch, count, jnp.int32)
                cache = LayerCache(jnp.pad(key, free), jnp.pad(value, free), length)
        out = out.reshape(batch, count, config.num_heads * config.head_dim)
        return nn.Dense(config.hidden_size, use_bias=False, name="o_proj")(out), cache


class DecoderLayer(nn.Module):
    """One pre-norm layer: attention, then SwiGLU, each with a residual.

    Attributes:
        config: Sizes.
        causal: See `Attention`.
    """

    config: DecoderConfig
    causal: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        angles: Angles | None,
        cache: LayerCache | None = None,
        room: int = 0,
        places: Int[Array, "B N"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B N D"], LayerCache | None]:
        """Maps hidden states [B, N, D] to the same shape; see `Attention` for the rest."""
        config = self.config
        y = RMSNorm(config.rms_norm_eps, name="input_layernorm")(x)
        y, cache = Attention(config, self.causal, name="self_attn")(
            y, angles, cache, room, places, lengths
        )
        x = constrain(x + y, "batch", "token", "embed")
        y = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")(x)
        x = x + SwiGLU(config.intermediate_size, activation=config.activation, name="mlp")(y)
        return constrain(x, "batch", "token", "embed"), cache


class Decoder(nn.Module):
    """Embedding table, layers, final norm and head.

    Attributes:
        config: Sizes.
        causal: See `Attention`.
    """

    config: DecoderConfig
    causal: bool = True

    def setup(self):
        """Names follow the published checkpoint's."""
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, self.causal) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Dense(config.vocab_size, use_bias=False)

    def embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Embeddings of token ids [B, L]."""
        return self.embed_tokens(ids)

    def logits(self, x: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Vocabulary logits of normalised hidden states."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(x)
        return self.lm_head(x)

    def __call__(
        self,
        embeddings: Float[Array, "B N D"],
        position_ids: Int[Array, "3 B N"],
        caches: tuple[LayerCache, ...] | None = None,
        room: int = 0,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B N D"], tuple[LayerCache, ...] | None]:
        """Hidden states after the final norm, and the caches if there are any.

        Args:
            embeddings: Visual tokens and text embeddings in their order; one token with caches.
            position_ids: M-RoPE positions.
            caches: Decodes: one a layer.
            room: Prefills, if above 0: free slots of the caches that it makes.
            lengths: See `Attention`.
        """
        layers = 0, self.config.num_layers
        x, filled = self.span(embeddings, position_ids, layers, caches, room, lengths=lengths)
        return self.norm(x), filled if caches is not None or room else None

    def span(
        self,
        x: Float[Array, "B N D"],
        position_ids: Int[Array, "3 B N"],
        layers: tuple[int, int],
        caches: tuple[LayerCache, ...] | None = None,
        room: int = 0,
        places: Int[Array, "B N"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B N D"], tuple[LayerCache | None, ...]]:
        """Some layers that follow each other, with one token count.

        Args:
            x: Hidden states that enter the first of them.
            position_ids: M-RoPE positions.
            layers: The first, and one past the last.
            caches: Decodes: one for each of them.
            room: See `__call__`.
            places: Where in the caches x is written, see `Attention`; None is behind the last.
            lengths: See `Attention`.

        Returns:
            Hidden states that leave the last one, and a cache, or None, for each.
        """
        angles = mrope_angles(self.config, position_ids)
        filled = []
        for number, layer in enumerate(self.layers[slice(*layers)]):
            cache = None if caches is None else caches[number]
            x, cache = layer(x, angles, cache, room, places, lengths)
            filled.append(cache)
            self.sow("intermediates", f"hidden_{layers[0] + number}", x)
        return x, tuple(filled)

    def finish(self, x: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Vocabulary logits of hidden states that left the last layer."""
        return self.logits(self.norm(x))
