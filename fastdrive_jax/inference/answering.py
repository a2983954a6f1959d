"""Answers of Qwen2.5-VL to pictures whose tokens were pruned: the checkpoint is not retrained."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference import segments
from fastdrive_jax.inference.sampling import SamplingConfig, decode_loop, ids_in
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.sequence import Batch
from fastdrive_jax.models.qwen2_5_vl.vision_evidence import vision_evidence
from fastdrive_jax.pruning.budgets import split_pictures
from fastdrive_jax.pruning.cd_pruner import text_relevance
from fastdrive_jax.pruning.interface import (
    VISION,
    Kept,
    Pruner,
    PrunerInputs,
    keep_tokens,
    pruner_scores,
)
from fastdrive_jax.pruning.select import gather_tokens, top_k

UNFILLED = frozenset({"pixels", "state"})  # what this file has no source for


class PrunedAnswer(flax.struct.PyTreeNode):
    """What was decoded.

    Attributes:
        ids: See `sampling.Answer`.
        lengths: See `sampling.Answer`.
        keep_indices: Visual tokens that the last layer saw [B, K], picture after picture.
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    keep_indices: Int[Array, "B K"]


def answer_pruned(
    model: QwenVL,
    pruner: Pruner,
    keep_ratio: float,
    grid: tuple[int, int],
    sampling: SamplingConfig,
    params: dict,
    batch: Batch,
    key: jax.Array,
    foreground: jax.Array | None = None,
) -> PrunedAnswer:
    """Pictures, pruning, prefill and decoding of a batch in one program.

    All samples hold the same number of pictures of one size, as those of a car's cameras do. One
    budget is shared by the pictures of a sample; a method that scores sees each by itself.

    Args:
        model: Static, as all up to `sampling`.
        pruner: The method.
        keep_ratio: In (0, 1].
        grid: Token rows and columns of one picture.
        sampling: How answer tokens are chosen.
        params: {"vla": of the model, "pruner": of the method}.
        batch: Of `collate`.
        key: Draws the tokens, and what a method draws.
        foreground: [B, N], for the control that needs it.

    Raises:
        UserError: The method needs what single frames of a checkpoint do not give, or pictures
            are not alike.
    """
    lacking = sorted(pruner.needs & UNFILLED)
    if lacking or pruner.temporal is not None or pruner.reuse:
        raise UserError(
            f"{pruner.name} needs {', '.join(lacking) or 'earlier frames'}, which single prompts "
            "lack; drive with it by the driving policy, or leave it out."
        )
    variables = {"params": params["vla"]}
    samples, length = batch.ids.shape
    wanted = ["intermediates"] if pruner.needs & VISION else False
    tokens = model.apply(variables, batch.rows, batch.layout, method="encode", mutable=wanted)
    if wanted:
        tokens, sown = tokens
    pictures, each = tokens.shape[:2]
    if pictures % samples or each != grid[0] * grid[1]:
        raise UserError(
            f"{pictures} pictures of {each} tokens are not as many of {grid[0]} x {grid[1]} tokens "
            f"in each of {samples} samples; give all samples the same cameras."
        )
    total = pictures // samples * each
    embeddings = model.apply(variables, batch.ids, batch.visual, tokens, method="embed")
    live = segments.live_sequence(
        embeddings,
        jnp.asarray(batch.positions),
        jnp.asarray(batch.visual) >= 0,
        jnp.asarray(batch.lengths),
        total,
        length - total,
    )
    inputs = PrunerInputs(
        tokens=tokens.reshape(samples, total, -1),
        position_ids=jnp.take_along_axis(jnp.asarray(batch.positions), live.visual[None], axis=2),
        camera=jnp.broadcast_to(jnp.arange(pictures // samples), (samples, pictures // samples)),
        foreground=foreground,
        grid=grid,
    )
    if wanted:
        found = vision_evidence(sown["intermediates"]["visual"], model.config.vision)
        inputs = inputs.replace(
            vision_received=found.received.reshape(samples, -1) * samples / pictures,
            vision_keys=found.keys.reshape(samples, total, -1),
        )
    choose_key, draw_key = jax.random.split(key)
    within: dict[str, Any] = {}
    if pruner.cuts is None and not pruner.renumber:
        k = pruner.budget(total, keep_ratio)
        kept = _before_model(pruner, params["pruner"], inputs, live, k, draw_key)
        live = segments.keep_live(live, kept)
    else:
        within = {
            "pruner": pruner,
            "pruner_params": params["pruner"],
            "keep_ratio": keep_ratio,
            "inputs": inputs,
            "key": draw_key,
        }
    decoder, weights = Decoder(model.config.text), params["vla"]["language_model"]
    room, after = sampling.max_new_tokens, jnp.asarray(batch.next_position)
    read = segments.prefill(decoder, weights, live, after, room, **within)

    def step(ids, parts, number):
        del number  # the segments count on by themselves
        logits, parts, _ = segments.decode_token(decoder, weights, ids, parts)
        return logits, parts

    config = model.config
    seen = ids_in(batch, read.logits.shape[-1])
    given = read.logits, read.segments, config.eos_token_ids, config.pad_token_id
    ids, lengths, _ = decode_loop(step, *given, choose_key, sampling, seen)
    return PrunedAnswer(ids, lengths, read.segments[-1].ids)


def _before_model(pruner, params, inputs, live, k, key) -> Kept:
    """Chosen before the first layer."""
    if pruner.score is not None:
        scores = pruner_scores(pruner, params, split_pictures(inputs), key)
        indices = top_k(scores.reshape(inputs.tokens.shape[:2]), k)
        return Kept(indices, gather_tokens(inputs.tokens, indices))
    first = segments.first_inputs(live, None)
    inputs = inputs.replace(text=first.text, text_valid=first.text_valid)
    if "relevance" in pruner.needs:
        relevance = text_relevance(inputs.tokens, first.text, first.text_valid)
        inputs = inputs.replace(relevance=relevance)
    return keep_tokens(pruner, params, inputs, k, key)
