"""Names and layouts of published tensors, and their places among our parameters.

A table holds, for every tensor that is read, where it belongs and the shape that it has on file.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig

Place = tuple[str, ...]
Table = dict[str, tuple[Place, tuple[int, ...]]]


def fit_table(
    shapes: Mapping[str, tuple[int, ...]],
    table: Table,
    ours: Collection[Place],
    model: str,
    canonical: Callable[[str], str] = lambda name: name,
    unused: Callable[[str], bool] = lambda name: False,
) -> dict[str, Place]:
    """The place among our parameters of every given tensor; one that is not used has none.

    Args:
        shapes: Tensor names and their shapes on file.
        table: What is read.
        ours: All places of the model.
        model: What it is, for the error.
        canonical: A tensor's name to that in the table.
        unused: Whether a tensor of this canonical name may be there without a place.

    Raises:
        UserError: Names the doubled, unmapped, unfilled and misshapen tensors, all at once.
    """
    if set(ours) != {place for place, _ in table.values()}:
        raise ValueError("the name table does not cover the model")
    names: dict[str, str] = {}
    doubled = []
    for name in shapes:
        own = canonical(name)
        if own in names:
            doubled.append(own)
        names[own] = name
    faults = {
        "given twice": sorted(doubled),
        "unmapped": sorted(name for name in names if name not in table and not unused(name)),
        "unfilled": sorted(set(table) - set(names)),
        "misshapen": sorted(
            f"{name} {tuple(shapes[names[name]])}, not {shape}"
            for name, (_, shape) in table.items()
            if name in names and tuple(shapes[names[name]]) != shape
        ),
    }
    if any(faults.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise UserError(f"The weights do not fit {model}: {found}.")
    return {names[name]: place for name, (place, _) in table.items()}


def to_linen(value: np.ndarray, place: Place) -> np.ndarray:
    """A tensor in our layout: PyTorch keeps kernels [out, in], a patch convolution [out, in...]."""
    return value.reshape(len(value), -1).T if place[-1] == "kernel" else value


def from_linen(value: np.ndarray, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter in PyTorch's layout; the inverse of `to_linen`."""
    value = value.T if place[-1] == "kernel" else value
    return np.ascontiguousarray(value).reshape(shape)


def dense(name: str, place: Place, out: int, into: int, bias: bool = True) -> Table:
    """A linear layer."""
    table = {f"{name}.weight": ((*place, "kernel"), (out, into))}
    return table | ({f"{name}.bias": ((*place, "bias"), (out,))} if bias else {})


def norm(name: str, place: Place, size: int, bias: bool = False) -> Table:
    """A norm; RMS norms have no bias."""
    table = {f"{name}.weight": ((*place, "scale"), (size,))}
    return table | ({f"{name}.bias": ((*place, "bias"), (size,))} if bias else {})


def feed_forward(name: str, place: Place, size: int, inner: int, bias: bool = False) -> Table:
    """A gated feed-forward part."""
    table = {}
    for part in ("gate_proj", "up_proj"):
        table |= dense(f"{name}.{part}", (*place, part), inner, size, bias)
    return table | dense(f"{name}.down_proj", (*place, "down_proj"), size, inner, bias)


def decoder_table(config: DecoderConfig, source: str, head: str) -> Table:
    """The language decoder.

    Args:
        config: Sizes.
        source: What its tensors' names begin with.
        head: Name of the output head, which is not read where it is the embedding table.
    """
    size, root = config.hidden_size, ("language_model",)
    vocabulary = (config.vocab_size, size)
    table = {f"{source}.embed_tokens.weight": ((*root, "embed_tokens", "embedding"), vocabulary)}
    table |= norm(f"{source}.norm", (*root, "norm"), size)
    if not config.tie_word_embeddings:
        table[head] = ((*root, "lm_head", "kernel"), vocabulary)
    queries, keys = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    for number in range(config.num_layers):
        block, layer = f"{source}.layers.{number}", (*root, f"layers_{number}")
        for part in ("input_layernorm", "post_attention_layernorm"):
            table |= norm(f"{block}.{part}", (*layer, part), size)
        name, place = f"{block}.self_attn", (*layer, "self_attn")
        for part, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            table |= dense(f"{name}.{part}", (*place, part), out, size, config.attention_bias)
        table |= dense(f"{name}.o_proj", (*place, "o_proj"), size, queries, False)
        table |= feed_forward(f"{block}.mlp", (*layer, "mlp"), size, config.intermediate_size)
    return table
