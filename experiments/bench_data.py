"""Pictures a second and core: this loader beside torch's DataLoader with Pillow, in one run.

    fastdrive bench-data --out runs/bench_data

JPEG and mask to uint8 arrays, bicubic as the published processor resizes. Before anything is timed,
all sides must give the same pixels. One thread is timed in CPU seconds, the loaders by the clock,
in turn; needs the extra "parity". Takes about 4 minutes on 2 cores. To expect there: in one thread
3.9 times Pillow at 1596 x 1596 and 2.5 times at 672 x 392, where decoding picture and mask is
most of our work; as a loader, 2 (processes) to 3.7 (threads) and 2.5 to 3.2 times torch's.
"""

import hashlib
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import PIL
from PIL import Image

from data_pipelines.build import build_shards
from data_pipelines.decode import check_size, decode_image, decode_mask
from data_pipelines.disk import files_below
from data_pipelines.duplicates import without_duplicates
from data_pipelines.image_folder import PictureRef, read_image_folder
from data_pipelines.loader import LoaderConfig, make_loader
from data_pipelines.pictures import encode_mask, read_bytes
from data_pipelines.shards import Shards
from experiments.training_cost import step_flops
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, point, write_rows
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.training.reconstruction import ReconConfig

KEYS = ("image", "mask")
BATCH = 4
DRAWN = 25  # pictures drawn when none are given
LEAST = 8
OURS, THEIRS = "fastdrive_processes", "torch"
H100_FLOPS = 989e12  # dense bfloat16, by the maker's sheet
USED_SHARE = 0.4  # of that in a good training step


@dataclass(frozen=True)
class BenchDataArgs:
    """Compare the data loader's speed with torch's DataLoader.

    Attributes:
        out: Folder for data.json.
        pictures: Folder of JPEGs, searched recursively; None generates photo-like ones of 1600 x
            900.
        sizes: Heights and widths to resize to.
        workers: Worker processes, or threads, of a loader; one core each.
        items: Images that a loader delivers in a round.
        rounds: Timed rounds; the sides take turns.
        images_per_second: What one accelerator consumes in training; None derives it
            (`step_flops`).
    """

    out: Path = Path("runs/bench_data")
    pictures: Path | None = None
    sizes: tuple[tuple[int, int], ...] = ((1596, 1596), (392, 672))
    workers: int = 2
    items: int = 300
    rounds: int = 5
    images_per_second: float | None = None

    def __post_init__(self):
        for size in self.sizes:
            check_size(size)
        check_least(self, workers=1, items=1, rounds=1)
        if self.images_per_second is not None and self.images_per_second <= 0:
            raise UserError(f"images_per_second={self.images_per_second} must be positive.")


def bench_data(args: BenchDataArgs) -> Path:
    """Measures, prints and writes the figures; returns their path."""
    try:
        import torch
    except ImportError as error:
        raise UserError("bench-data needs torch: pip install -e '.[parity]'.") from error
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        _write_pictures(Path(folder) / "pictures", args.pictures)
        source = read_image_folder(Path(folder) / "pictures")
        shards = build_shards(source, Path(folder) / "shards", progress=False)
        refs = without_duplicates(source)[0].samples["train"]  # as the shards have them
        size = int(np.mean([ref.picture.stat().st_size for ref in refs]))
        print(f"{len(refs)} pictures of {size / 1e3:.0f} kB, {shards.image_size}")
        for target in args.sizes:
            rates = _measure(refs, shards, target, args)
            rows += _report(rates, target, args)
    meta = {
        "cores": os.cpu_count(),
        "workers": args.workers,
        "batch_size": BATCH,
        "pictures": str(args.pictures or "drawn"),
        "bytes_a_picture": size,
        "load_average": os.getloadavg(),
        "pillow": PIL.__version__,
        "opencv": cv2.__version__,
        "torch": torch.__version__,
    }
    return write_rows(args.out / "data.json", rows, meta)


