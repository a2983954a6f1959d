"""Answers of Qwen2.5-VL, greedy or sampled: one compiled loop that stops when all samples have."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.model import Caches, QwenVL
from fastdrive_jax.models.qwen2_5_vl.sequence import Batch


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Longest answer, the ending id included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Only that many of the most likely tokens compete; 0 is no limit.
        top_p: Only the fewest most likely tokens that reach this probability compete.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.temperature < 0 or self.top_k < 0:
            raise UserError(
                f"temperature={self.temperature} and top_k={self.top_k} must not be negative."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1].")


def choose(logits: Float[Array, "B V"], key: jax.Array, config: SamplingConfig) -> Int[Array, " B"]:
    """The next token of each sample."""
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        least = jnp.where(before < config.top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def continue_text(
    model: QwenVL,
    variables: dict,
    logits: Float[Array, "B V"],
    caches: Caches,
    next_position: Int[Array, " B"],
    key: jax.Array,
    config: SamplingConfig,
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Decodes behind a prefill.

    Args:
        model: The model.
        variables: {"params": ...}.
        logits: Behind each prompt.
        caches: With room for `max_new_tokens`.
        next_position: M-RoPE id of the first answer token.
        key: Draws the tokens.
        config: How to choose them.

    Returns:
        Token ids [B, max_new_tokens], filled up with the padding id after the ending id, and the
        length [B] of each answer with its ending id.
    """
    ends = jnp.asarray(model.config.eos_token_ids)
    pad = model.config.pad_token_id
    batch, most = logits.shape[0], config.max_new_tokens

    def ended(ids: Int[Array, " B"]) -> Bool[Array, " B"]:
        return (ids[:, None] == ends).any(axis=1)

    def goes_on(carry):
        step, done = carry[0], carry[1]
        return (step < most) & ~done.all()

    def body(carry):
        step, done, ids, caches, answer, lengths = carry
        logits, caches = model.apply(
            variables, ids, next_position + step - 1, caches, method="decode"
        )
        ids = jnp.where(done, pad, choose(logits, jax.random.fold_in(key, step), config))
        answer = jax.lax.dynamic_update_slice(answer, ids[:, None], (0, step))
        return step + 1, done | ended(ids), ids, caches, answer, lengths + ~done

    ids = choose(logits, jax.random.fold_in(key, 0), config)
    answer = jnp.full((batch, most), pad, jnp.int32).at[:, 0].set(ids)
    start = jnp.int32(1), ended(ids), ids, caches, answer, jnp.ones(batch, jnp.int32)
    *_, answer, lengths = jax.lax.while_loop(goes_on, body, start)
    return answer, lengths


def answer_batch(
    model: QwenVL, variables: dict, batch: Batch, key: jax.Array, config: SamplingConfig
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Answers of a whole batch: pictures, prefill and decoding in one program.

    Args:
        model: The model.
        variables: {"params": ...}.
        batch: Of `collate`; a batch of the same shapes needs no new program.
        key: Draws the tokens.
        config: How to choose them.

    Returns:
        See `continue_text`.
    """
    tokens = None
    if batch.rows is not None:
        tokens = model.apply(variables, batch.rows, batch.layout, method="encode")
    embeddings = model.apply(variables, batch.ids, batch.visual, tokens, method="embed")
    logits, caches = model.apply(
        variables,
        embeddings,
        batch.positions,
        batch.lengths,
        config.max_new_tokens,
        method="prefill",
    )
    return continue_text(model, variables, logits, caches, batch.next_position, key, config)
