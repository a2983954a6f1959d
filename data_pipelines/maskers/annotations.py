"""Masks from annotations alone: 3-D boxes and the vector map, drawn into the camera's picture.

Road is what the map calls drivable area, crossing or divider, laid on the ground; boxes cover it
from far to near. Signs and lights are in neither, so this masker never marks them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np

from data_pipelines.geometry import Pose, clip_ahead, project
from data_pipelines.maskers.areas import clip_area
from data_pipelines.maskers.ground import FLAT, PARAMETERS, Ground, ground_below
from data_pipelines.maskers.interface import BACKGROUND, BARRIER, PERSON, ROAD, VEHICLE, Frame
from data_pipelines.maskers.solids import BOX, Solid, silhouette, solid_points
from data_pipelines.nuscenes.frames import Boxes, CameraView
from data_pipelines.nuscenes.map_layers import MapFolder, MapLayers, outlines
from fastdrive_jax.errors import UserError

_NEAR = 0.1  # metres ahead of the camera where everything is cut
_EDGE = 2.0  # metres between the points of an outline, so that it follows the ground
_SHIFT = 4  # bits of sub-pixel precision
_LINE_WIDTH = 0.15  # metres of a painted line
_AREAS = ("drivable_area", "ped_crossing")
_LINES = ("road_divider", "lane_divider")
_IGNORED = -1
# Class by the beginning of a category's name. Debris is what cannot be driven over, so it
# counts as a barrier; an animal must be braked for, and of the classes a person is the nearest.
# Bins and bicycle racks stand beside the road and are boxed loosely: they are left out.
CLASS_OF = (
    ("vehicle.", VEHICLE),
    ("human.", PERSON),
    ("animal", PERSON),
    ("movable_object.barrier", BARRIER),
    ("movable_object.trafficcone", BARRIER),
    ("movable_object.debris", BARRIER),
    ("movable_object.pushable_pullable", _IGNORED),
    ("static_object.", _IGNORED),
)

# What fills a box less than a block does, by the beginning of the category's name.
# Measured on the synthetic world, see tests/data_pipelines/test_maskers_annotations.py.
SOLIDS = (
    ("human.", Solid(((-1.0, 0.85, 0.85), (1.0, 0.85, 0.85)), round=True)),
    ("vehicle.car", Solid(((-1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.6, 0.8)))),
)


@dataclass(frozen=True)
class AnnotationConfig:
    """How boxes and map become a mask.

    Attributes:
        road_range: Metres along the optical axis up to which the map is drawn. Farther road is
            mostly hidden by what has no box, such as houses.
        box_range: The same for the centres of boxes.
        hidden_visibility: Boxes up to this level of visibility (1 is 0 to 40% seen) may be hidden
            behind something without a box; 0 drops none of them.
        min_lidar_points: Those of them with fewer lidar points are dropped. Where the visibility is
            unknown, a box without any point is dropped; unknown points (-1) drop nothing. On the
            synthetic world 1 moves the foreground's IoU by less than 0.001, and 5 loses people who
            are half hidden.
        ground: "boxes" lays the map on the ground that the bottoms of boxes tell (see ground.py),
            "plane" on the plane z = 0 of the car.
        shape: "solid" draws the outlines of `SOLIDS`, "box" those of whole boxes.
    """

    road_range: float = 60.0
    box_range: float = 80.0
    hidden_visibility: int = 1
    min_lidar_points: int = 1
    ground: str = "boxes"
    shape: str = "solid"

    def __post_init__(self):
        for name, allowed in (("ground", ("boxes", "plane")), ("shape", ("box", "solid"))):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}."
                )
        for name in ("road_range", "box_range"):
            if not getattr(self, name) > _NEAR:
                raise UserError(f"{name}={getattr(self, name)} must be more than {_NEAR} metres.")
        if not 0 <= self.hidden_visibility <= 4:
            raise UserError(f"hidden_visibility={self.hidden_visibility} is outside 0 to 4.")


@dataclass(frozen=True)
class AnnotationMasker:
    """A masker that needs no network; see the top of this file.

    Attributes:
        maps: Map of each location, None or absent where there is none; `MapFolder(root)` reads
            those of a data set. Pictures without a map get boxes only, and a warning says so.
        config: How to draw.
    """

    maps: Mapping[str, MapLayers | None] = field(default_factory=dict)
    config: AnnotationConfig = AnnotationConfig()
    name: str = "annotations"

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, all fixed values and a checksum of each map."""
        if isinstance(self.maps, MapFolder):
            sums = self.maps.checksums()
        else:
            sums = {name: layers and layers.checksum() for name, layers in self.maps.items()}
        return {
            **asdict(self.config),
            "class_of": [list(pair) for pair in CLASS_OF],
            "solids": [[beginning, asdict(solid)] for beginning, solid in SOLIDS],
            "ground_model": dict(PARAMETERS),
            "line_width": _LINE_WIDTH,
            "maps": sums,
        }

    def __call__(self, frames: Sequence[Frame]) -> list[np.ndarray]:
        """Class maps [H, W] of pictures with calibration and boxes; the files are not opened.

        Raises:
            UserError: A frame has no calibration or no boxes, or a category is not known.
        """
        return [self._mask(frame) for frame in frames]

    def _mask(self, frame: Frame) -> np.ndarray:
        view, keyframe = frame.view, frame.keyframe
        if view is None or keyframe is None:
            raise UserError(
                f"{frame.picture} has no calibration or key frame, which masks from annotations "
                "need; use a masker that looks at the picture, such as grounded_sam."
            )
        if keyframe.boxes is None:
            raise UserError(
                f"Key frame {keyframe.token} of {keyframe.scene} has no boxes (v1.0-test has "
                "none); use a masker that looks at the picture, such as grounded_sam."
            )
        labels = np.full(view.size, BACKGROUND, np.uint8)
        layers = self.maps.get(keyframe.location)
        if layers is None:
            warnings.warn(
                f"There is no vector map of {keyframe.location!r}: its masks from annotations have "
                "boxes but no road; put the map expansion into ROOT/maps/expansion.",
                stacklevel=3,
            )
        else:
            ground = FLAT
            if self.config.ground == "boxes":
                ground = ground_below(keyframe.boxes, view.ego_to_global)
            draw_road(labels, view, layers, ground, self.config.road_range)
        draw_boxes(labels, view, keyframe.boxes, self.config)
        return labels


