"""ReconPruner (FastDriveVLA, section 3.2): one decoder layer over query and tokens, one scorer.

`[Q*, V*] = PrunerLayer([Q, V])`, `S = w^T (V* . Q*)`. It is trained by `training.reconstruction`.
"""

import functools
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastdrive_jax.models.decoder import DecoderLayer, mrope_angles
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.pruning.interface import Pruner


@dataclass(frozen=True)
class ReconPrunerConfig:
    """Sizes of a ReconPruner; the default is that of the 3B model: 77,081,088 parameters.

    Attributes:
        layer: Of the PrunerLayer; `hidden_size` is the token size D (`num_layers` and
            `vocab_size` are not used).
        rope: Turn queries and keys by the tokens' M-RoPE ids. The paper does not say.
        query_std: Of the query's normal initialisation.
        input_norm: Bring each token to unit root mean square before the layer. A frozen encoder's
            raw scale may be far from what the layer's fresh weights expect; not in the paper, so
            off in the faithful setting.
    """

    layer: DecoderConfig = DecoderConfig()
    rope: bool = False
    query_std: float = 0.02
    input_norm: bool = False


class ReconPruner(nn.Module):
    """Scores of visual tokens.

    Attributes:
        config: Sizes.
    """

    config: ReconPrunerConfig

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B N D"],
        position_ids: Int[Array, "3 B N"] | None = None,
        count: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B N"]:
        """Scores S [B, N]; positive means foreground in the faithful training mode.

        Args:
            tokens: Visual tokens V.
            position_ids: Needed with `config.rope`; the query stands at 0, 0, 0.
            count: Real tokens, which come first; None means all.
        """
        config = self.config
        batch, _, dim = tokens.shape
        if dim != config.layer.hidden_size:
            raise ValueError(f"tokens of size {dim}, but the layer has {config.layer.hidden_size}")
        if config.input_norm:
            square = jnp.mean(jnp.square(tokens.astype(jnp.float32)), axis=-1, keepdims=True)
            tokens = (tokens / jnp.sqrt(square + config.layer.rms_norm_eps)).astype(tokens.dtype)
        query = self.param("query", nn.initializers.normal(config.query_std), (dim,))
        query = jnp.broadcast_to(query.astype(tokens.dtype), (batch, 1, dim))
        angles = None
        if config.rope:
            if position_ids is None:
                raise ValueError("a ReconPruner with rope needs position_ids")
            # In front, as in the paper; without a causal mask its place in the row is no position.
            angles = mrope_angles(config.layer, jnp.pad(position_ids, ((0, 0), (0, 0), (1, 0))))
        layer = DecoderLayer(config.layer, causal=False, name="layer")
        lengths = None if count is None else count + 1
        mixed, _ = layer(jnp.concatenate([query, tokens], axis=1), angles, lengths=lengths)
        products = mixed[:, 1:] * mixed[:, :1]
        return nn.Dense(1, use_bias=False, name="scorer")(products)[..., 0]


@functools.cache  # one object for equal configs: programs are known by their method
def recon_pruner(config: ReconPrunerConfig) -> Pruner:
    """A trained ReconPruner as a method; its params are those of the module ("params" collection).

    Args:
        config: Of the trained module.
    """
    module = ReconPruner(config)
    needs = {"tokens", "position_ids"} if config.rope else {"tokens"}
    return Pruner(
        name="reconpruner",
        score=lambda params, inputs, key: module.apply(
            {"params": params}, inputs.tokens, inputs.position_ids, inputs.count
        ),
        needs=frozenset(needs),
    )
