"""The training steps of ReconPruner that `bench_train` times, from a config to a jitted step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.pruner import TINY
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.alignment import align_hidden, aligned_config
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.vision import VisionEncoder
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.optimizer import OptimizerConfig, make_optimizer
from fastdrive_jax.training.picture_loss import encode_pictures, picture_loss
from fastdrive_jax.training.reconstruction import TOKEN, ReconConfig, init_params, recon_loss
from fastdrive_jax.training.state import TrainState, init_train_state, make_train_step


@dataclass(frozen=True)
class TrainCase:
    """A training step.

    Attributes:
        recon: Modules and loss.
        optimizer: Of the step.
        batch_size: Pictures.
        size: Height and width of a picture.
        spread: Split the batch over all CPU devices; a small step runs mostly on one thread each.
        encoder: Frozen encoder that makes the tokens within the step, which then computes in
            bfloat16; None: tokens are given and all is float32.
    """

    recon: ReconConfig
    optimizer: OptimizerConfig
    batch_size: int
    size: tuple[int, int] = (224, 392)
    spread: bool = False
    encoder: VisionConfig | None = None

    @property
    def tokens(self) -> int:
        """N."""
        return (self.size[0] // TOKEN) * (self.size[1] // TOKEN)


MIDDLE_LAYER = DecoderConfig(  # of Qwen2.5-0.5B
    hidden_size=896,
    intermediate_size=4864,
    num_layers=6,
    num_heads=14,
    num_kv_heads=2,
    vocab_size=256,
    mrope_section=(8, 12, 12),
)
PAPER = OptimizerConfig(learning_rate=2e-5, warmup_steps=100, total_steps=10_000)
CASES = {
    "tiny": TrainCase(TINY.recon, TINY.optimizer, batch_size=32, spread=True),
    "100m": TrainCase(
        ReconConfig(
            pruner=ReconPrunerConfig(layer=replace(MIDDLE_LAYER, num_layers=1)),
            decoder=MIDDLE_LAYER,
        ),
        PAPER,
        batch_size=4,
    ),
    "3b": TrainCase(ReconConfig(), PAPER, batch_size=8, size=(1596, 1596), encoder=VisionConfig()),
}


def init_state(case: TrainCase) -> TrainState:
    """The state before the first update."""
    optimizer = make_optimizer(case.optimizer)
    return init_train_state(partial(init_params, case.recon), optimizer, 0)


def init_frozen(case: TrainCase) -> dict[str, Any]:
    """What the step reads and does not train, as random values."""
    frozen = {}
    keys = jax.random.split(jax.random.key(1), 3)
    width = case.recon.pruner.layer.hidden_size
    if case.encoder:
        sample = jnp.zeros((1, 4 * TOKEN, 4 * TOKEN, 3), jnp.uint8)
        init = VisionEncoder(case.encoder).init
        params = _drawn(jax.eval_shape(init, keys[0], sample)["params"], keys[0])
        frozen["encoder"] = align_hidden(params, case.encoder)
    else:
        frozen["squares"] = jax.random.normal(keys[1], (3 * TOKEN**2, width)) / TOKEN
    if case.recon.needs_prior:
        frozen["prior"] = jax.random.uniform(keys[2], (6, case.tokens))
    return frozen


def _drawn(shapes: Any, key: jax.Array) -> Any:
    """Small random numbers in bfloat16, all by one kernel: hundreds take long to compile."""
    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])
    numbers = 0.02 * jax.random.normal(key, (int(ends[-1]),), jnp.bfloat16)
    parts = jnp.split(numbers, ends[:-1])
    return tree.unflatten([x.reshape(leaf.shape) for x, leaf in zip(parts, leaves, strict=True)])


def draw_batch(case: TrainCase) -> dict[str, np.ndarray]:
    """A batch of noise whose masks have the size of objects."""
    rng = np.random.default_rng(0)
    height, width = case.size
    shape = (case.batch_size, -(-height // 16), -(-width // 16))
    blobs = (rng.random(shape) < 0.4).repeat(16, 1).repeat(16, 2)[:, :height, :width]
    batch = {
        "image": rng.integers(0, 256, (case.batch_size, height, width, 3), np.uint8),
        "mask": blobs.astype(np.uint8),
        "camera": rng.integers(0, 6, case.batch_size).astype(np.int32),
    }
    if not case.encoder:
        width = case.recon.pruner.layer.hidden_size
        shape = (case.batch_size, case.tokens, width)
        batch["tokens"] = rng.standard_normal(shape, np.float32)
    return batch


def make_step(case: TrainCase, where: jax.sharding.Sharding | None = None) -> Callable:
    """The jitted `(state, batch, frozen) -> (state, metrics)`; the state is donated.

    Args:
        case: What is trained.
        where: The new state lies; None leaves it to XLA.
    """
    step = make_train_step(partial(_loss, case=case), make_optimizer(case.optimizer))
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def abstract_inputs(case: TrainCase) -> tuple[TrainState, dict, dict]:
    """Shapes of state, batch and frozen values, of which nothing is computed."""
    height, width = case.size
    lead = (case.batch_size,)
    batch = {
        "image": jax.ShapeDtypeStruct((*lead, height, width, 3), jnp.uint8),
        "mask": jax.ShapeDtypeStruct((*lead, height, width), jnp.uint8),
        "camera": jax.ShapeDtypeStruct(lead, jnp.int32),
    }
    if not case.encoder:
        dim = case.recon.pruner.layer.hidden_size
        batch["tokens"] = jax.ShapeDtypeStruct((*lead, case.tokens, dim), jnp.float32)
    state, frozen = (jax.eval_shape(partial(init, case)) for init in (init_state, init_frozen))
    return state, batch, frozen


def _loss(params, batch, key, frozen, *, case: TrainCase):
    if case.encoder:
        encode = partial(encode_pictures, config=aligned_config(case.encoder), dtype=jnp.bfloat16)
        return picture_loss(params, batch, key, frozen, config=case.recon, encode=encode)
    if "tokens" not in batch:
        batch = {**batch, "tokens": _squares(batch["image"]) @ frozen["squares"]}
    return recon_loss(params, batch, key, frozen.get("prior"), config=case.recon)


def _squares(images: jax.Array) -> jax.Array:
    """Pixels of each token's square [B, N, 28 * 28 * 3].

    Projected they stand for the tokens of an encoder, which would only lengthen the step beside
    which a loader has to keep up.
    """
    batch, height, width, _ = images.shape
    rows, columns = height // TOKEN, width // TOKEN
    x = images.reshape(batch, rows, TOKEN, columns, TOKEN, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, -1).astype(jnp.float32) / 255 - 0.5
