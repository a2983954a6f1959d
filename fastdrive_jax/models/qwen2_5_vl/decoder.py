"""The Qwen2.5-VL decoder: grouped-query attention with M-RoPE, SwiGLU, RMSNorm, a KV cache.

One layer serves three masters: the language model (causal, cached), ReconPruner's PrunerLayer and
the reconstruction decoder (both without a causal mask).
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastdrive_jax.models.attention import full_attention
from fastdrive_jax.models.layers import RMSNorm, SwiGLU, rotate
from fastdrive_jax.models.qwen2_5_vl.config import DecoderConfig

Angles = tuple[Float[Array, "B N d"], Float[Array, "B N d"]]


class LayerCache(flax.struct.PyTreeNode):
    """Keys and values of one layer.

    Attributes:
        key: [B, S, G, d], S the layer's own static length.
        value: [B, S, G, d].
        length: How many of the S are filled, int32 scalar.
    """

    key: Float[Array, "B S G d"]
    value: Float[Array, "B S G d"]
    length: Int[Array, ""]


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


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k and v.

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
    ) -> tuple[Float[Array, "B N D"], LayerCache | None]:
        """Attends over x [B, N, D] and, with a cache, over what it holds.

        Args:
            x: Normalised hidden states.
            angles: From `mrope_angles`; None leaves positions out.
            cache: Gets the N new keys and values at its length; prefill and decode alike.

        Returns:
            The output [B, N, D] and the filled cache.
        """
        config = self.config
        batch, count, _ = x.shape

        def heads(name, number):
            y = nn.Dense(number * config.head_dim, name=name)(x)
            return y.reshape(batch, count, number, config.head_dim)

        query = heads("q_proj", config.num_heads)
        key = heads("k_proj", config.num_kv_heads)
        value = heads("v_proj", config.num_kv_heads)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)

        mask, causal = None, self.causal
        if cache is not None:
            start = (0, cache.length, 0, 0)
            cache = LayerCache(
                key=jax.lax.dynamic_update_slice(cache.key, key.astype(cache.key.dtype), start),
                value=jax.lax.dynamic_update_slice(
                    cache.value, value.astype(cache.value.dtype), start
                ),
                length=cache.length + count,
            )
            slots = jnp.arange(cache.key.shape[1])
            row_of = cache.length - count + jnp.arange(count)
            mask = (slots <= row_of[:, None])[None, None]
            key, value, causal = cache.key, cache.value, False
        if mask is None and not causal:
            out = full_attention(query, key, value)
        else:
            out = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
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
    ) -> tuple[Float[Array, "B N D"], LayerCache | None]:
        """Maps hidden states [B, N, D] to the same shape; see `Attention` for the rest."""
        config = self.config
        y, cache = Attention(config, self.causal, name="self_attn")(
            RMSNorm(config.rms_norm_eps, name="input_layernorm")(x), angles, cache
        )
        x = x + y
        y = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")(x)
        return x + SwiGLU(config.intermediate_size, name="mlp")(y), cache


class Decoder(nn.Module):
    """Embedding table, layers, final norm and head.

    Attributes:
        config: Sizes.
    """

    config: DecoderConfig

    def setup(self):
        """Names follow the published checkpoint's."""
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_layers)]
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
    ) -> tuple[Float[Array, "B N D"], tuple[LayerCache, ...] | None]:
        """Hidden states after the final norm.

        Args:
            embeddings: Visual tokens and text embeddings in their order.
            position_ids: M-RoPE positions.
            caches: One a layer, filled in place of recomputation; None trains without.
        """
        angles = mrope_angles(self.config, position_ids)
        x, filled = embeddings, []
        for number, layer in enumerate(self.layers):
            x, cache = layer(x, angles, None if caches is None else caches[number])
            filled.append(cache)
            self.sow("intermediates", f"hidden_{number}", x)  # kept only if a caller asks for it
        return self.norm(x), None if caches is None else tuple(filled)


def empty_caches(
    config: DecoderConfig, batch: int, length: int, dtype: jnp.dtype = jnp.float32
) -> tuple[LayerCache, ...]:
    """Caches of `length` slots for every layer."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))
        for _ in range(config.num_layers)
    )