@dataclass(frozen=True)
class PillowPictures:
    """A torch data set by the usual means: read, decode and resize with Pillow.

    Attributes:
        refs: Its files.
        size: Height and width.
        length: Items, going round the files.
    """

    refs: tuple[PictureRef, ...]
    size: tuple[int, int]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ref = self.refs[index % len(self.refs)]
        return pillow_item(read_bytes(ref.picture), read_bytes(ref.mask), self.size)


def pillow_item(jpeg: bytes, mask: bytes, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """What a record becomes, computed by Pillow alone."""
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    shape = Image.open(io.BytesIO(mask)).convert("L")
    resized = shape.resize(size[::-1], Image.Resampling.NEAREST)
    return {
        "image": np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)),
        "mask": (np.asarray(resized) > 0).astype(np.uint8),
    }


def our_item(
    jpeg: bytes, mask: bytes, size: tuple[int, int], resize: str = "bicubic"
) -> dict[str, np.ndarray]:
    """What the loader makes of a record."""
    return {
        "image": decode_image(jpeg, size, resize),
        "mask": decode_mask(mask, size),
    }


def _measure(
    refs: Sequence[PictureRef], shards: Shards, size: tuple[int, int], args: BenchDataArgs
) -> dict[str, list[float]]:
    """Pictures a second and core of each side, for each round after one of warming up."""
    files = [(read_bytes(ref.picture), read_bytes(ref.mask)) for ref in refs]
    for jpeg, mask in files:
        _same(our_item(jpeg, mask, size), pillow_item(jpeg, mask, size))
    single = {
        "fastdrive_thread": our_item,
        "fastdrive_area_thread": partial(our_item, resize="area"),
        "pillow_thread": pillow_item,
    }
    loaders = _loaders(refs, shards, size, args)
    rates: dict[str, list[float]] = {side: [] for side in (*single, *loaders)}
    for _ in range(args.rounds + 1):
        for side, item in single.items():
            begin = time.process_time()
            for jpeg, mask in files:
                item(jpeg, mask, size)
            spent = time.process_time() - begin
            rates[side].append(len(files) / spent)
        found = {}
        for side, start in loaders.items():
            found[side], rate = _drain(start(), args)
            rates[side].append(rate / args.workers)
            if found[side] != found[OURS]:
                raise RuntimeError(f"{side} gives other arrays than {OURS}")
    return {side: values[1:] for side, values in rates.items()}


def _loaders(
    refs: Sequence[PictureRef], shards: Shards, size: tuple[int, int], args: BenchDataArgs
) -> dict[str, Callable[[], Iterator[dict]]]:
    """For each loader, what starts a round of the same pictures in the same order."""
    from torch.utils.data import DataLoader

    ours = partial(LoaderConfig, batch_size=BATCH, image_size=size, shuffle=False)
    processes = make_loader(shards, "train", ours(num_workers=args.workers, read_threads=1))
    threads = make_loader(shards, "train", ours(num_workers=0, read_threads=args.workers))
    theirs = DataLoader(
        PillowPictures(tuple(refs), size, BATCH * _batches(args)),
        batch_size=BATCH,
        num_workers=args.workers,
        persistent_workers=True,
        multiprocessing_context="spawn",  # a fork would copy the locks of our threads
        worker_init_fn=_allow_read_only,
    )
    return {
        OURS: partial(iter, processes),
        "fastdrive_threads": partial(iter, threads),
        THEIRS: partial(iter, theirs),
    }


