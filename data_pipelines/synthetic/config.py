"""What a synthetic driving data set contains, as one frozen value."""

from dataclasses import dataclass

from data_pipelines.schema import CAMERAS
from fastdrive_jax.errors import UserError

CLASS_NAMES = (
    "sky",
    "building",
    "vegetation",
    "ground",
    "road",
    "lane_mark",
    "vehicle",
    "person",
    "sign",
    "traffic_light",
    "barrier",
)
SKY, BUILDING, VEGETATION, GROUND, ROAD, LANE_MARK = range(6)
VEHICLE, PERSON, SIGN, TRAFFIC_LIGHT, BARRIER = range(6, 11)
FOREGROUND_IDS = (ROAD, LANE_MARK, VEHICLE, PERSON, SIGN, TRAFFIC_LIGHT, BARRIER)
OBJECT_IDS = (VEHICLE, PERSON, SIGN, TRAFFIC_LIGHT, BARRIER)

SPLITS = ("train", "val")


@dataclass(frozen=True)
class WorldConfig:
    """Size and look of a generated data set; equal configs give equal bytes.

    Attributes:
        seed: Root of every random choice; scene i of a split depends on (seed, split, i) only.
        train_scenes: Scenes in the training split.
        val_scenes: Scenes in the validation split.
        keyframes_per_scene: Key frames (2 Hz) in each scene.
        height: Picture height in pixels.
        width: Picture width in pixels; the focal length scales with it.
        cameras: Camera channels to render, front first.
        jpeg_quality: OpenCV JPEG quality, 1 to 100.
        recovery: Share of scenes that begin in states a car may drive itself into but its teacher
            never does: off the lane's centre, rotated, or standing with the road clear. A model
            that drives in a closed loop learns from them to recover and to start moving.
        workers: Worker processes; 0 uses the CPU count. Does not change the bytes written.
    """

    seed: int = 0
    train_scenes: int = 60
    val_scenes: int = 60
    keyframes_per_scene: int = 6
    height: int = 224
    width: int = 392
    cameras: tuple[str, ...] = CAMERAS
    jpeg_quality: int = 92
    recovery: float = 0.0
    workers: int = 0

    def __post_init__(self):
        if self.train_scenes < 0 or self.val_scenes < 0 or self.train_scenes + self.val_scenes < 1:
            raise UserError(
                f"train_scenes={self.train_scenes} and val_scenes={self.val_scenes} make no scene; "
                "ask for at least one."
            )
        if self.seed < 0:
            raise UserError(f"seed={self.seed} is negative; give a number of at least 0.")
        if self.keyframes_per_scene < 1:
            raise UserError(
                f"keyframes_per_scene={self.keyframes_per_scene} is too small; give at least 1."
            )
        if self.height < 28 or self.width < 28:
            raise UserError(
                f"A picture of {self.height} x {self.width} pixels is smaller than one 28 x 28 "
                "token; give a larger height and width."
            )
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg_quality={self.jpeg_quality} is outside 1 to 100.")
        if not 0 <= self.recovery <= 1:
            raise UserError(f"recovery={self.recovery} is outside 0 to 1.")
        if self.workers < 0:
            raise UserError(f"workers={self.workers} is negative; give 0 to use every core.")
        unknown = [name for name in self.cameras if name not in CAMERAS]
        if unknown or not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise UserError(
                f"cameras={self.cameras} must name each wanted camera once, out of {CAMERAS}."
            )

    def scenes(self, split: str) -> int:
        """Number of scenes in `split` ("train" or "val")."""
        return {"train": self.train_scenes, "val": self.val_scenes}[split]
