"""Random changes of a decoded example; every draw comes from the generator that is passed in."""

from dataclasses import dataclass

import numpy as np

from data_pipelines.schema import LEFT, RIGHT
from fastdrive_jax.errors import UserError

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 luma
_MIRRORED = ("image", "mask", "labels")


@dataclass(frozen=True)
class ColorJitter:
    """Largest relative change of each: 0.2 draws a factor from [0.8, 1.2].

    Attributes:
        brightness: Of the factor on all values.
        contrast: Of the distance to the picture's mean grey.
        saturation: Of the distance to each pixel's own grey.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"{name}={getattr(self, name)} of the colour jitter is outside [0, 1)."
                )

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return bool(self.brightness or self.contrast or self.saturation)


NO_JITTER = ColorJitter()


def jitter_colors(image: np.ndarray, jitter: ColorJitter, rng: np.random.Generator) -> np.ndarray:
    """Image uint8 [..., H, W, 3] with brightness, contrast and saturation changed by one draw."""
    brightness, contrast, saturation = (
        np.float32(rng.uniform(1 - width, 1 + width))
        for width in (jitter.brightness, jitter.contrast, jitter.saturation)
    )
    values = image.astype(np.float32) * brightness
    mean = (values @ _GREY).mean(dtype=np.float32)
    values = mean + (values - mean) * contrast
    grey = (values @ _GREY)[..., None]
    values = grey + (values - grey) * saturation
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def mirror(example: dict) -> dict:
    """Swaps left and right in pictures, waypoints and command; only what the example has.

    Args:
        example: image [..., H, W, 3], mask and labels [..., H, W]; perhaps future [6, 2], command.
    """
    out = dict(example)
    for key in _MIRRORED:
        if key in out:
            axis = -2 if key == "image" else -1
            out[key] = np.ascontiguousarray(np.flip(out[key], axis))
    if "future" in out:
        out["future"] = out["future"] * np.array([1, -1], np.float32)
    if "command" in out:
        swap = {LEFT: RIGHT, RIGHT: LEFT}
        out["command"] = np.int32(swap.get(int(out["command"]), int(out["command"])))
    return out
