"""The frozen encoders in front of a pruner, by name, from weights on the disk to visual tokens."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.features import TokenEncoder
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.dinov2.tokens import encode_pictures as encode_dinov2
from fastdrive_jax.models.dinov2.weights import load_dinov2, params_digest
from fastdrive_jax.models.qwen2_5_vl.alignment import align_hidden, aligned_config
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla
from fastdrive_jax.models.qwen2_5_vl.checkpoint import checkpoint_digest, load
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.parallel.mesh import batch_sharding, replicated_sharding
from fastdrive_jax.parallel.rules import tree_shardings
from fastdrive_jax.training.picture_loss import encode_pictures

EncoderName = Literal["dinov2", "tiny_vla", "qwen2_5_vl"]


@dataclass(frozen=True)
class FrozenEncoder:
    """A frozen encoder of pictures.

    Attributes:
        digest: Of everything that its tokens depend on besides the picture.
        dim: Token size D.
        apply: `(params, uint8 [B, H, W, 3])` to tokens [B, N, D]; pure.
        params: On the devices.
    """

    digest: str
    dim: int
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any

    def tokens(self, mesh: Mesh | None = None) -> TokenEncoder:
        """The same with its parameters, for caches of tokens; batches are split over a mesh."""
        encode = partial(jax.jit(self.apply), self.params)
        if mesh is None:
            return TokenEncoder(self.digest, self.dim, encode)
        place = batch_sharding(mesh)
        return TokenEncoder(self.digest, self.dim, lambda x: encode(jax.device_put(x, place)))


def load_encoder(
    name: EncoderName,
    weights: Path | None,
    mesh: Mesh,
    dtype: jnp.dtype = jnp.float32,
    quiet: bool = False,
) -> FrozenEncoder:
    """An encoder whose parameters lie over a mesh.

    Args:
        name: "dinov2" (ViT-S/14, 2 x 2 patches averaged), "tiny_vla", the driving VLA that comes
            with the package, or "qwen2_5_vl", the vision encoder of such a checkpoint.
        weights: DINOv2's weights, a file of the tiny VLA or the folder of the checkpoint; None
            takes those of a package, which the last does not have.
        mesh: Where the parameters go.
        dtype: Of a Qwen2.5-VL's parameters and arithmetic; the others compute in float32.
        quiet: No progress bar.

    Raises:
        UserError: There are no such weights, or they do not fit.
    """
    if name == "qwen2_5_vl":
        if weights is None:
            raise UserError("A Qwen2.5-VL encoder needs --weights, the folder of its checkpoint.")
        return _qwen(weights, mesh, dtype, quiet)
    if name == "dinov2":
        model, params = load_dinov2(weights)
        digest = hashlib.sha256(f"dinov2 mean {params_digest(params)}".encode()).hexdigest()
        apply, dim = partial(encode_dinov2, model, merge="mean"), model.config.hidden_size
    else:
        encoder = frozen_vla(*load_vla(weights))
        digest, dim, apply, params = encoder.digest, encoder.dim, encoder.apply, encoder.params
    return FrozenEncoder(digest, dim, apply, jax.device_put(params, replicated_sharding(mesh)))


def frozen_vla(model: DrivingVLA, params: dict) -> FrozenEncoder:
    """The vision encoder of a tiny driving VLA, for single pictures."""
    digest = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(params["visual"]):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return FrozenEncoder(
        digest=f"vla {digest.hexdigest()}",
        dim=model.config.text.hidden_size,
        apply=partial(_encode_by_vla, model),
        params={"visual": params["visual"]},
    )


def _encode_by_vla(model: DrivingVLA, params: dict, images: jax.Array) -> jax.Array:
    return model.apply({"params": params}, images[:, None], method="encode")


def _qwen(folder: Path, mesh: Mesh, dtype: jnp.dtype, quiet: bool) -> FrozenEncoder:
    model, params = load(folder, mesh, dtype, not quiet, parts=("visual",))
    align = partial(align_hidden, config=model.vision)
    places = tree_shardings(jax.eval_shape(align, params["visual"]), mesh)
    visual = jax.jit(align, out_shardings=places)(params["visual"])
    config = aligned_config(model.vision)
    return FrozenEncoder(
        digest=qwen_digest(folder, dtype),
        dim=config.out_hidden_size,
        apply=partial(encode_pictures, config=config, dtype=dtype),
        params=visual,
    )


def qwen_digest(folder: Path, dtype: jnp.dtype | str) -> str:
    """What the tokens of a Qwen2.5-VL's encoder depend on besides the picture; see `load`.

    Args:
        folder: Of the checkpoint.
        dtype: See `load_encoder`.
    """
    return f"qwen2_5_vl {jnp.dtype(dtype).name} {checkpoint_digest(folder, ('visual',))}"
