"""Answers of Qwen2.5-VL to pictures whose tokens were pruned: the checkpoint is not retrained."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference import segments
from fastdrive_jax.inference.pictures import layout_inputs, patch_pixels
from fastdrive_jax.inference.pruned import read_pruned
from fastdrive_jax.inference.sampling import SamplingConfig, decode_loop, ids_in
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.live import live_sequence
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.sequence import Batch
from fastdrive_jax.models.qwen2_5_vl.vision_evidence import vision_evidence
from fastdrive_jax.pruning.interface import VISION, Pruner


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


def needs_past(pruner: Pruner) -> bool:
    """Whether a method looks at earlier frames, which single prompts have not."""
    return "state" in pruner.needs or pruner.temporal is not None


def check_single_prompts(pruner: Pruner) -> None:
    """Refuses a method that needs what single prompts do not give.

    Raises:
        UserError: It does.
    """
    if needs_past(pruner):
        what = "state" if "state" in pruner.needs else "earlier frames"
        raise UserError(
            f"{pruner.name} needs {what}, which single prompts lack; drive with it by the driving "
            "policy, or leave it out."
        )


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
    check_single_prompts(pruner)
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
    live = live_sequence(
        embeddings,
        jnp.asarray(batch.positions),
        jnp.asarray(batch.visual) >= 0,
        jnp.asarray(batch.lengths),
        total,
        length - total,
    )
    # Places within the picture, as in training: those of the prompt depend on the text before.
    inputs = layout_inputs(tokens.reshape(samples, total, -1), grid).replace(foreground=foreground)
    if wanted:
        found = vision_evidence(sown["intermediates"]["visual"], model.config.vision)
        inputs = inputs.replace(
            vision_received=found.received.reshape(samples, -1) * samples / pictures,
            vision_keys=found.keys.reshape(samples, total, -1),
        )
    if "pixels" in pruner.needs:
        pixels = patch_pixels(batch.rows, model.config.vision.spatial_merge_size)
        inputs = inputs.replace(pixels=pixels.reshape(samples, total, -1))
    choose_key, draw_key = jax.random.split(key)
    decoder, weights = Decoder(model.config.text), params["vla"]["language_model"]
    room, after = sampling.max_new_tokens, jnp.asarray(batch.next_position)
    method = pruner, params["pruner"], keep_ratio, inputs, draw_key
    read = read_pruned(decoder, weights, live, after, room, *method).prefilled

    def step(ids, parts, number):
        del number  # the segments count on by themselves
        logits, parts, _ = segments.decode_token(decoder, weights, ids, parts)
        return logits, parts

    config = model.config
    seen = ids_in(batch, read.logits.shape[-1])
    given = read.logits, read.segments, config.eos_token_ids, config.pad_token_id
    ids, lengths, _ = decode_loop(step, *given, choose_key, sampling, seen)
    return PrunedAnswer(ids, lengths, read.segments[-1].ids)
