"""Token features of a frozen encoder for every picture of a data set, computed once and kept.

The cache's folder name is a digest of all that the features depend on (weights, merge, records,
picture size, number type), so a stale cache is never found. A run that is killed goes on where it
stopped; the folder gets its real name when all is in it.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from data_pipelines.decode import check_size, nearest_size
from data_pipelines.disk import check_space, disk_errors, locked
from data_pipelines.loader import LoaderConfig, make_loader
from data_pipelines.schema import TOKEN_PIXELS
from data_pipelines.shards import Shards
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_json
from fastdrive_jax.models.dinov2.tokens import Merge, encode_pictures
from fastdrive_jax.models.dinov2.weights import load_dinov2, params_digest

FORMAT = 1
MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_SAVE_EVERY = 8  # batches between saves of the position; what is lost by a kill, at most


@dataclass(frozen=True)
class TokenEncoder:
    """A frozen encoder of pictures.

    Attributes:
        digest: Of everything that its tokens depend on besides the picture.
        dim: Token size D.
        encode: uint8 [B, H, W, 3] to float32 [B, N, D], N = H / 28 * W / 28; jitted.
    """

    digest: str
    dim: int
    encode: Callable[[np.ndarray], jax.Array]


@dataclass(frozen=True)
class SplitFeatures:
    """One split; M pictures in record order, arrays mapped from disk and read-only.

    Attributes:
        tokens: float16 or float32 [M, N, D].
        images: uint8 [M, H, W, 3], the resized pictures that were encoded.
        masks: uint8 {0, 1} [M, H, W].
        labels: uint8 [M, H, W], 255 = ignored or unknown.
        camera: int32 [M], index into `Shards.cameras`.
        scene: int32 [M], index into `Shards.scenes`.
    """

    tokens: np.ndarray
    images: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    camera: np.ndarray
    scene: np.ndarray


@dataclass(frozen=True)
class FeatureSet:
    """Cached features of a data set.

    Attributes:
        path: Folder of this cache.
        grid: Token rows and columns; N is their product.
        dim: Token size D.
        splits: Split name to its arrays.
    """

    path: Path
    grid: tuple[int, int]
    dim: int
    splits: dict[str, SplitFeatures]


def dino_encoder(path: Path | None = None, merge: Merge = "mean") -> TokenEncoder:
    """DINOv2 as a `TokenEncoder`.

    Args:
        path: Weights, see `load_dinov2`.
        merge: How 2 x 2 patches become a token: "mean" (D = 384 for ViT-S) or "concat" (1536).

    Raises:
        UserError: There are no weights, or they do not fit.
    """
    model, params = load_dinov2(path)
    digest = hashlib.sha256(f"dinov2 {merge} {params_digest(params)}".encode()).hexdigest()
    encode = jax.jit(functools.partial(encode_pictures, model, merge=merge))
    dim = model.config.hidden_size * (4 if merge == "concat" else 1)
    return TokenEncoder(digest, dim, functools.partial(encode, params))


def cache_features(
    shards: Shards,
    encoder: TokenEncoder,
    out_dir: Path,
    batch_size: int = 4,
    image_size: tuple[int, int] | None = None,
    dtype: str = "float16",
    progress: bool = True,
) -> FeatureSet:
    """Features of all pictures of `shards`, from the cache in `out_dir` or computed into it.

    Args:
        shards: The data set.
        encoder: Makes the tokens.
        out_dir: Folder that may hold many caches, each in a folder of its own.
        batch_size: Pictures encoded at once.
        image_size: H, W to resize to, multiples of 28; None takes the nearest to the pictures' own.
        dtype: Of the stored tokens, "float16" or "float32".
        progress: Show a progress bar.

    Raises:
        UserError: The image size is not made of tokens, or the disk is full.
    """
    if dtype not in ("float16", "float32"):
        raise UserError(f"dtype={dtype!r} of the features must be 'float16' or 'float32'.")
    size = check_size(image_size or nearest_size(shards.image_size))
    # Not the batch size: which pictures share a batch does not change what a token means.
    identity = {
        "format": FORMAT,
        "encoder": encoder.digest,
        "data": shards.digest,
        "image_size": list(size),
        "dtype": dtype,
        "dim": encoder.dim,
        "grid": [value // TOKEN_PIXELS for value in size],
        "pictures": {split: shards.records(split) for split in sorted(shards.samples)},
        "ignore": sorted(shards.classes.ignore),  # whose labels are not kept
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    final = Path(out_dir) / key
    if not final.is_dir():
        partial = Path(out_dir) / f"{key}.partial"
        with disk_errors(final):
            partial.mkdir(parents=True, exist_ok=True)
            with locked(partial):
                if final.is_dir():  # another process has made it since
                    shutil.rmtree(partial)
                    return open_features(final)
                _fill(partial, shards, encoder, identity, batch_size, progress)
                write_json(partial / MANIFEST, identity)
                partial.rename(final)
                for name in (_PROGRESS, ".lock"):
                    (final / name).unlink()
    return open_features(final)


def open_features(path: Path) -> FeatureSet:
    """Maps a finished cache folder (`FeatureSet.path`).

    Raises:
        UserError: The folder is no whole cache.
    """
    path = Path(path)
    again = "delete the folder to compute it again"
    try:
        identity = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        splits = {}
        for split, count in identity["pictures"].items():
            arrays = {}
            for name, (shape, dtype) in _layout(identity, count).items():
                array = np.load(_array_path(path, split, name), mmap_mode="r")
                if array.shape != shape or array.dtype != dtype:
                    raise ValueError(f"{name} of {split} is {array.dtype} {array.shape}")
                arrays[name] = array
            splits[split] = SplitFeatures(**arrays)
        return FeatureSet(path, tuple(identity["grid"]), identity["dim"], splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The feature cache {path} is damaged ({error}); {again}.") from error


def _fill(partial, shards, encoder, identity, batch_size, progress) -> None:
    """Encodes what is not there yet; `progress.json` says how many pictures are safe on disk."""
    counts = identity["pictures"]
    done = _read_progress(partial, identity)
    if not any(done.values()):
        layouts = [_layout(identity, count) for count in counts.values()]
        check_space(sum(_bytes(layout) for layout in layouts), partial)
    initial = sum(done.values())
    with tqdm(
        total=sum(counts.values()),
        initial=initial,
        desc="token features",
        unit="picture",
        disable=not progress,
    ) as bar:
        for split, count in counts.items():
            mode = "r+" if done[split] else "w+"
            arrays = {
                name: open_memmap(_array_path(partial, split, name), mode, dtype, shape)
                for name, (shape, dtype) in _layout(identity, count).items()
            }
            _fill_split(partial, arrays, split, done, shards, encoder, identity, batch_size, bar)


def _fill_split(partial, arrays, split, done, shards, encoder, identity, batch_size, bar) -> None:
    config = LoaderConfig(
        batch_size=batch_size,
        image_size=tuple(identity["image_size"]),
        shuffle=False,
        num_epochs=1,
        remainder="keep",
        resize="area",  # the frozen encoder is no Qwen2.5-VL; figures in the README are of these
    )
    batches = iter(make_loader(shards, split, config))
    start, total = done[split], len(arrays["tokens"])
    if start >= total:
        return
    batches.set_state({"examples": start})
    for number, batch in enumerate(batches, 1):
        count = len(batch["image"])
        stop = start + count
        images = batch["image"]
        if count < batch_size:  # keeps one compiled shape
            images = np.concatenate([images, np.repeat(images[-1:], batch_size - count, axis=0)])
        arrays["tokens"][start:stop] = np.asarray(encoder.encode(images))[:count]
        arrays["images"][start:stop] = batch["image"]
        arrays["masks"][start:stop] = batch["mask"]
        for name in ("labels", "camera", "scene"):
            arrays[name][start:stop] = batch[name]
        start = stop
        bar.update(count)
        if number % _SAVE_EVERY == 0 or stop == total:
            for array in arrays.values():
                array.flush()
            done[split] = stop
            write_json(partial / _PROGRESS, {"identity": identity, "done": done})


def _read_progress(partial: Path, identity: dict) -> dict[str, int]:
    fresh = dict.fromkeys(identity["pictures"], 0)
    try:
        saved = json.loads((partial / _PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return fresh
    return saved["done"] if saved.get("identity") == identity else fresh


def _layout(identity: dict, count: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    height, width = identity["image_size"]
    rows, columns = identity["grid"]
    byte, index = np.dtype(np.uint8), np.dtype(np.int32)
    return {
        "tokens": ((count, rows * columns, identity["dim"]), np.dtype(identity["dtype"])),
        "images": ((count, height, width, 3), byte),
        "masks": ((count, height, width), byte),
        "labels": ((count, height, width), byte),
        "camera": ((count,), index),
        "scene": ((count,), index),
    }


def _bytes(layout) -> int:
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout.values())


def _array_path(folder: Path, split: str, name: str) -> Path:
    return folder / f"{split}-{name}.npy"
