"""Picture preparation of SAM 2 and SAM 3 by Pillow. Imports transformers; import it late.

transformers has these two with torchvision only, which is one more compiled package that must fit
torch. Both squeeze a picture into a square; they differ in the defaults that a checkpoint's
`preprocessor_config.json` may replace. Masks don't depend on what else is installed this way.
"""

from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
)


class Sam2PicturesPil(PilBackend):
    """What `Sam2ImageProcessor` makes of pictures: `pixel_values` float32 [B, 3, 1024, 1024]."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 1024, "width": 1024}  # noqa: RUF012, transformers' own form
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


class Sam3PicturesPil(Sam2PicturesPil):
    """What `Sam3ImageProcessor` makes of pictures: `pixel_values` float32 [B, 3, 1008, 1008]."""

    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 1008, "width": 1008}  # noqa: RUF012
