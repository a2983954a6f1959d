"""Plans of one setting after the other, kept on the disk: what is there is not planned again.

Several hosts may share the folder: each plans its part of the scenes, and whoever finds all parts
there goes on to measure.
"""

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.drives import own_file_sum
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.plan_scores import Point
from fastdrive_jax.evaluation.truth import DrivingTruth
from fastdrive_jax.files import write_bytes
from fastdrive_jax.training.run_config import claim_run_folder

_FIELDS = ("waypoints", "kept", "read")


@dataclass(frozen=True)
class Setting:
    """What one pass over the samples is of.

    Attributes:
        method: Its name in tables.
        ratio: Share of the tokens kept; None where pruning has no meaning.
        seed: Of a training or of a draw; None where there is neither.
        name: As it is asked for, such as "FILE.py:FUNCTION".
    """

    method: str
    ratio: float | None
    seed: int | None = None
    name: str = ""

    @property
    def slug(self) -> str:
        """A folder's name; another one once the file of an own method has changed."""
        parts = [self.method]
        if self.ratio is not None:
            parts.append(f"{self.ratio:g}")
        if self.seed is not None:
            parts.append(f"s{self.seed}")
        return "-".join([*parts, *own_file_sum(self.name)])


@dataclass(frozen=True)
class Planned:
    """Plans of M samples.

    Attributes:
        waypoints: [M, T, 2] metres, as `Case.point` says.
        kept: [M, K] visual tokens that the last layer saw; K = 0 where there are none.
        read: [M] whether the answer could be read as a plan.
    """

    waypoints: np.ndarray
    kept: np.ndarray
    read: np.ndarray


@dataclass(frozen=True)
class Part:
    """Which share of the scenes this process plans: those `index`, `index + count`, ..."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise UserError(f"part={self.index} must be at least 0 and below parts={self.count}.")

    def path(self, folder: Path, setting: Setting, index: int | None = None) -> Path:
        """File of a part's plans, by default this one's."""
        index = self.index if index is None else index
        return folder / setting.slug / f"part-{index:05d}-of-{self.count:05d}.npz"


def write_planned(
    path: Path, tokens: Sequence[str], planned: Planned, point: Point = "origin"
) -> None:
    """Writes plans with the names of their samples, whole or not at all.

    Raises:
        UserError: The folder cannot be written.
    """
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        tokens=np.array(tokens),
        waypoints=planned.waypoints.astype(np.float32),
        kept=planned.kept.astype(np.int32),
        read=planned.read,
        point=np.array(point),
    )
    write_bytes(path, buffer.getvalue())


def read_planned(
    folder: Path, setting: Setting, part: Part, tokens: Sequence[str], point: Point = "origin"
) -> Planned | None:
    """Plans of all parts in the order of `tokens`; None while a part is missing.

    Raises:
        UserError: A file is damaged, or holds plans of other samples or another point of the car.
    """
    paths = [part.path(folder, setting, index) for index in range(part.count)]
    if not all(path.exists() for path in paths):
        return None
    found: list[dict[str, np.ndarray]] = []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as file:
                found.append({name: file[name] for name in ("tokens", *_FIELDS)})
                own = str(file["point"]) if "point" in file else "origin"
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to plan again.") from error
        if own != point:
            raise UserError(
                f"{path} holds places of the car's {own}, not of its {point}; delete it to plan "
                "again."
            )
    joined = {name: np.concatenate([one[name] for one in found]) for name in ("tokens", *_FIELDS)}
    place = {token: k for k, token in enumerate(joined["tokens"].tolist())}
    if sorted(place) != sorted(tokens):
        raise UserError(
            f"{paths[0].parent} holds plans of other samples than this split has; use a new folder."
        )
    order = [place[token] for token in tokens]
    return Planned(*(joined[name][order] for name in _FIELDS))


@dataclass(frozen=True)
class Case:
    """What is evaluated, whatever the model.

    Attributes:
        title: Names model and data.
        truth: Of all S samples.
        command: [S], index into `scenarios.COMMANDS`.
        settings: All passes, for methods, ratios and draws of methods that draw.
        plan: Plans of some samples, whole scenes in ascending order.
        view: uint8 pictures [C, H, W, 3] of one sample.
        cameras: Their names.
        grid: Token rows and columns of each.
        weights: Digests of the model, of each training and of the shards, by name, without which
            kept plans mean nothing.
        meta: What is kept beside the figures.
        notes: Sentences for the report.
        point: Whose places the plans are, see `plan_scores`.
    """

    title: str
    truth: DrivingTruth
    command: np.ndarray
    settings: tuple[Setting, ...]
    plan: Callable[[Setting, np.ndarray], Planned]
    view: Callable[[int], np.ndarray]
    cameras: tuple[str, ...]
    grid: tuple[int, int]
    weights: Mapping[str, str]
    meta: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    point: Point = "origin"


def plan_part(case: Case, folder: Path, part: Part, quiet: bool = False) -> None:
    """Plans this part of the scenes in every setting that is not there yet.

    Raises:
        UserError: The folder holds plans of other weights, or there are fewer scenes than parts.
    """
    for name, digest in case.weights.items():
        claim_run_folder(folder / "weights" / name, {"digest": digest})
    names = dict.fromkeys(case.truth.scene.tolist())
    chosen = list(names)[part.index :: part.count]
    if not chosen:
        raise UserError(
            f"{len(names)} scenes do not divide into {part.count} parts; start fewer processes."
        )
    rows = np.flatnonzero(np.isin(case.truth.scene, chosen))
    for setting in tqdm(case.settings, desc="plans", unit="setting", disable=quiet):
        path = part.path(folder, setting)
        if not path.exists():
            write_planned(path, case.truth.token[rows], case.plan(setting, rows), case.point)
