"""What the tiny driving VLA is trained on: its trajectory tokens and, beside them, what it sees.

The encoder of a real VLA arrives pretrained. The tiny one starts from nothing, so a linear head
that names the classes inside each token is trained with it; the head is thrown away afterwards.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA, visual_positions
from fastdrive_jax.models.trajectory_tokens import DrivingVocabulary


@dataclass(frozen=True)
class DrivingLossConfig:
    """Weights of the two parts.

    Attributes:
        classes: Classes of the label maps.
        class_weight: Of the class head's loss.
        blur: Deviation in bins of the target around the true displacement: neighbouring bins are
            nearly right.
    """

    classes: int = 11
    class_weight: float = 1.0
    blur: float = 1.0


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
    """Parameters {"vla": ..., "class_head": ...}."""
    config = model.config
    images = jnp.zeros((1, len(config.cameras), *config.image_size, 3), jnp.uint8)
    ids = jnp.zeros((1, config.vocabulary.plan_length), jnp.int32)
    vla_key, head_key = jax.random.split(key)
    tokens = jnp.zeros((1, 1, config.text.hidden_size))
    return {
        "vla": model.init(vla_key, images, ids[:, :3], ids)["params"],
        "class_head": nn.Dense(loss.classes).init(head_key, tokens)["params"],
    }


def driving_loss(
    model: DrivingVLA, loss: DrivingLossConfig, params: dict, batch: dict
) -> tuple[Float[Array, ""], dict]:
    """Cross-entropy of the trajectory tokens plus that of the classes in each token.

    Args:
        model: The VLA.
        loss: Weights.
        params: From `init_driving`.
        batch: image [B, C, H, W, 3], labels [B, C, H, W], speed [B], command [B],
            future [B, T, 2] in metres.
    """
    config = model.config
    vocabulary = config.vocabulary
    variables = {"params": params["vla"]}
    tokens = model.apply(variables, batch["image"], method="encode")
    prompt = vocabulary.prompt(batch["speed"], batch["command"])
    plan = vocabulary.encode(batch["future"])
    where = visual_positions(config, len(plan))
    logits = model.apply(variables, tokens, where, prompt, plan, method="plan_logits")
    first = vocabulary.first_displacement
    logits = logits[..., first : first + vocabulary.displacement_bins]
    targets = plan_targets(vocabulary, plan, loss.blur)
    plan_loss = optax.losses.softmax_cross_entropy(logits, targets).mean()

    labels = batch["labels"].reshape(-1, *batch["labels"].shape[2:])
    fractions = class_fractions(labels, loss.classes, config.vision.token_pixels)
    seen = nn.Dense(loss.classes).apply({"params": params["class_head"]}, tokens)
    seen = seen.reshape(fractions.shape)
    class_loss = optax.losses.softmax_cross_entropy(seen, fractions).mean()

    guess = first + jnp.argmax(logits, axis=-1)
    error = jnp.linalg.norm(vocabulary.decode(guess) - batch["future"], axis=-1).mean()
    metrics = {"plan_loss": plan_loss, "class_loss": class_loss, "forced_l2": error}
    return plan_loss + loss.class_weight * class_loss, metrics
