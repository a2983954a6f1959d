"""Kernels of linear layers in eight bits by qwix (extra `export`), whatever model they are of.

Every column of a kernel has its own scale. Biases, norms and embeddings stay as they are, and so do
the products within attention. By flat name a kernel is "NAME/kernel/qvalue" and
"NAME/kernel/scale".
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax

from fastdrive_jax.errors import UserError
from fastdrive_jax.export.trees import SEPARATOR

LINEAR = (
    r".*(_proj|qkv|attn/proj|mlp_\d|scorer)"  # paths of the modules whose kernels are quantized
)
QType = Literal["int8", "float8_e4m3fn"]
Tensors = dict[str, jax.Array]


@dataclass(frozen=True)
class EightBits:
    """How numbers are rounded.

    Attributes:
        weights: Type of the stored kernels.
        activations: Type that the inputs of linear layers are rounded to, each token by its own
            scale, so that the product is one of eight-bit numbers; None leaves them as they are.

    Raises:
        UserError: Weights and activations are of two types, whose product no device has.
    """

    weights: QType = "int8"
    activations: QType | None = None

    def __post_init__(self):
        if self.activations not in (None, self.weights):
            raise UserError(
                f"activations={self.activations} must be the type of the weights, {self.weights}, "
                "or None."
            )


@dataclass(frozen=True)
class Part:
    """One of the trees of a model's parameters.

    Attributes:
        module: Whose parameters they are.
        example: Shapes of its inputs.
    """

    module: nn.Module
    example: Sequence[Any]


def rounded_shapes(parts: Mapping[str, Part], bits: EightBits) -> dict:
    """Shapes of the rounded parameters, as qwix's own trees.

    Raises:
        UserError: qwix is not installed.
    """
    qwix, provider, key = need_qwix(), _provider(bits), jax.random.key(0)
    with _quiet():
        return {
            name: jax.eval_shape(
                qwix.quantize_model(part.module, provider).init, key, *part.example
            )["params"]
            for name, part in parts.items()
        }


def round_params(parts: Mapping[str, Part], bits: EightBits, params: dict) -> Tensors:
    """Flat tensors of the parameters with the kernels in eight bits.

    Args:
        parts: By the names in `params`.
        bits: How.
        params: Of the model.

    Raises:
        UserError: qwix is not installed.
    """
    qwix, shapes = need_qwix(), rounded_shapes(parts, bits)
    with _quiet():
        trees = {name: qwix.quantize_params(params[name], shapes[name]) for name in shapes}
    return dict(_leaves(trees))


def rounded_run(
    parts: Mapping[str, Part], bits: EightBits, run: Callable[..., Any]
) -> Callable[..., Any]:
    """`run(params, *inputs)` as a function of the flat tensors: pure, to be jitted.

    Raises:
        UserError: qwix is not installed.
    """
    qwix, shapes = need_qwix(), rounded_shapes(parts, bits)
    names = [name for name, _ in _leaves(shapes)]
    structure = jax.tree.structure(shapes)
    program = qwix.quantize_model(_Run(run), _provider(bits))

    def call(tensors, *inputs):
        params = jax.tree.unflatten(structure, [tensors[name] for name in names])
        with _quiet():
            return program.apply({}, params, *inputs)

    return call


class _Run(nn.Module):
    """A function in a module, since that is what qwix takes the place of products in.

    It declares nothing itself; compact, for the function makes modules.
    """

    run: Callable[..., Any]

    @nn.compact
    def __call__(self, params, *inputs):
        return self.run(params, *inputs)


def need_qwix() -> Any:
    """The library, which is not part of the core install.

    Raises:
        UserError: It is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise UserError(
            "Eight-bit weights need qwix; run `pip install -e '.[export]'` in the clone."
        ) from error
    return qwix


def check_kept(bits: EightBits) -> None:
    """Refuses weights that no bundle can keep.

    Raises:
        UserError: They are of fp8.
    """
    if bits.weights != "int8":
        raise UserError(
            f"weights={bits.weights} cannot be kept in a bundle, for the JAX reader of "
            "safetensors 0.8 does not know the type; use int8, or quantize when loading."
        )


def _provider(bits: EightBits) -> Any:
    qwix = need_qwix()
    rule = qwix.QuantizationRule(
        module_path=LINEAR, weight_qtype=bits.weights, act_qtype=bits.activations
    )
    return qwix.PtqProvider([rule])


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    """Leaves in their order with our names: qwix's wrapper `array` around a kernel has none."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator=SEPARATOR).replace("/array/", "/"), leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def _quiet() -> warnings.catch_warnings:
    """Flax warns of a class of NNX that qwix imports."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)
