"""What the tiny driving VLA learns from: its trajectory, and beside it what it sees and where.

A real VLA starts from a pretrained Qwen2.5-VL. The tiny one starts from nothing, so two linear
heads teach what pretraining would have: the classes inside each visual token, read off the
encoder, and the place of each token, read off an early decoder layer (rotary embeddings put places
into attention only; the planner needs them in the values too). Both heads are thrown away.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA, visual_positions
from fastdrive_jax.models.trajectory_tokens import PLAN, DrivingVocabulary
from fastdrive_jax.pruning.select import gather_position_ids
from fastdrive_jax.training.token_dropping import draw_order, on_some_tokens

MARKS = 2  # ids in front of the visual tokens


@dataclass(frozen=True)
class DrivingLossConfig:
    """Weights of the parts.

    Attributes:
        classes: Classes of the label maps.
        class_weight: Of the class head's loss.
        place_weight: Of the place head's loss.
        place_layer: Decoder layer whose output the place head reads.
        blur: Deviation in bins of the target around the true displacement: neighbouring bins are
            nearly right.
        hidden_plan: Share of samples whose earlier trajectory tokens are hidden from the decoder.
            With them in sight the next step is mostly a copy of the last, and nothing needs to be
            seen.
        keep_choices: Each step draws one of these shares of the visual tokens (a share named
            twice, twice as often) and keeps as many at random (`draw_order`). Qwen2.5-VL was
            trained on pictures of every size; a model that knows one token count only takes any
            other for noise. The encoder learns to plan from whole pictures alone: if it knew that
            tokens go missing, it would hide copies of what it sees in their neighbours, as no
            pretrained encoder does.
    """

    classes: int = 11
    class_weight: float = 1.0
    place_weight: float = 1.0
    place_layer: int = 1
    blur: float = 1.0
    hidden_plan: float = 0.7
    keep_choices: tuple[float, ...] = (1.0, 1.0, 0.5, 0.25)


def plan_targets(
    vocabulary: DrivingVocabulary, plan: Int[Array, "B 2T"], blur: float
) -> Float[Array, "B 2T V"]:
    """Target distributions over displacement bins, a normalised Gaussian around each true bin."""
    bins = jnp.arange(vocabulary.displacement_bins)
    away = (bins - (plan - vocabulary.first_displacement)[..., None]) / max(blur, 1e-3)
    return jax.nn.softmax(-0.5 * away**2, axis=-1)


def class_fractions(labels: Int[Array, "M H W"], classes: int, edge: int) -> Float[Array, "M N c"]:
    """Area of each class within each token, from every fourth pixel along each axis.

    A 49-point sample of a token is exact enough as a target and 16 times cheaper than all pixels.
    Labels outside the classes count for none.
    """
    labels, edge = labels[:, 2::4, 2::4], edge // 4
    count, height, width = labels.shape
    x = labels.reshape(count, height // edge, edge, width // edge, edge)
    x = jax.nn.one_hot(x, classes).mean(axis=(2, 4))
    return x.reshape(count, -1, classes)


def init_driving(model: DrivingVLA, loss: DrivingLossConfig, key: jax.Array) -> dict:
    """Parameters {"vla", "class_head", "place_head"}."""
    config = model.config
    images = jnp.zeros((1, len(config.cameras), *config.image_size, 3), jnp.uint8)
    ids = jnp.zeros((1, config.vocabulary.plan_length), jnp.int32)
    vla_key, class_key, place_key = jax.random.split(key, 3)
    tokens = jnp.zeros((1, 1, config.text.hidden_size))
    return {
        "vla": model.init(vla_key, images, ids[:, :3], ids)["params"],
        "class_head": nn.Dense(loss.classes).init(class_key, tokens)["params"],
        "place_head": nn.Dense(3).init(place_key, tokens)["params"],
    }


def planning_loss(
    model: DrivingVLA,
    loss: DrivingLossConfig,
    params: dict,
    tokens: Float[Array, "B N D"],
    content: Float[Array, "B N c"],
    batch: dict,
    key: jax.Array,
) -> tuple[Float[Array, ""], dict]:
    """Cross-entropy of the trajectory tokens plus the place head's error.

    Args:
        model: The VLA.
        loss: Weights.
        params: From `init_driving`.
        tokens: Visual tokens, all of them. They get a gradient only where all are kept.
        content: Area of each class within each token.
        batch: speed [B], command [B], future [B, T, 2] in metres.
        key: Draws the kept tokens and whose trajectory tokens are hidden.
    """
    hide_key, choice_key, order_key = jax.random.split(key, 3)
    order = draw_order(order_key, content, len(model.config.cameras), model.config.token_grid)
    visual = visual_positions(model.config, len(tokens))

    def on_kept(tokens, kept):
        where = gather_position_ids(visual, kept)
        return _planning_loss(model, loss, params, tokens, where, batch, hide_key)

    return on_some_tokens(on_kept, tokens, order, loss.keep_choices, choice_key)


def _planning_loss(model, loss, params, tokens, where, batch, key):
    vocabulary = model.config.vocabulary
    prompt = vocabulary.prompt(batch["speed"], batch["command"])
    plan = vocabulary.encode(batch["future"])
    hide = jax.random.bernoulli(key, loss.hidden_plan, (len(plan), 1))
    logits, kept = model.apply(
        {"params": params["vla"]},
        tokens,
        where,
        prompt,
        jnp.where(hide, PLAN, plan),
        method="plan_logits",
        mutable=["intermediates"],
    )
    first = vocabulary.first_displacement
    logits = logits[..., first : first + vocabulary.displacement_bins]
    targets = plan_targets(vocabulary, plan, loss.blur)
    plan_loss = optax.losses.softmax_cross_entropy(logits, targets).mean()

    hidden = kept["intermediates"]["language_model"][f"hidden_{loss.place_layer}"][0]
    found = nn.Dense(3).apply(
        {"params": params["place_head"]}, hidden[:, MARKS : MARKS + tokens.shape[1]]
    )
    rows, columns = model.config.token_grid
    place = jnp.moveaxis(where - MARKS, 0, -1) / jnp.asarray([columns, rows, columns])
    place_loss = jnp.square(found - place).mean()

    guess = first + jnp.argmax(logits, axis=-1)
    error = jnp.linalg.norm(vocabulary.decode(guess) - batch["future"], axis=-1).mean(axis=1)
    unaided = jnp.where(hide[:, 0], error, 0).sum() / jnp.maximum(hide.sum(), 1)
    metrics = {"plan_loss": plan_loss, "place_loss": place_loss, "hidden_plan_l2": unaided}
    return plan_loss + loss.place_weight * place_loss, metrics


def driving_loss(
    model: DrivingVLA, loss: DrivingLossConfig, params: dict, batch: dict, key: jax.Array
) -> tuple[Float[Array, ""], dict]:
    """`planning_loss` on tokens of the pictures, plus cross-entropy of the classes in each token.

    Args:
        model: The VLA.
        loss: Weights.
        params: From `init_driving`.
        batch: As for `planning_loss`, and image [B, C, H, W, 3] and labels [B, C, H, W].
        key: Draws whose trajectory tokens are hidden.
    """
    tokens = model.apply({"params": params["vla"]}, batch["image"], method="encode")
    labels = batch["labels"].reshape(-1, *batch["labels"].shape[2:])
    content = class_fractions(labels, loss.classes, model.config.vision.token_pixels)
    content = content.reshape(*tokens.shape[:2], -1)
    total, metrics = planning_loss(model, loss, params, tokens, content, batch, key)
    seen = nn.Dense(loss.classes).apply({"params": params["class_head"]}, tokens)
    class_loss = optax.losses.softmax_cross_entropy(seen, content).mean()
    return total + loss.class_weight * class_loss, metrics | {"class_loss": class_loss}
