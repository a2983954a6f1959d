"""The driving policy with eight-bit weights: a quarter of the bytes, and int8 or fp8 products.

OUT/config.json          see `driving.write_policy`, and the type of the weights
OUT/model.safetensors    see `eight_bits`
OUT/orbax/               the same tree
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from fastdrive_jax.configs import from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import read_bundle, write_bundle
from fastdrive_jax.export.driving import stored_policy
from fastdrive_jax.export.eight_bits import (
    EightBits,
    Part,
    QType,
    Tensors,
    check_kept,
    round_params,
    rounded_run,
)
from fastdrive_jax.export.trees import flatten, unflatten
from fastdrive_jax.inference.policy import DrivingPolicy, Plan, plan
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

KIND = "quantized driving policy"


@dataclass(frozen=True)
class QuantizedPolicy:
    """What is compiled once.

    Attributes:
        policy: The model, the method and the number of kept tokens.
        pruner: Sizes of the method.
        weights: See `EightBits`.
        activations: See `EightBits`.

    Raises:
        UserError: See `EightBits`.
    """

    policy: DrivingPolicy
    pruner: ReconPrunerConfig
    weights: QType = "int8"
    activations: QType | None = None

    def __post_init__(self):
        EightBits(self.weights, self.activations)  # refuses two types

    @property
    def bits(self) -> EightBits:
        """How numbers are rounded."""
        return EightBits(self.weights, self.activations)


def quantize_params(quantized: QuantizedPolicy, params: dict) -> Tensors:
    """Flat tensors of {"vla": ..., "pruner": ...} with the kernels in eight bits.

    Raises:
        UserError: qwix is not installed.
    """
    return round_params(_parts(quantized), quantized.bits, params)


def quantized_plan(
    quantized: QuantizedPolicy,
) -> Callable[[Tensors, jax.Array, jax.Array, jax.Array], Plan]:
    """`(tensors, images, speed, command)` to the plan: pure, to be jitted.

    Raises:
        UserError: qwix is not installed.
    """
    return rounded_run(_parts(quantized), quantized.bits, partial(plan, quantized.policy))


def quantized_scores(quantized: QuantizedPolicy) -> Callable[..., jax.Array]:
    """`(tensors, tokens [B, N, D], position_ids [3, B, N])` to the pruner's scores [B, N].

    Raises:
        UserError: qwix is not installed.
    """
    module = ReconPruner(quantized.pruner)

    def score(params, tokens, position_ids=None):
        return module.apply({"params": params["pruner"]}, tokens, position_ids)

    return rounded_run({"pruner": _parts(quantized)["pruner"]}, quantized.bits, score)


def write_quantized(folder: Path, quantized: QuantizedPolicy, params: dict) -> Path:
    """Writes the bundle of a policy with its kernels in eight bits; see `write_bundle`.

    Raises:
        UserError: qwix is not installed, the weights are of fp8, or the folder cannot be written.
    """
    check_kept(quantized.bits)
    config = {
        "kind": KIND,
        "keep_ratio": quantized.policy.keep_ratio,
        "vla": to_plain(quantized.policy.model.config),
        "pruner": to_plain(quantized.pruner),
        "weights": quantized.weights,
    }
    return write_bundle(folder, unflatten(quantize_params(quantized, params)), config)


def read_quantized(
    folder: Path,
    form: Literal["safetensors", "orbax"] = "safetensors",
    activations: QType | None = None,
) -> tuple[QuantizedPolicy, Tensors]:
    """The policy of such a bundle and its flat tensors, for `quantized_plan`.

    Args:
        folder: Of `write_quantized`.
        form: Which of its two forms is read.
        activations: See `QuantizedPolicy`; the weights are the same.

    Raises:
        UserError: It is no whole bundle, or one of another kind.
    """
    params, config = read_bundle(folder, form)
    if config.get("kind") != KIND:
        raise UserError(f"{folder} holds a {config.get('kind')!r}, not a {KIND}.")
    pruner, policy = from_plain(ReconPrunerConfig, config["pruner"]), stored_policy(config)
    return QuantizedPolicy(policy, pruner, config["weights"], activations), flatten(params)


def _parts(quantized: QuantizedPolicy) -> dict[str, Part]:
    model = quantized.policy.model
    config = model.config
    images = jax.ShapeDtypeStruct((1, len(config.cameras), *config.image_size, 3), jnp.uint8)
    ids = jax.ShapeDtypeStruct((1, config.vocabulary.plan_length), jnp.int32)
    prompt = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    tokens = jax.ShapeDtypeStruct((1, config.visual_tokens, config.text.hidden_size), jnp.float32)
    places = jax.ShapeDtypeStruct((3, 1, config.visual_tokens), jnp.int32)
    return {
        "vla": Part(model, (images, prompt, ids)),
        "pruner": Part(ReconPruner(quantized.pruner), (tokens, places)),
    }
