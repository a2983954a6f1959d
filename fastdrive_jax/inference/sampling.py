"""Answers of Qwen2.5-VL, greedy or sampled: one compiled loop that stops when all samples have."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import read_json
from fastdrive_jax.models.qwen2_5_vl.hf_config import GENERATION_FILE
from fastdrive_jax.models.qwen2_5_vl.model import Caches, QwenVL
from fastdrive_jax.models.qwen2_5_vl.sequence import Batch

_SAMPLED = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Longest answer, the ending id included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Only that many of the most likely tokens compete; 0 is no limit.
        top_p: Only the fewest most likely tokens that reach this probability compete.
        repetition_penalty: Makes tokens of the prompt and the answer less likely, if above 1
            (CTRL, section 4.1): positive logits are divided by it, negative ones multiplied.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        check_least(self, max_new_tokens=1)
        if self.temperature < 0 or self.top_k < 0:
            raise UserError(
                f"temperature={self.temperature} and top_k={self.top_k} must not be negative."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be in (0, 1].")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be above 0.")


def read_sampling(checkpoint_dir: Path, **settings: Any) -> SamplingConfig:
    """What a checkpoint's `generation_config.json` asks for; defaults where it is silent or absent.

    Args:
        checkpoint_dir: The folder.
        settings: Fields that are taken instead of the file's.

    Raises:
        UserError: The file is damaged, or a value is impossible.
    """
    path = Path(checkpoint_dir) / GENERATION_FILE
    content = read_json(path) if path.exists() else {}
    asked = {"repetition_penalty": content.get("repetition_penalty")}
    if content.get("do_sample"):  # what else it says is for sampling alone
        asked |= {"temperature": 1.0, "top_k": 50}  # as transformers where the file is silent
        asked |= {name: content.get(name, asked.get(name)) for name in _SAMPLED}
    found = {name: value for name, value in (asked | settings).items() if value is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path} gives {name}={value!r}; it must be a number.")
    return SamplingConfig(**found)


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Logits with those of tokens that were there before moved down by the repetition penalty."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def ids_in(batch: Batch, vocab_size: int) -> Bool[Array, "B V"]:
    """Which token ids each sample's prompt holds."""
    rows, length = batch.ids.shape
    real = jnp.arange(length) < jnp.asarray(batch.lengths)[:, None]
    none = jnp.zeros((rows, vocab_size), bool)
    return none.at[jnp.arange(rows)[:, None], batch.ids].max(real)


@flax.struct.dataclass
class Answer:
    """What was decoded.

    Attributes:
        ids: Token ids, filled up with the padding id after the ending id, int32 [B, T].
        lengths: Of each answer with its ending id, int32 [B].
        caches: Of the prompt and the answer but its last token.
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    caches: Caches


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


def decode_loop(
    step: Callable[[Int[Array, " B"], Any, Int[Array, ""]], tuple[Float[Array, "B V"], Any]],
    logits: Float[Array, "B V"],
    caches: Any,
    ends: tuple[int, ...],
    pad: int,
    key: jax.Array,
    config: SamplingConfig,
    seen: Bool[Array, "B V"] | None = None,
) -> tuple[Int[Array, "B T"], Int[Array, " B"], Any]:
    """Token after token until all samples have ended.

    Args:
        step: (ids, caches, how many answer tokens stand before them) to logits and caches.
        logits: Behind each prompt.
        caches: A pytree that `step` carries on.
        ends: Ids that end an answer.
        pad: Fills up an answer behind its end.
        key: Draws the tokens.
        config: How to choose them.
        seen: Of `ids_in`; needed for a repetition penalty.

    Returns:
        `Answer`'s ids and lengths, and the caches.
    """
    count, most = logits.shape[0], config.max_new_tokens
    if config.repetition_penalty == 1:
        seen = None
    elif seen is None:
        raise ValueError("a repetition penalty needs the ids of the prompts")

    def ended(ids: Int[Array, " B"]) -> Bool[Array, " B"]:
        return (ids[:, None] == jnp.asarray(ends)).any(axis=1)

    def following(logits, number, seen):
        fold = jax.random.fold_in(key, number)
        if seen is None:
            return choose(logits, fold, config), None
        logits = penalise(logits.astype(jnp.float32), seen, config.repetition_penalty)
        ids = choose(logits, fold, config)
        return ids, seen.at[jnp.arange(count), ids].set(True)

    def goes_on(carry):
        number, done = carry[0], carry[1]
        return (number < most) & ~done.all()

    def body(carry):
        number, done, ids, caches, answer, lengths, seen = carry
        logits, caches = step(ids, caches, number - 1)
        ids, seen = following(logits, number, seen)
        ids = jnp.where(done, pad, ids)
        answer = jax.lax.dynamic_update_slice(answer, ids[:, None], (0, number))
        return number + 1, done | ended(ids), ids, caches, answer, lengths + ~done, seen

    ids, seen = following(logits, 0, seen)
    answer = jnp.full((count, most), pad, jnp.int32).at[:, 0].set(ids)
    start = jnp.int32(1), ended(ids), ids, caches, answer, jnp.ones(count, jnp.int32), seen
    _, _, _, caches, answer, lengths, _ = jax.lax.while_loop(goes_on, body, start)
    return answer, lengths, caches


def continue_text(
    model: QwenVL,
    variables: dict,
    logits: Float[Array, "B V"],
    caches: Caches,
    next_position: Int[Array, " B"],
    key: jax.Array,
    config: SamplingConfig,
    seen: Bool[Array, "B V"] | None = None,
) -> Answer:
    """Decodes behind a prefill; `decode_text` is the same, compiled and with the caches donated.

    Args:
        model: The model.
        variables: {"params": ...}.
        logits: Behind each prompt.
        caches: With room for `max_new_tokens`.
        next_position: M-RoPE id of the first answer token.
        key: Draws the tokens.
        config: How to choose them.
        seen: Of `ids_in`; needed for a repetition penalty.
    """

    def step(ids, caches, number):
        return model.apply(variables, ids, next_position + number, caches, method="decode")

    own = model.config
    given = logits, caches, own.eos_token_ids, own.pad_token_id, key, config, seen
    ids, lengths, caches = decode_loop(step, *given)
    return Answer(ids, lengths, caches)


# The caches come back, so XLA writes the answer's keys and values into the buffers that were given.
decode_text = jax.jit(
    continue_text, static_argnames=("model", "config"), donate_argnames=("caches",)
)


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
        `ids` and `lengths` of `Answer`.
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
    seen = ids_in(batch, logits.shape[-1])
    answer = continue_text(model, variables, logits, caches, batch.next_position, key, config, seen)
    return answer.ids, answer.lengths
