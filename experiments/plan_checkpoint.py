"""Plans of a Qwen2.5-VL driving checkpoint on shards, its visual tokens pruned by any method.

The checkpoint is asked as Impromptu-VLA's are (`models.qwen2_5_vl.impromptu`): pictures, the places
of the last three seconds and, where there is a CAN bus, the motion. It is not retrained. Its places
are those of the lidar, and so are those that its plans are measured against.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.decode import decode_image, decode_mask
from data_pipelines.nuscenes.truth import driving_truth
from data_pipelines.shards import open_shards, record_source, sample_tokens
from data_pipelines.token_mask import mask_fractions
from experiments.answer import padded
from experiments.driven import Sequences, past_of, read_sequences
from experiments.drives import UNPRUNED, any_method, is_drawn, label
from experiments.planned import Case, Planned, Setting
from experiments.trained_pruner import read_trained
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.truth import Agents, DrivingTruth
from fastdrive_jax.export.bundle import read_bundle_safetensors
from fastdrive_jax.export.manifest import NAME as MANIFEST
from fastdrive_jax.inference.answering import answer_pruned, needs_past
from fastdrive_jax.inference.sampling import SamplingConfig, answer_batch
from fastdrive_jax.models.qwen2_5_vl.checkpoint import checkpoint_digest, load
from fastdrive_jax.models.qwen2_5_vl.image_processor import smart_resize
from fastdrive_jax.models.qwen2_5_vl.impromptu import (
    CAMERAS,
    parse_answer,
    planning_prompt,
    shrunk_size,
)
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.processor import Processor, read_processor
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample
from fastdrive_jax.models.resize import resize_bicubic
from fastdrive_jax.parallel.mesh import make_mesh, shard_where_it_divides
from fastdrive_jax.pruning import Pruner, builds_on_recon, make_pruner
from fastdrive_jax.pruning.mistakes import check_kept

VIEWS = {"6v": CAMERAS, "1v": CAMERAS[:1]}


@dataclass(frozen=True)
class CheckpointConfig:
    """A Qwen2.5-VL driving VLA and the data it is evaluated on.

    Attributes:
        checkpoint: Folder in the Hugging Face layout; None uses the tiny benchmark instead.
        shards: Folder written by `fastdrive data build`.
        root: The data set in the nuScenes layout, for its boxes, maps and lidar; without it,
            collisions are counted with the shards' agents, intersections cannot be counted, and the
            lidar's positions are guessed, up to some decimetres wrong in slow turns.
        split: Split of the shards.
        pruners: Exported ReconPruners (`train-pruner`'s export/), each from a separate training;
            their tokens must be this checkpoint's.
        views: The front camera or all six.
        frame: Coordinate frame of the waypoints the checkpoint was trained on.
        samples: Number of samples to plan, from the first one; 0 plans all.
        batch_size: Samples planned at once.
        max_new_tokens: Maximum number of answer tokens.
        max_pixels: A larger image is first shrunk to this area, as in LLaMA-Factory, with which
            Impromptu-VLA was trained; then the checkpoint's processor resizes it.
        shrink: Filter of that first step; LLaMA-Factory's at the time.
        image_size: Height and width that the model sees, instead of both steps, such as 1596 1596
            for FastDriveVLA.
        dtype: Dtype of weights and arithmetic.
        fsdp: Devices of this host that shard batch and weights.
        tensor: Devices that share each layer.
    """

    checkpoint: Path | None = None
    shards: Path | None = None
    root: Path | None = None
    split: str = "val"
    pruners: tuple[Path, ...] = ()
    views: Literal["1v", "6v"] = "6v"
    frame: Literal["lidar", "ego"] = "lidar"
    samples: int = 0
    batch_size: int = 1
    max_new_tokens: int = 320
    max_pixels: int = 262_144
    shrink: Literal["nearest", "bicubic"] = "nearest"
    image_size: tuple[int, int] | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        if self.checkpoint is not None and self.shards is None:
            raise UserError("A checkpoint needs --qwen.shards, the folder of what it drives on.")
        if self.samples < 0 or self.batch_size < 1 or self.batch_size % max(self.fsdp, 1):
            raise UserError(
                f"samples={self.samples} must not be negative, and batch_size={self.batch_size} be "
                f"a positive multiple of fsdp={self.fsdp}."
            )


def checkpoint_case(
    config: CheckpointConfig,
    methods: Sequence[str],
    ratios: Sequence[float],
    draws: int,
    quiet: bool = False,
) -> Case:
    """A checkpoint's evaluation; methods that it cannot run are left out and named.

    Raises:
        UserError: Checkpoint, shards, maps or pruners are missing or do not fit each other.
    """
    shards = open_shards(config.shards)
    cameras = VIEWS[config.views]
    if missing := [name for name in cameras if name not in shards.cameras]:
        raise UserError(
            f"{config.shards} has no pictures of {', '.join(missing)}; see --qwen.views."
        )
    chosen, notes = _usable(methods, config)
    settings = [Setting(UNPRUNED, 1.0, None, UNPRUNED), Setting("no_image", None, None, "no_image")]
    for ratio in ratios:
        for name in chosen:
            own: Sequence[int | None] = (None,)
            if builds_on_recon(name):
                own = range(len(config.pruners))
            elif is_drawn(name):
                own = range(draws)
            settings += [Setting(label(name), ratio, seed, name) for seed in own]
    driven = read_sequences(shards, config.split, config.samples)
    tokens = sample_tokens(shards, config.split)[: len(driven.command)]
    truth = _truth(config, shards, driven, tokens)
    if config.frame == "lidar" and truth.lidar is None:
        notes += (
            "The lidar's places are guessed from those of the car: distances are up to some "
            "decimetres wrong in slow turns. --qwen.root with a lidar's poses knows them.",
        )
    driver = _Driver(config, shards, driven, truth.lidar, cameras, not quiet)
    return Case(
        title=f"{Path(config.checkpoint).name} on {shards.name}, {config.split}",
        truth=truth,
        command=driven.command,
        settings=tuple(settings),
        plan=driver.plan,
        view=lambda sample: np.stack(driver.pictures(sample)),
        cameras=cameras,
        grid=driver.grid,
        weights=_digests(config) | {"shards": shards.digest},
        meta={"visual_tokens": driver.total, "shards": shards.digest, "dtype": config.dtype},
        notes=notes,
        point="lidar" if config.frame == "lidar" else "origin",
    )


def _digests(config: CheckpointConfig) -> dict[str, str]:
    """Of the checkpoint and of each pruner, whose manifest holds sums of its files."""
    found = {"vla": checkpoint_digest(config.checkpoint)}
    for number, folder in enumerate(config.pruners):
        read_bundle_safetensors(folder)  # says what is wrong with it before anything is planned
        manifest = (folder / MANIFEST).read_bytes()
        found[f"training-{number}"] = hashlib.sha256(manifest).hexdigest()
    return found


def _usable(methods: Sequence[str], config: CheckpointConfig) -> tuple[list[str], tuple[str, ...]]:
    """Methods that single prompts can be pruned by, and what is said of the others."""
    chosen, past, untrained = [], [], []
    for name in methods:
        if builds_on_recon(name) and not config.pruners:
            untrained.append(name)
            continue
        (past if needs_past(any_method(name)) else chosen).append(name)
    notes = []
    if past:
        notes.append(f"Left out, because single prompts have no past: {', '.join(past)}.")
    if untrained:
        notes.append(f"Left out, because --qwen.pruners names none: {', '.join(untrained)}.")
    return chosen, tuple(notes)


def _truth(config, shards, driven: Sequences, tokens: Sequence[str]) -> DrivingTruth:
    if config.root is not None:
        return driving_truth(config.root, split=config.split).at(tokens)
    return DrivingTruth(
        token=np.array(tokens),
        scene=np.array([shards.scenes[k] for k in driven.scene]),
        future=driven.future,
        future_valid=driven.future_valid,
        agents=Agents(driven.agents, driven.agents_valid, driven.agents_valid, driven.agents_kind),
    )


class _Driver:
    """The checkpoint with its pictures; weights are read when the first plan is asked for."""

    def __init__(self, config, shards, driven, lidar, cameras, progress):
        self.config, self.driven, self.lidar, self.progress = config, driven, lidar, progress
        self.processor: Processor = read_processor(config.checkpoint)
        self.size = model_size(config, shards.image_size, self.processor)
        edge = self.processor.pictures.token_pixels
        self.grid = self.size[0] // edge, self.size[1] // edge
        self.total = self.grid[0] * self.grid[1] * len(cameras)
        self._source, self._stride = record_source(shards, config.split), len(shards.cameras)
        self._places = [shards.cameras.index(name) for name in cameras]
        self._shards = shards
        self._methods: dict[tuple[str, int | None], tuple[Pruner, Any]] = {}

    @cached_property
    def _mesh(self):
        return make_mesh(-1, self.config.fsdp, self.config.tensor, jax.local_devices())

    @cached_property
    def _weights(self):
        dtype = jnp.dtype(self.config.dtype)
        return load(self.config.checkpoint, self._mesh, dtype, progress=self.progress)

    def _records(self, sample: int) -> list[dict]:
        return [self._source[sample * self._stride + place] for place in self._places]

    def pictures(self, sample: int) -> list[np.ndarray]:
        """As the model sees them."""
        return [self._picture(record) for record in self._records(sample)]

    def _picture(self, record: dict) -> UInt8[np.ndarray, "H W 3"]:
        image, config = decode_image(record["image"], self._shards.image_size), self.config
        shrunk = shrunk_size(*image.shape[:2], config.max_pixels)
        if config.image_size is None and shrunk != image.shape[:2]:
            kind = Image.Resampling[config.shrink.upper()]
            image = np.asarray(Image.fromarray(image).resize(shrunk[::-1], kind))
        return resize_bicubic(image, self.size)

    def plan(self, setting: Setting, rows: np.ndarray) -> Planned:
        """Plans of some samples; the next batch is decoded while one is answered."""
        batches, parts = list(self._batches(rows)), []
        make = partial(self._sample, setting.name != "no_image")
        with ThreadPoolExecutor(4) as pool:
            coming = pool.map(make, batches[0])
            for batch, following in zip(batches, [*batches[1:], ()], strict=True):
                made = list(coming)
                coming = pool.map(make, following)
                parts.append(self._answers(setting, batch, made))
        joined = map(np.concatenate, zip(*parts, strict=True))
        return Planned(*(values[: len(rows)] for values in joined))

    def _batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        size = self.config.batch_size
        for start in range(0, len(rows), size):
            yield rows[np.arange(start, start + size).clip(max=len(rows) - 1)]  # one shape

    def _answers(self, setting: Setting, rows: np.ndarray, made: Sequence[tuple]):
        samples, foreground = [one for one, _ in made], np.stack([share for _, share in made])
        batch = shard_where_it_divides(padded(samples, self.processor), self._mesh)
        key = jax.random.fold_in(jax.random.key(setting.seed or 0), int(rows[0]))
        ids, lengths, kept = self._ask(setting, batch, key, foreground)
        found = [
            parse_answer(self.processor.chat.decode(one[:length]))
            for one, length in zip(ids, lengths, strict=True)
        ]
        way = np.stack([points for points, _ in found])
        read = np.array([count > 0 for _, count in found])
        return np.where(read[:, None, None], way, 0.0), kept, read

    def _sample(self, seeing: bool, sample: int) -> tuple[Sample, np.ndarray]:
        records = self._records(sample)
        share = [mask_fractions(decode_mask(one["mask"], self.size)) for one in records]
        past, status = past_of(self.driven, int(sample), self.config.frame, self.lidar)
        if not seeing:
            return self.processor.sample(planning_prompt(past, status, "none")), np.concatenate(
                share
            )
        pictures = [self._picture(one) for one in records]
        prompt = planning_prompt(past, status, self.config.views)
        return self.processor.sample(prompt, pictures), np.concatenate(share)

    def _ask(self, setting: Setting, batch, key, foreground) -> Sequence[np.ndarray]:
        """Ids, lengths and kept tokens; a program is compiled once for each setting."""
        config, params = self._weights
        model = QwenVL(config, jnp.dtype(self.config.dtype))
        sampling = SamplingConfig(max_new_tokens=self.config.max_new_tokens)
        with jax.set_mesh(self._mesh):
            if setting.name == "no_image":
                answer = _ANSWER(model, {"params": params}, batch, key, sampling)
                return *map(np.asarray, answer), np.zeros((len(batch.lengths), 0), np.int32)
            pruner, weights = self._method(setting)
            both = {"vla": params, "pruner": weights}
            static = model, pruner, setting.ratio, self.grid, sampling
            found = _PRUNED(*static, both, batch, key, jnp.asarray(foreground))
        check_kept(found.keep_indices, self.total, pruner.name, setting.ratio)
        return [np.asarray(x) for x in (found.ids, found.lengths, found.keep_indices)]

    def _method(self, setting: Setting) -> tuple[Pruner, Any]:
        """The same objects at each call, since programs are known by them."""
        trained = setting.name != UNPRUNED and builds_on_recon(setting.name)
        key = setting.name, setting.seed if trained else None  # a draw's seed is none of a training
        if key not in self._methods:
            self._methods[key] = self._make(setting)
        return self._methods[key]

    def _make(self, setting: Setting) -> tuple[Pruner, Any]:
        if setting.name == UNPRUNED:
            return make_pruner("uniform"), None
        if builds_on_recon(setting.name):
            folder = self.config.pruners[setting.seed]
            config = self._weights[0]
            return read_trained(
                setting.name, folder, self.config.checkpoint, config, self.config.dtype
            )
        if setting.name == "prior":
            return make_pruner("prior"), jnp.asarray(self._prior)
        return make_pruner(setting.name), None

    @cached_property
    def _prior(self) -> np.ndarray:
        """Mean training mask of each camera [C, n], of up to 512 samples spread over the split."""
        if "train" not in self._shards.samples:
            raise UserError(
                f"{self._shards.path} has no split train, of which the prior is the mean mask; "
                "leave the method prior out."
            )
        source, count = record_source(self._shards, "train"), self._shards.samples["train"]
        chosen = np.unique(np.linspace(0, count - 1, 512).astype(int))
        means = []
        for place in self._places:
            masks = (source[int(k) * self._stride + place]["mask"] for k in chosen)
            means.append(
                np.mean([mask_fractions(decode_mask(m, self.size)) for m in masks], axis=0)
            )
        return np.stack(means)


_ANSWER = jax.jit(answer_batch, static_argnums=(0, 4))
_PRUNED = jax.jit(answer_pruned, static_argnums=(0, 1, 2, 3, 4))


def model_size(
    config: CheckpointConfig, stored: tuple[int, int], processor: Processor
) -> tuple[int, int]:
    """Height and width of the pictures that the model sees.

    Raises:
        UserError: The processor would not keep what was asked for.
    """
    if config.image_size is None:
        return smart_resize(*shrunk_size(*stored, config.max_pixels), processor.pictures)
    kept = smart_resize(*config.image_size, processor.pictures)
    if kept != tuple(config.image_size):
        raise UserError(
            f"image_size={config.image_size} is not what the checkpoint's processor keeps; it "
            f"would make {kept} of it."
        )
    return kept
