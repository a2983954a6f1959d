"""Sizes of driving VLAs by name: published, tiny, and two narrow ones of published depth.

ReconPruner is one decoder layer over all tokens, so its share of a prefill is about one in as many
layers as the model has: a shallow model would bound the speed-up by arithmetic. "100m" and "1b"
have the 3B model's 36 decoder layers, 32 vision blocks and shapes, at narrower widths.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import (
    QWEN2_5_VL_3B,
    QWEN2_5_VL_7B,
    TINY_DECODER,
    TINY_VISION,
    VisionConfig,
)
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig

ModelName = Literal["tiny", "100m", "1b", "3b", "7b"]
CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_LEFT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)

MODELS: Mapping[ModelName, tuple[VisionConfig, DecoderConfig]] = MappingProxyType(
    {
        "tiny": (TINY_VISION, TINY_DECODER),
        "100m": (
            VisionConfig(hidden_size=256, intermediate_size=684, num_heads=4, out_hidden_size=320),
            DecoderConfig(
                hidden_size=320,
                intermediate_size=1720,
                num_heads=5,
                num_kv_heads=1,
                vocab_size=32_000,
                mrope_section=(8, 12, 12),
            ),
        ),
        "1b": (
            VisionConfig(
                hidden_size=640, intermediate_size=1710, num_heads=8, out_hidden_size=1024
            ),
            DecoderConfig(hidden_size=1024, intermediate_size=5504, num_heads=8, num_kv_heads=1),
        ),
        "3b": (QWEN2_5_VL_3B.vision, QWEN2_5_VL_3B.text),
        "7b": (QWEN2_5_VL_7B.vision, QWEN2_5_VL_7B.text),
    }
)


def driving_config(
    name: ModelName, image_size: tuple[int, int] = (1596, 1596), cameras: int = 1
) -> DrivingConfig:
    """The VLA called `name`.

    Args:
        name: Of `MODELS`.
        image_size: Height and width of each picture; 1596 x 1596 is 3,249 visual tokens.
        cameras: Pictures of a sample.

    Raises:
        UserError: The size is not made of whole tokens, or there are not so many cameras.
    """
    vision, text = MODELS[name]
    edge = vision.token_pixels
    if any(side < edge or side % edge for side in image_size):
        raise UserError(
            f"image_size={image_size[0]} x {image_size[1]} is not made of {edge} x {edge} tokens; "
            f"take multiples of {edge}."
        )
    if not 1 <= cameras <= len(CAMERAS):
        raise UserError(f"cameras={cameras} must be 1 to {len(CAMERAS)}.")
    return DrivingConfig(vision, text, image_size=image_size, cameras=CAMERAS[:cameras])
