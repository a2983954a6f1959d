"""Random changes of a decoded example; every draw comes from the generator that is passed in."""

from dataclasses import dataclass

import numpy as np

from data_pipelines.schema import LEFT, RIGHT, TOKEN_PIXELS
from fastdrive_jax.errors import UserError

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 luma
_MIRRORED = ("image", "mask", "labels")
_X_TURNED = np.array([-1, 1, 1, 1], np.float32)
_Y_TURNED = np.array([1, -1, 1, 1], np.float32)
_SIGNS = {  # what turns round when y does; rotation rates about x and z do, about y not
    "future": (1, -1),
    "history": (1, -1),
    "ego_state": (1, 1, -1),
    "can_bus": (1, 1, -1, 1, -1, 1, -1, -1),
    "agents": (1, -1, -1, 1, 1),
}


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


def mirrored_cameras(cameras: tuple[str, ...]) -> tuple[int, ...]:
    """For each camera the place of the one that it becomes in a mirror.

    Raises:
        UserError: A camera's counterpart is not among them.
    """
    names = [_counterpart(camera) for camera in cameras]
    if lacking := sorted(set(names) - set(cameras)):
        raise UserError(
            f"Samples of {', '.join(cameras)} cannot be flipped: in a mirror they would need "
            f"{', '.join(lacking)}; choose those too, or CAM_FRONT alone, or no flip."
        )
    return tuple(cameras.index(name) for name in names)


def _counterpart(camera: str) -> str:
    if camera.endswith("LEFT"):
        return camera.removesuffix("LEFT") + "RIGHT"
    return camera.removesuffix("RIGHT") + "LEFT" if camera.endswith("RIGHT") else camera


def mirror(
    example: dict, image_size: tuple[int, int], swapped: tuple[int, ...] | None = None
) -> dict:
    """The example in a world whose left and right have changed places; only what it has.

    Args:
        example: Fields of `examples`, without batch axis.
        image_size: Height and width in pixels.
        swapped: Of a sample, see `mirrored_cameras`; None of a picture.
    """
    out = dict(example)
    for key in _MIRRORED:
        if key in out:
            axis = -2 if key == "image" else -1
            out[key] = np.flip(out[key], axis)
    if "foreground" in out:
        rows, columns = (side // TOKEN_PIXELS for side in image_size)
        shares = out["foreground"].reshape(*out["foreground"].shape[:-1], rows, columns)
        out["foreground"] = shares[..., ::-1].reshape(out["foreground"].shape)
    if "intrinsic" in out:
        # What was u pixels from the left edge is u from the right one. Skew turns round too.
        turned = out["intrinsic"].copy()
        turned[..., 0, 1] *= -1
        turned[..., 0, 2] = image_size[1] - turned[..., 0, 2]
        out["intrinsic"] = turned
    if "camera_to_ego" in out:
        # Rotations stay rotations: the camera's x and the car's y both turn round.
        out["camera_to_ego"] = _Y_TURNED[:, None] * out["camera_to_ego"] * _X_TURNED
    if swapped is not None:
        order = list(swapped)
        for key in ("image", "mask", "labels", "foreground", "intrinsic", "camera_to_ego"):
            if key in out:
                out[key] = out[key][order]
    for key, signs in _SIGNS.items():
        if key in out:
            out[key] = out[key] * np.array(signs, np.float32)
    if "command" in out:
        swap = {LEFT: RIGHT, RIGHT: LEFT}
        out["command"] = np.int32(swap.get(int(out["command"]), int(out["command"])))
    return {key: np.asarray(value, order="C") for key, value in out.items()}
