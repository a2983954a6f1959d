"""Sizes of a DINOv2 encoder."""

from dataclasses import dataclass

PATCH_PIXELS = 14


@dataclass(frozen=True)
class Dinov2Config:
    """A plain (MLP, no registers) DINOv2; the defaults are ViT-S/14 (Oquab et al. 2023, table 17).

    Attributes:
        hidden_size: D.
        num_layers: Transformer blocks.
        num_heads: Q; D / Q is the head size.
        mlp_ratio: F / D.
        patch_size: Pixels along a patch.
        position_grid: Patches along the square grid of the stored position embeddings.
        layer_norm_eps: Added to the variance.
    """

    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_ratio: int = 4
    patch_size: int = PATCH_PIXELS
    position_grid: int = 37
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(f"{self.hidden_size} is not divisible by {self.num_heads} heads")
