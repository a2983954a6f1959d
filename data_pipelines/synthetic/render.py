"""Renders one camera of a scene: picture, class labels and visibility, all off one number map."""

from dataclasses import dataclass

import cv2
import numpy as np

from data_pipelines.synthetic import textures
from data_pipelines.synthetic.camera import Camera
from data_pipelines.synthetic.config import BUILDING, GROUND, LANE_MARK, ROAD, SKY, VEGETATION
from data_pipelines.synthetic.draw import Stage, draw_actors, draw_ground, prepare
from data_pipelines.synthetic.planner import EgoState
from data_pipelines.synthetic.scene import Scene
from data_pipelines.synthetic.view import Canvas, View, place

__all__ = ["Picture", "Stage", "prepare", "render"]

_CONTRAST = np.full(11, 0.05, np.float32)
_CONTRAST[[BUILDING, VEGETATION, GROUND, ROAD, LANE_MARK]] = (0.13, 0.26, 0.17, 0.09, 0.07)
_ON_GROUND = np.isin(np.arange(11), (GROUND, ROAD, LANE_MARK))
_SHADOW = 0.62


@dataclass(frozen=True)
class Picture:
    """One rendered camera.

    Attributes:
        image: `[H, W, 3]` uint8 RGB.
        labels: `[H, W]` uint8 class ids.
        visible: `[A]` share of each actor's outline that is seen in this picture, 0..1.
    """

    image: np.ndarray
    labels: np.ndarray
    visible: np.ndarray


def render(
    scene: Scene,
    stage: Stage,
    camera: Camera,
    state: EgoState,
    time: float,
    sway=(0.0, 0.0),
    seed: int = 0,
) -> Picture:
    """Draws `camera` of the ego car at `state`.

    Args:
        scene: What to draw.
        stage: `prepare(scene)`.
        camera: Calibrated camera.
        state: Ego pose and progress.
        time: Seconds since the scene's start; places what moves.
        sway: Pitch and roll of the body in radians.
        seed: Decides the sensor noise.
    """
    view = place(camera, scene.terrain, state, sway)
    canvas = Canvas(view.height, view.width, SKY)
    draw_ground(scene, stage, view, canvas)
    shadows, drawings = draw_actors(scene, stage, view, canvas, time, state.s)
    labels = canvas.labels()
    image = _paint(scene, camera, view, canvas, labels, shadows, seed)
    pixels = np.bincount(canvas.numbers.ravel(), minlength=len(canvas))
    visible = np.zeros(len(scene.actors))
    for actor, begin, end, outline in drawings:
        # Outlines are convex hulls, about a fifth larger than the shapes inside.
        visible[actor] = min(1.0, pixels[begin:end].sum() / max(0.8 * outline, 1.0))
    return Picture(image, labels, visible)


def _paint(scene, camera: Camera, view: View, canvas: Canvas, labels, shadows, seed):
    look, height, width = scene.look, view.height, view.width
    foot = np.array([*view.eye[:2], scene.terrain.height(view.eye[:2])])
    ground = textures.on_ground(
        camera.intrinsic,
        view.rotation,
        np.array([*view.eye[:2], view.eye[2] - foot[2]]),
        scene.terrain.gradient(view.eye[:2]),
        height,
        width,
        look.texture,
    )
    wall = textures.crop(textures.rough_tile(), height, width, look.texture + 7919 * seed)
    grain = textures.crop(textures.grain_tile(), height, width, look.texture // 3 + 104729 * seed)
    flat = _ON_GROUND[labels]
    gain = np.where(flat, ground, wall) * _CONTRAST[labels]
    gain += 1.0
    gain *= np.where(flat & shadows.view(bool), np.float32(_SHADOW), np.float32(1))
    image = cv2.multiply(canvas.colours(), cv2.merge([gain] * 3), dtype=cv2.CV_32F)
    sky = canvas.numbers == 0
    rows = int(sky.any(1).nonzero()[0].max(initial=-1)) + 1
    if rows:
        np.copyto(image[:rows], _sky(look, view, rows, width), where=sky[:rows, :, None])
    image += cv2.merge([grain * np.float32(look.noise)] * 3)
    gains = (*(float(t) * look.exposure for t in look.tint), 0.0)
    return cv2.multiply(image, gains, dtype=cv2.CV_8U)


def _sky(look, view: View, height, width):
    """Gradient from horizon to zenith with clouds, `[H, W, 3]` float32."""
    rows = (np.arange(height) - view.centre[1]) / view.focal[1]
    rise = -(rows * view.rotation[2, 1] + view.rotation[2, 2])
    share = np.clip(-rise * 2.2, 0, 1).astype(np.float32)[:, None, None]
    zenith, horizon = look.sky.astype(np.float32)
    heading = np.arctan2(view.rotation[1, 2], view.rotation[0, 2])
    offset = look.texture + textures.TILE * round(heading * 400)
    clouds = textures.crop(textures.cloud_tile(), height, width, offset)
    cover = (np.clip(clouds * 1.9 - 0.75, 0, 1) * look.clouds)[..., None]
    sky = zenith * share + horizon * (1 - share)
    return sky * (1 - cover) + np.float32(244) * cover