def class_of(category: str) -> int:
    """Class id of a nuScenes category; -1 where it is ignored.

    Raises:
        UserError: The category is not known.
    """
    for beginning, label in CLASS_OF:
        if category.startswith(beginning):
            return label
    raise UserError(
        f"Category {category!r} has no class; name it like nuScenes does, such as vehicle.car, or "
        "add it to CLASS_OF in data_pipelines/maskers/annotations.py."
    )


def solid_of(category: str) -> Solid:
    """The shape drawn for a category."""
    for beginning, solid in SOLIDS:
        if category.startswith(beginning):
            return solid
    return BOX


def draw_road(
    labels: np.ndarray, view: CameraView, layers: MapLayers, ground: Ground, reach: float
) -> None:
    """Draws what the map knows of the road into `labels` [H, W], up to `reach` metres ahead."""
    origin = view.ego_to_global.translation[:2]
    # The corner of the picture is farther away than its middle at the same depth.
    near = layers.near(origin, 1.5 * reach)
    to_ego = view.ego_to_global.inverse()
    for name in _AREAS:
        for area in near.polygons[name].shapes:
            _fill(labels, _on_picture(outlines(area), view, to_ego, ground, reach), ROAD)
    for name in _LINES:
        for line in near.lines[name].shapes:
            ring = _band(line.points)
            _fill(labels, _on_picture([ring], view, to_ego, ground, reach), ROAD)


def draw_boxes(
    labels: np.ndarray, view: CameraView, boxes: Boxes, config: AnnotationConfig
) -> None:
    """Draws the boxes into `labels` [H, W], far to near, so that the near ones cover the far."""
    classes = np.array([class_of(name) for name in boxes.categories], np.int64)
    to_camera = view.global_to_camera
    corners = to_camera.apply(boxes.corners())
    turns = to_camera.rotation @ boxes.rotations
    middles = to_camera.apply(boxes.centers)
    drawn = (classes != _IGNORED) & (middles[:, 2] < config.box_range) & ~_hidden(boxes, config)
    drawn &= corners[:, :, 2].max(1, initial=-np.inf) > _NEAR
    # By distance of the nearest corner: a long lorry beside a car is nearer than its middle says.
    distance = np.linalg.norm(corners, axis=2).min(1)
    for k in sorted(np.flatnonzero(drawn), key=lambda k: -distance[k]):
        solid = solid_of(boxes.categories[k]) if config.shape == "solid" else BOX
        points = solid_points(solid, middles[k], boxes.sizes[k], turns[k])
        _fill(labels, [silhouette(points, view.intrinsic, _NEAR)], int(classes[k]))


