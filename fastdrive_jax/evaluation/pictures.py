"""Pictures of what a pruner sees and keeps; arrays in, uint8 RGB arrays out."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont

from fastdrive_jax.evaluation import palette
from fastdrive_jax.evaluation.foreground import TOKEN
from fastdrive_jax.files import write_bytes

Rgb = UInt8[np.ndarray, "H W 3"]

# a car's cameras as one sees them from above: front row, then the rear row mirrored below it
_RING = (
    ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
    ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"),
)


def as_uint8(image: np.ndarray) -> Rgb:
    """RGB as bytes: floats are taken as [0, 1], grey `[H, W]` becomes three equal channels."""
    image = np.asarray(image)
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    elif image.dtype != np.uint8:
        image = np.clip(np.rint(np.nan_to_num(image.astype(np.float32)) * 255), 0, 255)
        image = image.astype(np.uint8)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, -1)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"a picture must be [H, W] or [H, W, 3], got {image.shape}")
    return image


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of an RGB picture."""
    _, data = cv2.imencode(".png", as_uint8(image)[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 5])
    return data.tobytes()


def encode_jpeg(image: np.ndarray, quality: int = 88) -> bytes:
    """JPEG bytes of an RGB picture."""
    _, data = cv2.imencode(".jpg", as_uint8(image)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()


def write_png(path: str | Path, image: np.ndarray) -> Path:
    """Write an RGB picture as PNG, whole or not at all."""
    return write_bytes(path, encode_png(image))


def _token_grid(image: Rgb, token: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if height % token or width % token:
        raise ValueError(f"picture of {height} x {width} does not split into tokens of {token}")
    return height // token, width // token


def _enlarge(grid: np.ndarray, token: int) -> np.ndarray:
    return np.repeat(np.repeat(grid, token, 0), token, 1)


def keep_overlay(
    image: np.ndarray, keep_indices: Int[np.ndarray, " K"], token: int = TOKEN, scale: int = 2
) -> Rgb:
    """The picture with its dropped tokens washed out and the kept region outlined.

    Args:
      image: [H, W, 3] picture.
      keep_indices: [K] kept tokens in raster order numbering.
      token: side of a token in the picture's pixels.
      scale: enlargement, so that thin lines stay thin.

    Returns:
      [H * scale, W * scale, 3].
    """
    image = as_uint8(image)
    rows, columns = _token_grid(image, token)
    kept = np.zeros(rows * columns, bool)
    kept[np.asarray(keep_indices)] = True
    kept = kept.reshape(rows, columns)
    side = token * scale
    large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    grey = cv2.cvtColor(large, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    washed = np.rint(0.22 * grey + 0.78 * 236).astype(np.uint8)
    out = np.where(_enlarge(kept, side)[..., None], large, washed)
    for line in range(1, rows):
        _blend(out[line * side], palette.PAPER, 0.35)
    for line in range(1, columns):
        _blend(out[:, line * side], palette.PAPER, 0.35)
    _outline(out, kept, side, max(2, scale))
    return out


def _blend(pixels: np.ndarray, colour: str, share: float) -> None:
    pixels[:] = np.rint(pixels * (1 - share) + np.array(palette.rgb(colour)) * share)


def _outline(out: np.ndarray, kept: np.ndarray, side: int, thick: int) -> None:
    """Draw the border between kept and dropped tokens, on the dropped side."""
    padded = np.pad(kept, 1, constant_values=True)  # the picture's own edge is no border
    colour = palette.rgb(palette.ACCENT)
    for row, column in np.argwhere(~kept):
        top, left = row * side, column * side
        cell = out[top : top + side, left : left + side]
        if padded[row, column + 1] and row > 0:
            cell[:thick] = colour
        if padded[row + 2, column + 1] and row < kept.shape[0] - 1:
            cell[-thick:] = colour
        if padded[row + 1, column] and column > 0:
            cell[:, :thick] = colour
        if padded[row + 1, column + 2] and column < kept.shape[1] - 1:
            cell[:, -thick:] = colour


def score_map(
    image: np.ndarray,
    scores: Float[np.ndarray, " N"],
    token: int = TOKEN,
    scale: int = 2,
    limits: tuple[float, float] | None = None,
) -> Rgb:
    """Token scores as colours over the picture, dark blue low and yellow high.

    Args:
      image: [H, W, 3] picture.
      scores: [N] finite scores in raster order.
      token: side of a token in the picture's pixels.
      scale: enlargement.
      limits: scores shown as lowest and highest; None takes the 2nd and 98th percentiles.

    Returns:
      [H * scale, W * scale, 3].
    """
    image = as_uint8(image)
    rows, columns = _token_grid(image, token)
    grid = np.asarray(scores, np.float64).reshape(rows, columns)
    if not np.isfinite(grid).all():
        raise ValueError("scores must be finite to be drawn")
    low, high = limits or np.percentile(grid, [2, 98])
    shares = np.clip((grid - low) / max(high - low, 1e-12), 0, 1)
    colours = _enlarge(np.rint(colormaps["cividis"](shares)[..., :3] * 255), token * scale)
    large = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    grey = cv2.cvtColor(large, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    return np.clip(np.rint(0.3 * grey + 0.7 * colours), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def _titled(image: Rgb, title: str, size: int) -> Rgb:
    """The picture under a white line of text."""
    band = round(size * 1.7)
    canvas = Image.new("RGB", (image.shape[1], image.shape[0] + band), palette.PAPER)
    canvas.paste(Image.fromarray(image), (0, band))
    font = _font(size)
    while size > 8 and font.getlength(title) > image.shape[1]:
        size -= 1
        font = _font(size)
    ImageDraw.Draw(canvas).text((0, band // 2 - 1), title, palette.INK, font, anchor="lm")
    return np.asarray(canvas)


def grid(
    images: Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    gap: int = 10,
) -> Rgb:
    """Pictures of one size in rows, each under its title.

    Args:
      images: [H, W, 3] each, all of one size.
      titles: a title each.
      columns: pictures in a row; all in one row if None.
      gap: white pixels between them.

    Returns:
      One picture; unfilled places are white.
    """
    tiles = [as_uint8(image) for image in images]
    if len({tile.shape for tile in tiles}) != 1:
        raise ValueError("a grid needs at least one picture, and all of one size")
    if titles is not None:
        size = max(11, tiles[0].shape[1] // 28)
        tiles = [_titled(t, name, size) for t, name in zip(tiles, titles, strict=True)]
    columns = columns or len(tiles)
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles[0].shape[:2]
    out = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8
    )
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        out[top : top + height, left : left + width] = tile
    return out


def reconstruction_panel(
    image: np.ndarray,
    mask: np.ndarray,
    foreground: np.ndarray,
    background: np.ndarray,
    scale: int = 1,
) -> Rgb:
    """What the decoder should rebuild from kept and dropped tokens, and what it did.

    Args:
      image: [H, W, 3] picture.
      mask: [H, W] true foreground, 0 or 1.
      foreground: [H, W, 3] reconstruction from the kept tokens.
      background: [H, W, 3] reconstruction from the dropped tokens.
      scale: enlargement of each of the four.

    Returns:
      Two by two: targets on the left, reconstructions on the right.
    """
    image, inside = as_uint8(image), np.asarray(mask).astype(bool)[..., None]
    fill = np.uint8(236)  # masked pixels are shown light, whatever value training fills them with
    parts = [
        np.where(inside, image, fill),
        as_uint8(foreground),
        np.where(inside, fill, image),
        as_uint8(background),
    ]
    parts = [cv2.resize(p, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for p in parts]
    names = (
        "Foreground: target",
        "Foreground: rebuilt from kept tokens",
        "Background: target",
        "Background: rebuilt from dropped tokens",
    )
    return grid(parts, names, columns=2)


def contact_sheet(images: Sequence[np.ndarray], names: Sequence[str]) -> Rgb:
    """All cameras of a moment on one sheet.

    Args:
      images: [C, H, W, 3] pictures of one size.
      names: camera of each. The six of nuScenes are laid out as seen from above, front row first;
        others in reading order.

    Returns:
      One picture.
    """
    if len(images) != len(names):
        raise ValueError(f"{len(images)} pictures but {len(names)} names")
    place = dict(zip(names, images, strict=True))
    ring = [name for row in _RING for name in row]
    if set(place) == set(ring):
        order, columns = ring, 3
    else:
        order, columns = list(names), math.ceil(math.sqrt(len(names)))
        place = dict(zip(order, images, strict=True))
    titles = [name.removeprefix("CAM_").replace("_", " ").lower() for name in order]
    return grid([place[name] for name in order], titles, columns)
