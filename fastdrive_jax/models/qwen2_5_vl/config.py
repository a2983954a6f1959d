"""Sizes of Qwen2.5-VL, published and tiny, as frozen values."""

from dataclasses import dataclass, field

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig


@dataclass(frozen=True)
class VisionConfig:
    """The vision encoder; defaults are those of Qwen2.5-VL-3B.

    Attributes:
        depth: Transformer blocks.
        hidden_size: Width of a patch.
        intermediate_size: Width of the feed-forward part.
        num_heads: Attention heads.
        out_hidden_size: D, width of a merged token; the decoder's hidden size.
        patch_size: Patch edge in pixels.
        temporal_patch_size: Frames of a patch; a single picture is repeated.
        spatial_merge_size: Patches merged along each axis into one token.
        window_size: Edge of an attention window in pixels.
        fullatt_block_indexes: Blocks that attend over the whole picture.
        rope_theta: Base of the 2-D rotary angles.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 2048
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10_000.0

    def __post_init__(self):
        if self.window_size % self.token_pixels:
            raise UserError(
                f"window_size={self.window_size} must be a multiple of the {self.token_pixels} "
                "pixels of a token."
            )

    @property
    def token_pixels(self) -> int:
        """Edge in pixels of the square that one visual token covers."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class QwenVLConfig:
    """A whole Qwen2.5-VL, defaults those of the published 3B model.

    Attributes:
        vision: Vision encoder.
        text: Language decoder.
        image_token_id: Id that stands for each visual token in the text.
        vision_start_token_id: Id in front of a picture.
        vision_end_token_id: Id behind a picture.
        eos_token_ids: Ids that end an answer.
        pad_token_id: Id that fills up a batch.
    """

    vision: VisionConfig = VisionConfig()
    text: DecoderConfig = field(default_factory=DecoderConfig)
    image_token_id: int = 151_655
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653
    eos_token_ids: tuple[int, ...] = (151_645, 151_643)
    pad_token_id: int = 151_643

    def __post_init__(self):
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise UserError(
                f"vision.out_hidden_size={self.vision.out_hidden_size} must be the decoder's "
                f"hidden_size={self.text.hidden_size}."
            )


QWEN2_5_VL_3B = QwenVLConfig()
QWEN2_5_VL_7B = QwenVLConfig(
    vision=VisionConfig(out_hidden_size=3584),
    text=DecoderConfig(
        hidden_size=3584,
        intermediate_size=18_944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        vocab_size=152_064,
        tie_word_embeddings=False,
    ),
)

# Small enough to train on two CPU cores; one full-attention block in four, as published.
TINY_VISION = VisionConfig(
    depth=4,
    hidden_size=64,
    intermediate_size=176,
    num_heads=2,
    out_hidden_size=128,
    fullatt_block_indexes=(3,),
)
TINY_DECODER = DecoderConfig(
    hidden_size=128,
    intermediate_size=384,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=256,
    rope_theta=10_000.0,
    mrope_section=(4, 6, 6),
)
