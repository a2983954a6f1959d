"""Sizes of pi0 (arXiv 2410.24164), published and tiny, as frozen values."""

from dataclasses import dataclass, replace

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.vit_config import ViTConfig

_HALF = (0.5, 0.5, 0.5)
_SHARED = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "rope_theta")


@dataclass(frozen=True)
class Pi0Config:
    """A pi0: PaliGemma reads pictures and prompt, an action expert turns noise into actions.

    Attributes:
        vision: SigLIP.
        prefix: The decoder of pictures and prompt.
        expert: The decoder of state and actions, as deep as the other and with the same heads. It
            has no embedding table, so its `vocab_size` means nothing.
        views: V, pictures of a sample.
        action_dim: A, numbers of a state and of an action; robots with fewer are padded to it.
        horizon: H, actions of a chunk.
        flow_steps: Steps from noise to actions.
    """

    vision: ViTConfig
    prefix: DecoderConfig
    expert: DecoderConfig
    views: int = 3
    action_dim: int = 32
    horizon: int = 50
    flow_steps: int = 10

    def __post_init__(self):
        unlike = [
            f"{name} ({getattr(self.prefix, name)} and {getattr(self.expert, name)})"
            for name in _SHARED
            if getattr(self.prefix, name) != getattr(self.expert, name)
        ]
        if unlike:
            raise UserError(
                "The action expert reads the prefix's keys and values layer by layer, so they must "
                f"not differ in {', '.join(unlike)}."
            )
        if min(self.views, self.action_dim, self.horizon, self.flow_steps) < 1:
            raise UserError(
                f"views={self.views}, action_dim={self.action_dim}, horizon={self.horizon} and "
                f"flow_steps={self.flow_steps} must be at least 1."
            )
        if self.expert.hidden_size % 2:
            raise UserError(
                f"The expert's hidden_size={self.expert.hidden_size} must be even: the flow time "
                "is embedded in as many sines as cosines."
            )

    @property
    def token_grid(self) -> tuple[int, int]:
        """Token rows and columns of one view."""
        return self.vision.grid

    @property
    def visual_tokens(self) -> int:
        """N, visual tokens of a sample."""
        rows, columns = self.token_grid
        return self.views * rows * columns

    @property
    def image_size(self) -> int:
        """Pixels along a picture."""
        return self.vision.image_size

    @property
    def room(self) -> int:
        """Tokens behind the prefix: the state and the actions."""
        return 1 + self.horizon


_SIGLIP_SO400M = ViTConfig(
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    image_size=224,
    class_token=False,
    layer_scale=False,
    activation="gelu_tanh",
    mean=_HALF,
    std=_HALF,
)
_GEMMA_2B = DecoderConfig(
    hidden_size=2048,
    intermediate_size=16_384,
    num_layers=18,
    num_heads=8,
    num_kv_heads=1,
    vocab_size=257_152,
    rope_theta=10_000.0,
    mrope_section=(128, 0, 0),
    attention_bias=False,
    activation="gelu_tanh",
    head_size=256,
)
_GEMMA_300M = replace(_GEMMA_2B, hidden_size=1024, intermediate_size=4096)

PI0 = Pi0Config(_SIGLIP_SO400M, _GEMMA_2B, _GEMMA_300M)

# Small enough to train on two CPU cores.
_TINY_SIGLIP = replace(
    _SIGLIP_SO400M,
    depth=4,
    hidden_size=64,
    intermediate_size=256,
    num_heads=4,
    patch_size=8,
    image_size=96,
)
_TINY_PREFIX = replace(
    _GEMMA_2B,
    hidden_size=128,
    intermediate_size=384,
    num_layers=5,
    num_heads=4,
    vocab_size=512,
    mrope_section=(16, 0, 0),
    head_size=32,
)
TINY_PI0 = Pi0Config(
    _TINY_SIGLIP,
    _TINY_PREFIX,
    replace(_TINY_PREFIX, hidden_size=96, intermediate_size=256),
    views=2,
    action_dim=8,
    horizon=8,
)
