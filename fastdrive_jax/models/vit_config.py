"""Sizes of a plain vision transformer, of any model that shares its code."""

from dataclasses import dataclass
from typing import Literal

from fastdrive_jax.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViTConfig:
    """A pre-norm vision transformer; defaults are DINOv2's ViT-S/14 (Oquab et al. 2023, table 17).

    Attributes:
        depth: Transformer blocks.
        hidden_size: D.
        intermediate_size: F.
        num_heads: Q; D / Q is the head size.
        patch_size: Pixels along a patch.
        image_size: Pixels along the square picture that the stored position embeddings belong to.
        class_token: Whether a learned token stands before the patches.
        registers: Learned tokens between that one and the patches (Darcet et al. 2024).
        layer_scale: Whether what a block adds is scaled per channel.
        layer_norm_eps: Added to the variance.
        activation: Of the MLP: GELU itself, or its tanh form.
        mean: Of the red, green and blue that it was trained on, in [0, 1].
        std: The same for their deviation.
    """

    depth: int = 12
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_heads: int = 6
    patch_size: int = 14
    image_size: int = 518
    class_token: bool = True
    registers: int = 0
    layer_scale: bool = True
    layer_norm_eps: float = 1e-6
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size}."
            )
        if self.image_size % self.patch_size:
            raise UserError(
                f"patch_size={self.patch_size} must divide image_size={self.image_size}."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of a picture of `image_size`."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches."""
        return int(self.class_token) + self.registers