def _hidden(boxes: Boxes, config: AnnotationConfig) -> np.ndarray:
    needed = np.where(boxes.visibility == 0, 1, config.min_lidar_points)
    needed[boxes.visibility > config.hidden_visibility] = 0
    return (boxes.lidar_points >= 0) & (boxes.lidar_points < needed)


def _on_picture(
    rings: Sequence[np.ndarray], view: CameraView, to_ego: Pose, ground: Ground, reach: float
) -> list[np.ndarray]:
    """Outlines [n, 2] in pixels of an area of the ground, of which only a part is seen.

    Args:
        rings: [m, 2] each, global frame: the exterior and holes of one area.
        view: The camera.
        to_ego: The global frame seen from the car at the camera's moment.
        ground: Of the same car.
        reach: Metres ahead where the area is cut.
    """
    camera = view.camera_to_ego
    seen = [_on_plane(ring, to_ego) for ring in rings]
    for normal, offset in _wedge(view, camera, reach):
        seen = clip_area(seen, normal, offset)
    pixels = []
    for ring in seen:
        xy = _subdivided(ring)
        lifted = np.concatenate([xy, ground.height(xy)[:, None]], 1)
        ahead = camera.inverse().apply(lifted)
        if ahead[:, 2].min() < _NEAR:
            ahead = clip_ahead(ahead, _NEAR)
        if len(ahead):
            pixels.append(project(ahead, view.intrinsic))
    return pixels


def _on_plane(ring: np.ndarray, to_ego: Pose) -> np.ndarray:
    """Where the verticals through global [n, 2] meet the car's plane, [n, 2] in its frame."""
    turn, shift = to_ego.rotation, to_ego.translation
    height = -(ring @ turn[2, :2] + shift[2]) / turn[2, 2]
    points = np.concatenate([ring, height[:, None]], 1)
    return to_ego.apply(points)[:, :2]


def _wedge(view: CameraView, camera: Pose, reach: float) -> Iterator[tuple[np.ndarray, float]]:
    """Half planes `normal @ xy >= offset` of the car's ground that hold all that may be seen."""
    forward, right = camera.rotation[:2, 2], camera.rotation[:2, 0]
    place = camera.translation[:2]
    yield forward, forward @ place - 1.0  # what is nearer is cut in three dimensions
    yield -forward, -(forward @ place) - reach
    slope = 1.3 * view.size[1] / view.intrinsic[0, 0]  # over twice the field of view, for hills
    for sign in (1.0, -1.0):
        normal = slope * forward + sign * right
        yield normal, normal @ place - slope * 2.0


def _subdivided(ring: np.ndarray) -> np.ndarray:
    """The ring [n, 2] with points at most `_EDGE` metres apart."""
    step = np.roll(ring, -1, 0) - ring
    counts = np.maximum(1, np.ceil(np.hypot(*step.T) / _EDGE).astype(int))
    owner = np.repeat(np.arange(len(ring)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ring[owner] + step[owner] * (within / counts[owner])[:, None]


def _band(points: np.ndarray) -> np.ndarray:
    """A line [n, 2] as the outline [2 n, 2] of its paint."""
    along = np.gradient(points, axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    side = np.stack([-along[:, 1], along[:, 0]], 1) * (_LINE_WIDTH / 2)
    return np.concatenate([points + side, (points - side)[::-1]])


def _fill(labels: np.ndarray, rings: Sequence[np.ndarray], label: int) -> None:
    rings = [ring for ring in rings if len(ring) >= 3]
    if rings:
        limit = 1 << 26  # far outside every picture, and the fill's integers hold it
        fixed = [np.clip(np.rint(r * (1 << _SHIFT)), -limit, limit).astype(np.int32) for r in rings]
        cv2.fillPoly(labels, fixed, label, cv2.LINE_8, _SHIFT)
