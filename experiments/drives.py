"""Drives of a driving VLA over recorded frames: all scenes at once, frame after frame."""

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.schema import Classes
from experiments.planning import PlanningSplit
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.foreground import Areas, token_areas
from fastdrive_jax.inference.pictures import driving_inputs, picture_inputs, token_pixels
from fastdrive_jax.inference.policy import DrivingPolicy, Plan, plan_tokens, start_state
from fastdrive_jax.pruning import Pruner, builds_on_recon, make_pruner
from fastdrive_jax.pruning.interface import VISION
from fastdrive_jax.pruning.mistakes import check_kept
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.pruning.select import num_keep

UNPRUNED = "unpruned"
NEED_DATA = {"prior": "the mean training mask", "ground_truth": "the true foreground"}


@dataclass(frozen=True)
class Drives:
    """Samples of whole scenes.

    Attributes:
        data: Of all samples.
        areas: What their tokens show.
        frames: Which sample each frame of each scene is [scenes, frames]; -1 behind a scene's end.
    """

    data: PlanningSplit
    areas: Areas
    frames: np.ndarray


@dataclass(frozen=True)
class Trained:
    """What methods take from a training.

    Attributes:
        config: Of the ReconPruner.
        pruner: Its parameters.
        prior: Mean training mask of each of the VLA's cameras [C, n].
    """

    config: ReconPrunerConfig
    pruner: dict
    prior: np.ndarray


def drives_from(data: PlanningSplit, classes: Classes) -> Drives:
    """Scenes of a split, with the areas that its label maps tell."""
    cameras = data.labels.shape[1]
    parts = [
        token_areas(
            np.asarray(data.labels[:, camera]), classes.foreground, classes.objects, classes.ignore
        )
        for camera in range(cameras)  # one at a time: label maps may be larger than the memory
    ]
    joined = (
        np.concatenate([getattr(part, name) for part in parts], axis=1)
        for name in ("foreground", "objects", "valid")
    )
    return Drives(data, Areas(*joined), scene_frames(data.scene))


def scene_frames(scene: np.ndarray) -> np.ndarray:
    """Samples of each scene in their order [scenes, frames], -1 behind the end of shorter ones."""
    found = [np.flatnonzero(scene == number) for number in np.unique(scene)]
    frames = np.full((len(found), max(map(len, found))), -1)
    for row, samples in zip(frames, found, strict=True):
        row[: len(samples)] = samples
    return frames


def check_methods(methods: Sequence[str], ratios: Sequence[float]) -> None:
    """Refuses what no command can prune by.

    Raises:
        UserError: There is no such method, two have one name, or a ratio is outside (0, 1] or is
            named twice.
    """
    check_labels(methods)
    for name in methods:
        builds_on_recon(name)  # says what there is
    for ratio in ratios:
        num_keep(1000, ratio)
    if len(set(ratios)) < len(ratios):
        raise UserError(f"ratios={ratios} must name none twice.")


def check_labels(names: Sequence[str]) -> None:
    """Refuses what tables could not tell apart.

    Raises:
        UserError: Two are named alike.
    """
    for name, times in Counter(map(label, names)).items():
        if times > 1:
            alike = ", ".join(one for one in names if label(one) == name)
            raise UserError(
                f"{alike} would all be called {name!r} in tables; name each once, and functions of "
                "your own differently."
            )


def own_file_sum(name: str) -> tuple[str, ...]:
    """Of the file of a FILE.py:FUNCTION, whose results change with it; none of other methods."""
    file = name.rpartition(":")[0]
    return (f"{zlib.crc32(Path(file).read_bytes()):08x}",) if file else ()


def any_method(name: str) -> Pruner:
    """A method to ask what it is; one that takes a training's sizes has the default ones.

    Raises:
        UserError: There is no such method.
    """
    given = {"config": ReconPrunerConfig()} if builds_on_recon(name) else {}
    return make_pruner(name, **given)


def is_drawn(name: str) -> bool:
    """Whether a method draws, so that it is measured as the mean over several draws."""
    return name != UNPRUNED and "key" in any_method(name).needs


