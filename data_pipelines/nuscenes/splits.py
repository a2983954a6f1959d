"""Which scene is in which split: the official lists, or a `splits.json` of the set's own."""

from collections.abc import Sequence
from pathlib import Path

from fastdrive_jax.errors import UserError
from fastdrive_jax.files import read_json

# The official 150 validation scenes, as inclusive runs of scene numbers. Numbers between that are
# not in v1.0-trainval belong to v1.0-test.
_VAL_RUNS = (
    (3, 3),
    (12, 18),
    (35, 39),
    (92, 110),
    (221, 221),
    (268, 278),
    (329, 346),
    (519, 524),
    (552, 565),
    (625, 638),
    (770, 784),
    (794, 802),
    (904, 931),
    (962, 972),
    (1059, 1073),
)
_MINI_VAL = (103, 916)
_MINI_TRAIN = (61, 553, 655, 757, 796, 1077, 1094, 1100)


def official_splits(version: str, scenes: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
    """Train and val of v1.0-trainval and v1.0-mini, test of v1.0-test; None of other versions.

    Args:
        version: Name of the table folder.
        scenes: Scenes that the tables have, which may be fewer than the official ones.

    Raises:
        UserError: A scene's name is not of the official form.
    """
    if version == "v1.0-test":
        return {"test": tuple(scenes)}
    if version not in ("v1.0-trainval", "v1.0-mini"):
        return None
    mini = version == "v1.0-mini"
    held_out = {name for name in scenes if _in_val(name, mini)}
    found = {
        "train": tuple(name for name in scenes if name not in held_out),
        "val": tuple(name for name in scenes if name in held_out),
    }
    return {name: members for name, members in found.items() if members}


def _in_val(scene: str, mini: bool) -> bool:
    text = scene.removeprefix("scene-")
    number = int(text) if text.isdecimal() else -1
    if number < 0 or (mini and number not in _MINI_VAL + _MINI_TRAIN):
        raise UserError(
            f"Scene {scene} has no official split; write the scene names of each split to "
            "splits.json beside the tables."
        )
    return number in _MINI_VAL if mini else any(a <= number <= b for a, b in _VAL_RUNS)


def read_splits(path: Path, scenes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The splits of a `splits.json`, without empty ones.

    Raises:
        UserError: The file is damaged, names a scene twice or one that is not there, or none.
    """
    splits = read_json(path)
    if not isinstance(splits, dict) or not all(isinstance(v, list) for v in splits.values()):
        raise UserError(f'{path} must look like {{"train": ["scene-0001", ...], "val": [...]}}.')
    seen: dict[str, str] = {}
    for name, members in splits.items():
        for scene in members:
            if scene not in scenes:
                raise UserError(f"{path} names {scene} in {name}, which scene.json does not have.")
            if scene in seen:
                raise UserError(f"{path} names {scene} in both {seen[scene]} and {name}.")
            seen[scene] = name
    if not seen:
        raise UserError(f"{path} names no scene; add some.")
    return {name: tuple(members) for name, members in splits.items() if members}
