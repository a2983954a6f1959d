"""Pictures as the published Qwen2.5-VL processor prepares them.

The host only resizes and orders pixels: patch rows stay uint8, a quarter of the bytes to send, and
are normalised on the device (`patches.normalise`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import read_json
from fastdrive_jax.models.qwen2_5_vl.patches import IMAGE_MEAN, IMAGE_STD, patch_rows
from fastdrive_jax.models.resize import resize_bicubic

PROCESSOR_FILE = "preprocessor_config.json"
MAX_ASPECT = 200  # of the published processor


@dataclass(frozen=True)
class ImageProcessorConfig:
    """What a picture is resized to, defaults those of the published checkpoints.

    Attributes:
        min_pixels: A smaller picture is enlarged to this area.
        max_pixels: A larger picture is shrunk to this area.
        patch_size: Patch edge in pixels.
        merge_size: Patches merged along each axis into one token.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16_384
    patch_size: int = 14
    merge_size: int = 2

    def __post_init__(self):
        if not 0 < self.min_pixels <= self.max_pixels:
            raise UserError(
                f"min_pixels={self.min_pixels} and max_pixels={self.max_pixels} must be positive "
                "and in this order."
            )

    @property
    def token_pixels(self) -> int:
        """Edge in pixels of the square that one visual token covers."""
        return self.patch_size * self.merge_size


def read_image_processor(checkpoint_dir: Path) -> ImageProcessorConfig:
    """The setting in a checkpoint's `preprocessor_config.json`.

    Raises:
        UserError: The file is missing or damaged, or normalises in another way than published.
    """
    path = Path(checkpoint_dir) / PROCESSOR_FILE
    content = read_json(path)
    for name, ours in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
        if name in content and not np.allclose(content[name], ours, atol=1e-6):
            raise UserError(f"{path} has {name}={content[name]}; only {ours.tolist()} is built in.")
    size = content.get("size") or {}
    default = ImageProcessorConfig()
    return ImageProcessorConfig(
        min_pixels=content.get("min_pixels") or size.get("shortest_edge", default.min_pixels),
        max_pixels=content.get("max_pixels") or size.get("longest_edge", default.max_pixels),
        patch_size=content.get("patch_size", default.patch_size),
        merge_size=content.get("merge_size", default.merge_size),
    )


def smart_resize(
    height: int, width: int, config: ImageProcessorConfig = ImageProcessorConfig()
) -> tuple[int, int]:
    """The height and width made of whole tokens, of about the same shape, within the area bounds.

    Raises:
        UserError: The picture is empty, or more than 200 times as long as wide.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"A picture of {height} x {width} pixels cannot be resized to tokens; its longer side "
            f"may be at most {MAX_ASPECT} times the shorter one."
        )
    edge, sides = config.token_pixels, (height, width)
    rows, columns = (round(side / edge) * edge for side in sides)
    if rows * columns > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        rows, columns = (max(edge, math.floor(side / shrink / edge) * edge) for side in sides)
    elif rows * columns < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / edge) * edge for side in sides)
    return rows, columns


def resize_picture(
    picture: UInt8[np.ndarray, "H W 3"] | Image.Image,
    config: ImageProcessorConfig = ImageProcessorConfig(),
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture at the size of `smart_resize`, bicubic, with Pillow's pixels.

    Args:
        picture: uint8 [H, W, 3] in RGB, or a Pillow picture of any mode.
        config: Bounds.

    Raises:
        UserError: The picture is none.
    """
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(
                f"A picture of {picture.dtype} {picture.shape} is not uint8 [H, W, 3]; convert it."
            )
        if not picture.size:
            raise UserError(f"A picture of {picture.shape} holds no pixel.")
    else:
        picture = np.asarray(picture.convert("RGB"))
    return resize_bicubic(picture, smart_resize(*picture.shape[:2], config))


def process_pictures(
    pictures: Sequence[UInt8[np.ndarray, "H W 3"] | Image.Image],
    config: ImageProcessorConfig = ImageProcessorConfig(),
) -> tuple[list[UInt8[np.ndarray, "P pixels"]], list[tuple[int, int]]]:
    """Patch rows and patch grid of each picture, which may differ in size.

    Args:
        pictures: See `resize_picture`.
        config: Bounds.

    Returns:
        uint8 [P, 3 * 14 * 14] for each picture, in merge-block order, and its (rows, columns) of
        patches.

    Raises:
        UserError: There is no picture, or one is none.
    """
    if not pictures:
        raise UserError("There is no picture in the batch; give at least one.")
    rows, grids = [], []
    for picture in pictures:
        resized = resize_picture(picture, config)
        rows.append(patch_rows(resized[None], config.patch_size, config.merge_size)[0])
        height, width = resized.shape[:2]
        grids.append((height // config.patch_size, width // config.patch_size))
    return rows, grids