def label(name: str) -> str:
    """A method's name in tables."""
    return name.rpartition(":")[2]


def method_of(name: str, trained: Trained) -> tuple[Pruner, Any]:
    """A method with what training gave it."""
    if name == UNPRUNED:
        return make_pruner("uniform"), None  # at a ratio of 1
    if builds_on_recon(name):
        return make_pruner(name, config=trained.config), trained.pruner
    if name == "prior":
        return make_pruner(name), jnp.asarray(trained.prior)
    return make_pruner(name), None


@partial(jax.jit, static_argnums=0)
def step(policy, params, images, tokens, foreground, speed, command, key, state) -> Plan:
    """One frame of some scenes; the truth is there for the control that needs it.

    Tokens may be given; otherwise, and where a method reads the encoder, the pictures are encoded.
    """
    model, needs = policy.model, policy.pruner.needs
    if tokens is None or needs & VISION:
        inputs = picture_inputs(model, {"params": params["vla"]}, images, needs)
    else:
        inputs = driving_inputs(model.config, tokens)
        if "pixels" in needs:
            inputs = inputs.replace(pixels=token_pixels(images, model.config.vision.token_pixels))
    inputs = inputs.replace(foreground=foreground, state=state)
    return plan_tokens(policy, params, inputs, speed, command, key)


def frame_of(drives: Drives, rows: np.ndarray, cached: bool, pictures: bool = True) -> tuple:
    """What `step` takes of a frame of each scene.

    Args:
        drives: The scenes.
        rows: Their samples.
        cached: Take the tokens that are there.
        pictures: Read the pictures; without them a program must not look at any.
    """
    data = drives.data
    # Rows may repeat, which memory-mapped arrays read in any order.
    images = np.asarray(data.images[rows]) if pictures else None
    tokens = np.asarray(data.tokens[rows], np.float32) if cached else None
    foreground = drives.areas.foreground[rows].astype(np.float32)
    return images, tokens, foreground, data.speed[rows], data.command[rows]


def drive(
    policy: DrivingPolicy,
    params: dict,
    drives: Drives,
    scenes: int,
    seed: int = 0,
    cached: bool = False,
    place: Callable[[Any], Any] = lambda batch: batch,
) -> tuple[np.ndarray, np.ndarray]:
    """Waypoints [S, T, 2] and kept tokens [S, K] of all samples.

    Args:
        policy: The model with a method.
        params: Of both.
        drives: The scenes.
        scenes: Driven at once.
        seed: Of methods that draw.
        cached: Take the tokens that are there, where the method reads nothing else of the encoder.
        place: Puts a batch on the devices.

    Raises:
        UserError: The method keeps tokens that there are not, or one twice.
    """
    count, found = len(drives.frames), []
    scenes = min(scenes, count)
    needs = policy.pruner.needs
    pictures = bool(not cached or needs & VISION or "pixels" in needs)
    for start in range(0, count, scenes):
        # One compiled shape: the last scenes are driven again where they do not come out even.
        chosen = np.arange(start, start + scenes).clip(max=count - 1)
        state = start_state(policy, scenes)
        for frame in range(drives.frames.shape[1]):
            rows = drives.frames[chosen, frame]
            rows = np.where(rows < 0, drives.frames[chosen, 0], rows)  # a scene that has ended
            key = jax.random.fold_in(jax.random.key(seed), rows[0])
            given = place(frame_of(drives, rows, cached, pictures))
            planned = step(policy, params, *given, key, state)
            state = planned.state
            # Fetched at the end: the next frame's pictures are read while this one is planned.
            found.append((rows, planned.waypoints, planned.keep_indices))
    rows, waypoints, kept = (np.concatenate(parts) for parts in zip(*found, strict=True))
    tokens = policy.model.config.visual_tokens
    check_kept(kept, tokens, policy.pruner.name, policy.keep_ratio)
    # A scene that had ended gave its first frame again; what was planned of it first counts.
    _, first = np.unique(rows, return_index=True)
    return waypoints[first], kept[first]