def _allow_read_only(worker: int) -> None:
    """Pillow's arrays are read-only, of which torch would warn; a copy would cost it time."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def _batches(args: BenchDataArgs) -> int:
    return args.workers + -(-args.items // BATCH)


def _drain(batches: Iterator[dict], args: BenchDataArgs) -> tuple[set[bytes], float]:
    """Digests of the first pictures, and pictures a second once every worker has given a batch.

    Worker processes of the two libraries share the pictures out in another order, so the first
    batches agree only together.
    """
    first = [next(batches) for _ in range(args.workers)]
    begin = time.perf_counter()
    for _ in range(_batches(args) - args.workers):
        next(batches)
    spent = time.perf_counter() - begin
    if hasattr(batches, "close"):  # ours is endless and would go on in the next side's time
        batches.close()
    digests = {
        hashlib.sha256(b"".join(np.asarray(batch[key][k]).tobytes() for key in KEYS)).digest()
        for batch in first
        for k in range(BATCH)
    }
    return digests, BATCH * (_batches(args) - args.workers) / spent


def _same(one: dict, other: dict) -> None:
    for key in KEYS:
        if not np.array_equal(one[key], other[key]):
            raise RuntimeError(f"our {key} is not that of Pillow {PIL.__version__}")


def _report(rates: dict[str, list[float]], size: tuple[int, int], args: BenchDataArgs) -> list[Row]:
    name, rounds = f"{size[1]}x{size[0]}", args.rounds
    rows = []

    def add(side: str, metric: str, value: float, n: int, unit: str) -> None:
        rows.append(point(side, None, f"{metric}_{name}", value, n=n, unit=unit))

    for side, values in rates.items():
        add(side, "pictures_per_second_and_core", float(np.median(values)), rounds, "1/s")
        reference = "pillow_thread" if side.endswith("_thread") else THEIRS
        times = np.divide(values, rates[reference])  # of the same round, under the same load
        add(side, f"times_{reference}", float(np.median(times)), rounds, "")
        print(
            f"{name} {side}: {np.median(values):.1f} pictures/s and core, {np.median(times):.2f} "
            f"times {reference} ({times.min():.2f} to {times.max():.2f} over {rounds} rounds)",
            flush=True,
        )
    flops = step_flops(ReconConfig(), size, VisionConfig())
    wanted = args.images_per_second or USED_SHARE * H100_FLOPS / flops
    origin = (
        "as given"
        if args.images_per_second
        else f"derived, not measured: {USED_SHARE:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s / "
        f"{flops / 1e12:.1f} TFLOP a picture (frozen encoder, pruner, decoder twice)"
    )
    print(f"{name} one H100 takes {wanted:.1f} pictures/s ({origin})")
    add("h100", "pictures_per_second_taken", wanted, 1, "1/s")
    for side in (OURS, "fastdrive_threads", THEIRS):
        cores = wanted / float(np.median(rates[side]))
        print(f"{name} {side}: {cores:.2f} cores feed one H100")
        add(side, "cores_for_one_h100", cores, rounds, "")
    return rows


def _write_pictures(root: Path, given: Path | None) -> None:
    """JPEGs as files or drawn, each with a drawn mask, as an image folder."""
    if given is None:
        jpegs = [_draw_jpeg(seed) for seed in range(DRAWN)]
    else:
        paths = [p for p in files_below(given) if p.suffix.lower() in (".jpg", ".jpeg")]
        if len(paths) < LEAST:
            raise UserError(f"{given} holds {len(paths)} JPEGs; give a folder of {LEAST} or more.")
        jpegs = [read_bytes(path) for path in paths]
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number, jpeg in enumerate(jpegs):
        with Image.open(io.BytesIO(jpeg)) as picture:
            width, height = picture.size
        mask = _clouds(height, width, number)[..., 0] > 0
        (root / "images" / f"{number:05d}.jpg").write_bytes(jpeg)
        (root / "masks" / f"{number:05d}.png").write_bytes(encode_mask(mask))


def _draw_jpeg(seed: int) -> bytes:
    """1600 x 900, quality 95, about as many bytes as a photograph."""
    values = 128 + 50 * _clouds(900, 1600, seed, finest=2)
    ok, data = cv2.imencode(
        ".jpg", np.clip(values, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95]
    )
    if not ok:
        raise RuntimeError("OpenCV did not encode a JPEG")
    return data.tobytes()


def _clouds(height: int, width: int, seed: int, finest: int = 64) -> np.ndarray:
    """Noise [H, W, 3] whose strength falls with its frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    out = np.zeros((height, width, 3), np.float32)
    for cell in (256, 128, 64, 32, 16, 8, 4, 2):
        if cell >= finest:
            shape = (-(-height // cell), -(-width // cell), 3)
            noise = rng.standard_normal(shape, np.float32)
            out += (cell / 256) * cv2.resize(noise, (width, height))
    return out
