"""Eight-bit weights by qwix (extra `export`): a quarter of the bytes, and int8 or fp8 products.

    OUT/config.json          see `driving.write_policy`, and the type of the weights
    OUT/model.safetensors    of every linear layer "NAME/kernel/qvalue" and "NAME/kernel/scale"
    OUT/orbax/               the same tree

Every column of a kernel has its own scale. Biases, norms and embeddings stay as they are, and so do
the products within attention.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastdrive_jax.configs import from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import read_bundle, write_bundle
from fastdrive_jax.export.driving import stored_policy
from fastdrive_jax.export.trees import SEPARATOR, flatten, unflatten
from fastdrive_jax.inference.policy import DrivingPolicy, Plan, plan
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

KIND = "quantized driving policy"
LINEAR = (
    r".*(_proj|qkv|attn/proj|mlp_\d|scorer)"  # paths of the modules whose kernels are quantized
)
QType = Literal["int8", "float8_e4m3fn"]


@dataclass(frozen=True)
class QuantizedPolicy:
    """What is compiled once.

    Attributes:
        policy: The model, the method and the number of kept tokens.
        pruner: Sizes of the method.
        weights: Type of the stored kernels.
        activations: Type that the inputs of linear layers are rounded to, each token by its own
            scale, so that the product is one of eight-bit numbers; None leaves them as they are.

    Raises:
        UserError: Weights and activations are of two types, whose product no device has.
    """

    policy: DrivingPolicy
    pruner: ReconPrunerConfig
    weights: QType = "int8"
    activations: QType | None = None

    def __post_init__(self):
        if self.activations not in (None, self.weights):
            raise UserError(
                f"activations={self.activations} must be the type of the weights, {self.weights}, "
                "or None."
            )


def quantize_params(quantized: QuantizedPolicy, params: dict) -> dict[str, jax.Array]:
    """Flat tensors of {"vla": ..., "pruner": ...} with the kernels in eight bits.

    Raises:
        UserError: qwix is not installed.
    """
    qwix, shapes = need_qwix(), _abstract(quantized)
    with _quiet():
        trees = {name: qwix.quantize_params(params[name], shapes[name]) for name in shapes}
    return dict(_leaves(trees))


def quantized_plan(
    quantized: QuantizedPolicy,
) -> Callable[[dict[str, jax.Array], jax.Array, jax.Array, jax.Array], Plan]:
    """`(tensors, images, speed, command)` to the plan: pure, to be jitted.

    Raises:
        UserError: qwix is not installed.
    """
    qwix, shapes = need_qwix(), _abstract(quantized)
    names = [name for name, _ in _leaves(shapes)]
    structure = jax.tree.structure(shapes)
    program = qwix.quantize_model(_Program(quantized.policy), _provider(quantized))

    def run(tensors, images, speed, command):
        params = jax.tree.unflatten(structure, [tensors[name] for name in names])
        with _quiet():
            return program.apply({}, params, images, speed, command)

    return run


def quantized_scores(
    quantized: QuantizedPolicy,
) -> Callable[[dict[str, jax.Array], jax.Array], jax.Array]:
    """`(tensors, tokens [B, N, D])` to the pruner's scores [B, N]; of a pruner without rope.

    Raises:
        UserError: qwix is not installed.
    """
    qwix, shapes = need_qwix(), _abstract(quantized)["pruner"]
    names = [f"pruner{SEPARATOR}{name}" for name, _ in _leaves(shapes)]
    structure = jax.tree.structure(shapes)
    module = qwix.quantize_model(ReconPruner(quantized.pruner), _provider(quantized))

    def run(tensors, tokens):
        params = jax.tree.unflatten(structure, [tensors[name] for name in names])
        with _quiet():
            return module.apply({"params": params}, tokens)

    return run


def write_quantized(folder: Path, quantized: QuantizedPolicy, params: dict) -> Path:
    """Writes the bundle of a policy with its kernels in eight bits; see `write_bundle`.

    Raises:
        UserError: qwix is not installed, the weights are of fp8, or the folder cannot be written.
    """
    if quantized.weights != "int8":
        raise UserError(
            f"weights={quantized.weights} cannot be kept in a bundle, for the JAX reader of "
            "safetensors 0.8 does not know the type; use int8, or quantize when loading."
        )
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
) -> tuple[QuantizedPolicy, dict[str, jax.Array]]:
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


class _Program(nn.Module):
    """`plan` in a module, since that is what qwix takes the place of products in.

    It declares nothing itself; compact, for `plan` makes modules.
    """

    policy: DrivingPolicy

    @nn.compact
    def __call__(self, params, images, speed, command):
        return plan(self.policy, params, images, speed, command)


def need_qwix() -> Any:
    """The library, which is not part of the core install.

    Raises:
        UserError: It is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise UserError(
            "Eight-bit weights need qwix; install the extra: pip install 'fastdrive-jax[export]'."
        ) from error
    return qwix


def _provider(quantized: QuantizedPolicy) -> Any:
    qwix = need_qwix()
    rule = qwix.QuantizationRule(
        module_path=LINEAR, weight_qtype=quantized.weights, act_qtype=quantized.activations
    )
    return qwix.PtqProvider([rule])


def _abstract(quantized: QuantizedPolicy) -> dict:
    """Shapes of the quantized parameters, as qwix's own tree."""
    qwix, provider, model = need_qwix(), _provider(quantized), quantized.policy.model
    config = model.config
    images = jax.ShapeDtypeStruct((1, len(config.cameras), *config.image_size, 3), jnp.uint8)
    ids = jax.ShapeDtypeStruct((1, config.vocabulary.plan_length), jnp.int32)
    prompt = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    tokens = jax.ShapeDtypeStruct((1, config.visual_tokens, config.text.hidden_size), jnp.float32)
    places = jax.ShapeDtypeStruct((3, 1, config.visual_tokens), jnp.int32)
    vla = qwix.quantize_model(model, provider)
    pruner = qwix.quantize_model(ReconPruner(quantized.pruner), provider)
    key = jax.random.key(0)
    with _quiet():
        return {
            "vla": jax.eval_shape(vla.init, key, images, prompt, ids)["params"],
            "pruner": jax.eval_shape(pruner.init, key, tokens, places)["params"],
        }


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves in their order with our names: qwix's wrapper `array` around a kernel has none."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator=SEPARATOR).replace("/array/", "/"), leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def _quiet() -> warnings.catch_warnings:
    """Flax warns of a class of NNX that qwix imports."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)
